"""RMSNorm in one pass over the row, instead of five."""

import torch
from torch import Tensor

from nanovllm.kernels._triton import launch_next, next_power_of_2, pdl_options, tl, triton, wait_for_previous


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64) * SIZE
    offsets = tl.arange(0, BLOCK)
    mask = offsets < SIZE
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row + offsets, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    tl.store(out_ptr + row + offsets, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, in float32 inside, of x `[n, size]`, contiguous, and weight `[size]`."""
    num_rows, size = x.shape
    assert x.is_contiguous()
    out, block = torch.empty_like(x), next_power_of_2(size)
    num_warps = min(8, max(1, block // 1024))  # few: a sum inside one warp needs no barrier
    _rms_norm_kernel[(num_rows,)](x, weight, out, eps, SIZE=size, BLOCK=block, num_warps=num_warps, **pdl_options())
    return out


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
