"""RMSNorm (Zhang & Sennrich 2019) in one pass over a row, alone or after an addition to the
residual.

PyTorch would launch a kernel for each of square, mean, rsqrt and two products. Here one program
keeps its row in registers, so that the row is read and written once. The kernel that adds to the
residual has the row there as well and can go on with the norm that follows the addition.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_quantize import empty_input, store_rounded
from nanovllm.kernels.fp8_weight import FP8Input, Rounding


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    addends_ptr,
    own_ptr,
    weight_ptr,
    post_weight_ptr,
    out_ptr,
    out_scales_ptr,
    eps,
    post_eps,
    scale,
    addend_stride,
    num_out_rows,
    SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ADDENDS: tl.constexpr,
    OWN: tl.constexpr,
    CHANGED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one row. With addends, x is the residual, and is updated.

    CHANGED: the sum of the addends is normalised or scaled before it is added. With
    `out_scales_ptr`, the result is rounded to FP8 in groups of GROUP_SIZE columns.
    """
    launch_next(PDL)
    column = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    offsets = row * SIZE + column
    mask = column < SIZE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if post_weight_ptr is not None:
        post_weight = tl.load(post_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADDENDS > 0:
        total = x
        if CHANGED:
            total = tl.zeros_like(x)
        for i in tl.static_range(ADDENDS):
            if i == OWN:
                total += tl.load(own_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            else:
                addend_ptr = addends_ptr + addend_stride.to(tl.int64) * i
                total += tl.load(addend_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if post_weight_ptr is not None:
            total *= tl.rsqrt(tl.sum(total * total, axis=0) / SIZE + post_eps) * post_weight
        if CHANGED:
            total = x + scale * total
        x = total
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # the norm is that of the rounded residual
        tl.store(x_ptr + offsets, x, mask=mask)
    if weight_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps) * weight
    if out_scales_ptr is not None:
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)  # as if it was written and read
        store_rounded(x, out_ptr, out_scales_ptr, num_out_rows, row, SIZE, GROUP_SIZE, BLOCK)
    elif out_ptr is not None:
        tl.store(out_ptr + offsets, x, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, a new tensor like x, computed in float32.

    x: `[n, size]`, contiguous. weight: `[size]`, of the dtype of x or float32.
    """
    num_rows, size = x.shape
    assert x.is_contiguous()
    out = padded_empty(num_rows, size, x)
    block = next_power_of_2(size)
    _rms_norm_kernel[(num_rows,)](
        x,
        None,
        None,
        weight,
        None,
        out,
        None,
        eps,
        0.0,
        1.0,
        0,
        0,
        SIZE=size,
        GROUP_SIZE=size,
        ADDENDS=0,
        OWN=-1,
        CHANGED=False,
        BLOCK=block,
        num_warps=min(8, max(1, block // 1024)),  # few: a sum inside one warp needs no barrier
        **pdl_options(),
    )
    return out


def add_rms_norm(
    x: Tensor,
    partial_sums: Tensor,
    weight: Tensor | None,
    eps: float,
    post_weight: Tensor | None = None,
    post_eps: float = 0.0,
    scale: float = 1.0,
    rounding: Rounding | None = None,
) -> Tensor | FP8Input | None:
    """Add the partial sums of a GEMM to the residual x, in place, and return the RMSNorm of x.

    x: `[n, size]`, contiguous.
    partial_sums: `[splits, n, size]`, contiguous: what `split_gemm` returns.
    weight: `[size]`; None: no norm is computed, and None is returned.
    post_weight, post_eps: `[size]` and the epsilon of an RMSNorm that the sum of the partial sums
        goes through before it is added; None: it is added as it is.
    scale: a factor of what is added.
    rounding: how the norm is to be rounded; None: it has the dtype of x.
    """
    _, num_rows, size = partial_sums.shape
    assert x.is_contiguous() and partial_sums.is_contiguous()
    out: Tensor | FP8Input | None = None
    if weight is not None:
        out = padded_empty(num_rows, size, x)
        if rounding is not None:
            out = empty_input(num_rows, size, x, rounding)
    launch_add_rms_norm(
        residual=x,
        addends=partial_sums,
        weight=weight,
        eps=eps,
        out=out,
        num_warps=min(16, max(1, next_power_of_2(size) // 64)),  # many: there is more to read
        pdl=pdl_options(),
        post_weight=post_weight,
        post_eps=post_eps,
        scale=scale,
    )
    return out


def launch_add_rms_norm(
    residual: Tensor,
    addends: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor | FP8Input | None,
    num_warps: int,
    pdl: dict[str, bool],
    own: Tensor | None = None,
    own_index: int = -1,
    post_weight: Tensor | None = None,
    post_eps: float = 0.0,
    scale: float = 1.0,
) -> None:
    """Add all addends to the residual, in place, and write the RMSNorm of that to `out`.

    The addends are added in float32, in the order of their numbers. With `own`, that tensor takes
    the place of `addends[own_index]`, which is not read. So each rank of an all-reduce can receive
    the other ranks' addends in one buffer, keep its own where it is, and still add in the order of
    the ranks, which gives the same bits everywhere.

    residual: `[n, size]`, contiguous, as are own and out.
    addends: `[num_addends, n, size]`; each of them is contiguous.
    weight: `[size]`; None: the sum itself is written to `out`.
    out: `[n, size]`, or the same rounded; None: only the residual is updated.
    post_weight, post_eps, scale: as in `add_rms_norm`.
    pdl: `pdl_options()`, or `{"PDL": False}` to launch a plain kernel.
    """
    num_addends, num_rows, size = addends.shape
    rounded = out if isinstance(out, FP8Input) else None
    _rms_norm_kernel[(num_rows,)](
        residual,
        addends,
        own,
        weight,
        post_weight,
        out if rounded is None else rounded.values,
        None if rounded is None else rounded.scales,
        eps,
        post_eps,
        scale,
        addends.stride(0),
        0 if rounded is None else len(rounded.values),
        SIZE=size,
        GROUP_SIZE=size if rounded is None else size // len(rounded.scales),
        ADDENDS=num_addends,
        OWN=own_index,
        CHANGED=post_weight is not None or scale != 1.0,
        BLOCK=next_power_of_2(size),
        num_warps=num_warps,
        **pdl,
    )


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm` in PyTorch, for x `[..., size]`: the reference, and the CPU's path."""
    if x.dtype == weight.dtype == torch.float32:  # one call instead of seven
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    x32 = x.float()
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    if weight.dtype == torch.float32:  # more precise than x: the product is rounded once, at last
        return (normed * weight).to(x.dtype)
    return normed.to(x.dtype) * weight
