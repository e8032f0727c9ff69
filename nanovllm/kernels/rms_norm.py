"""RMSNorm in one pass over the row, instead of five."""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    parts_ptr,
    own_ptr,
    weight_ptr,
    out_ptr,
    eps,
    parts_stride,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    column = tl.arange(0, BLOCK)
    offsets, mask = tl.program_id(0).to(tl.int64) * SIZE + column, column < SIZE
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:  # x is the residual
        for part in tl.static_range(PARTS):  # in this order, wherever number OWN lies
            if part == OWN:
                x += tl.load(own_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            else:
                part_ptr = parts_ptr + parts_stride.to(tl.int64) * part
                x += tl.load(part_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        tl.store(x_ptr + offsets, x, mask=mask)
    if weight_ptr is not None:
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps) * weight
    if out_ptr is not None:
        tl.store(out_ptr + offsets, x, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 inside, of x `[n, size]`, contiguous, and weight `[size]`."""
    num_rows, size = x.shape
    assert x.is_contiguous()
    out, block = padded_empty(num_rows, size, x), next_power_of_2(size)
    num_warps = min(8, max(1, block // 1024))  # few: a sum inside one warp needs no barrier
    _rms_norm_kernel[(num_rows,)](
        x,
        None,
        None,
        weight,
        out,
        eps,
        0,
        SIZE=size,
        PARTS=0,
        OWN=-1,
        BLOCK=block,
        num_warps=num_warps,
        **pdl_options(),
    )
    return out


def add_rms_norm(x: Tensor, parts: Tensor, weight: Tensor | None, eps: float) -> Tensor | None:
    """Add the sum of parts `[num_parts, n, size]` to x, in place, and return `rms_norm` of that (no weight: None)."""
    _, num_rows, size = parts.shape
    assert x.is_contiguous() and parts.is_contiguous()
    out, block = None if weight is None else padded_empty(num_rows, size, x), next_power_of_2(size)
    launch_add_rms_norm(
        x,
        parts,
        weight,
        eps,
        out,
        num_warps=min(16, max(1, block // 64)),  # many: there is more to read
        pdl=pdl_options(),
    )
    return out


def launch_add_rms_norm(
    residual: Tensor,
    addends: Tensor,
    weight: Tensor | None,
    eps: float,
    out: Tensor | None,
    *,
    num_warps: int,
    pdl: dict[str, bool],
    own: Tensor | None = None,
    own_rank: int = -1,
) -> None:
    """Add all addends to the residual, in place, and write the RMSNorm of the sum to `out`.

    residual, own, out: `[n, size]` with contiguous rows. addends: `[num_addends, n, size]`. With `own`, it takes the
    place of `addends[own_rank]`, which is not read. Without a weight, `out` gets the sum itself; it may be None.
    """
    num_rows, size = residual.shape
    _rms_norm_kernel[(num_rows,)](
        residual,
        addends,
        own,
        weight,
        out,
        eps,
        addends.stride(0),
        SIZE=size,
        PARTS=len(addends),
        OWN=own_rank,
        BLOCK=next_power_of_2(size),
        num_warps=num_warps,
        **pdl,
    )


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
