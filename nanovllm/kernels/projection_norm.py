"""RMSNorm of q and of k over all their heads together, in place, in one kernel.

Most families normalise each head, which `norm_rope_store` does on the way. OLMo normalises the
whole projection. With several ranks a rank has some of the heads only: then one launch computes its
sums of squares, which an all-reduce adds up, and a second one normalises with the result.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)


@triton.jit
def _projection_norm_kernel(
    qkv_ptr,
    sums_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    row_stride,
    num_ranks,
    Q_SIZE: tl.constexpr,
    K_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes q or k of one row. Without weights it only writes the sum of squares."""
    launch_next(PDL)
    row = tl.program_id(0)
    is_k = tl.program_id(1)
    size = Q_SIZE + is_k * (K_SIZE - Q_SIZE)
    column = tl.arange(0, BLOCK)
    mask = column < size
    if q_weight_ptr is not None:
        if is_k:
            weight_ptr = k_weight_ptr
        else:
            weight_ptr = q_weight_ptr
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x_ptr = qkv_ptr + row.to(tl.int64) * row_stride + is_k * Q_SIZE + column
    x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    sum_offset = is_k * tl.num_programs(0) + row
    if q_weight_ptr is None:
        tl.store(sums_ptr + sum_offset, tl.sum(x * x, axis=0))
    else:
        if sums_ptr is None:
            total = tl.sum(x * x, axis=0)
        else:
            total = tl.load(sums_ptr + sum_offset)
        x = x * tl.rsqrt(total / (size * num_ranks) + eps) * weight
        tl.store(x_ptr, x.to(qkv_ptr.dtype.element_ty), mask=mask)


def sums_of_squares(qkv: Tensor, q_size: int, k_size: int) -> Tensor:
    """Sum the squares of q and of k in each row: `[2, n]` float32.

    qkv: `[n, columns]`, rows contiguous: q_size columns of q, then k_size of k, then others.
    """
    sums = torch.empty(2, len(qkv), dtype=torch.float32, device=qkv.device)
    _launch(qkv, sums, None, None, 0.0, q_size, k_size, 1)
    return sums


def projection_norm(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    sums: Tensor | None = None,
    num_ranks: int = 1,
) -> None:
    """Replace q and k, in place, by `x / sqrt(mean(x^2) + eps) * weight`, computed in float32.

    qkv: as for `sums_of_squares`, of which the columns behind q and k are left as they are.
    q_weight, k_weight: `[q_size]` and `[k_size]`, of this rank's heads.
    sums: `[2, n]` float32, `sums_of_squares` of all ranks added up; None: there is one rank.
    num_ranks: how many have been added up. Where several ranks hold the same head it is in the sum
        as often as it is in `num_ranks * k_size`, so that the mean is right.
    """
    _launch(qkv, sums, q_weight, k_weight, eps, len(q_weight), len(k_weight), num_ranks)


def _launch(
    qkv: Tensor,
    sums: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    q_size: int,
    k_size: int,
    num_ranks: int,
) -> None:
    assert qkv.stride(1) == 1
    block = next_power_of_2(max(q_size, k_size))
    _projection_norm_kernel[(len(qkv), 2)](
        qkv,
        sums,
        q_weight,
        k_weight,
        eps,
        qkv.stride(0),
        num_ranks,
        Q_SIZE=q_size,
        K_SIZE=k_size,
        BLOCK=block,
        num_warps=min(8, max(1, block // 1024)),  # few: a sum inside one warp needs no barrier
        **pdl_options(),
    )


def sums_of_squares_torch(qkv: Tensor, q_size: int, k_size: int) -> Tensor:
    """`sums_of_squares` in PyTorch: the reference, and the CPU's path."""
    q, k = qkv[:, : q_size + k_size].float().split((q_size, k_size), dim=1)
    return torch.stack((q.square().sum(-1), k.square().sum(-1)))


def projection_norm_torch(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    sums: Tensor | None = None,
    num_ranks: int = 1,
) -> None:
    """`projection_norm` in PyTorch: the reference, and the CPU's path."""
    sizes = (len(q_weight), len(k_weight))
    if sums is None:
        sums = sums_of_squares_torch(qkv, *sizes)
    projections = qkv[:, : sum(sizes)].split(sizes, dim=1)
    for x, weight, total in zip(projections, (q_weight, k_weight), sums, strict=True):
        factor = torch.rsqrt(total / (len(weight) * num_ranks) + eps)
        x.copy_(x.float() * factor.unsqueeze(1) * weight.float())
