"""RMSNorm, with the residual addition before it: one pass over the row instead of five."""

import torch

from nanovllm.kernels._triton import next_power_of_2, tl, triton


@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * SIZE
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    x = tl.load(x_ptr + row + offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(residual_ptr.dtype.element_ty)  # the next layer sees the rounded sum, so the norm does too
        tl.store(residual_ptr + row + offsets, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row + offsets, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in float32 inside.

    Args:
        x: `[n, size]`, contiguous.
        weight: `[size]`.
        residual: like x; x is added to it **in place**, and the sum is what is normalised.
    """
    size = x.shape[-1]
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    out = torch.empty_like(x)
    block = next_power_of_2(size)
    _rms_norm_kernel[(x.numel() // size,)](
        x, x if residual is None else residual, weight, out, eps,
        SIZE=size, BLOCK=block, ADD=residual is not None, num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return out


def rms_norm_torch(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    if residual is not None:
        x = residual.add_(x)
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
