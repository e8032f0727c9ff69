"""The activation of the MLP, `silu(gate) * up`, in one pass."""

from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    launch_next,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)


@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    launch_next(PDL)
    wait_for_previous(PDL)
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(
        tl.int64
    )  # what was written last is in the L2 cache
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + offsets, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + offsets, mask=mask).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_mul(x: Tensor) -> Tensor:
    """x `[n, 2 * size]`, contiguous, gate and up side by side -> `[n, size]`."""
    num_rows, size = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous()
    out = padded_empty(num_rows, size, x)
    _silu_mul_kernel[(num_rows, triton.cdiv(size, 1024))](
        x, out, SIZE=size, BLOCK=1024, **pdl_options()
    )
    return out


def silu_mul_torch(x: Tensor) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
