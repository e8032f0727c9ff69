"""An FP8 weight in 16 bits, for steps that no kernel of FP8 weights serves."""

import torch
from torch import Tensor

from nanovllm.kernels._triton import launch_next, pdl_options, tl, triton, wait_for_previous
from nanovllm.kernels.fp8_weight import FP8Weight

BLOCK = 4096  # weights of a program


@triton.jit
def _dequantize_kernel(
    values_ptr,
    scales_ptr,
    out_ptr,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK columns of one row."""
    launch_next(PDL)
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < IN_SIZE
    offsets = row.to(tl.int64) * IN_SIZE + column
    values = tl.load(values_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grain = row // ROW_GRAIN * (IN_SIZE // COLUMN_GRAIN) + column // COLUMN_GRAIN
    scale = tl.load(scales_ptr + grain, mask=mask, other=0.0)
    # The kernel ahead may still read what this one writes over: memory that it has given back.
    wait_for_previous(PDL)
    tl.store(out_ptr + offsets, (values * scale).to(out_ptr.dtype.element_ty), mask=mask)


def fp8_dequantize(weight: FP8Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize_fp8` by a kernel, which reads a byte and writes two of each weight, once."""
    assert weight.values.is_contiguous() and weight.scales.is_contiguous()
    out = torch.empty(weight.values.shape, dtype=dtype, device=weight.values.device)
    grid = (weight.values.numel() // weight.in_size, triton.cdiv(weight.in_size, BLOCK))
    _dequantize_kernel[grid](
        weight.values,
        weight.scales,
        out,
        IN_SIZE=weight.in_size,
        ROW_GRAIN=weight.row_grain,
        COLUMN_GRAIN=weight.column_grain,
        BLOCK=BLOCK,
        **pdl_options(),
    )
    return out
