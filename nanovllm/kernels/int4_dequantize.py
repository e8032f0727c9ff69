"""An INT4 weight in 16 bits, for cuBLAS to multiply the many tokens of a large prefill with."""

import torch
from torch import Tensor

from nanovllm.kernels._triton import launch_next, pdl_options, tl, triton, wait_for_previous
from nanovllm.kernels.int4_layout import BLOCK, STRIPE, SYMMETRIC_ZERO, Int4Weight

ROWS = 4  # of the weight that a program takes
BLOCKS = 8  # of 128 columns each


@triton.jit
def _int4_dequantize_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    out_size,
    IN_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCKS blocks of ROWS rows. Its tile is `[ROWS, BLOCKS, 32]` numbers."""
    launch_next(PDL)
    WIDTH: tl.constexpr = (IN_SIZE + 127) // 128 * 32  # numbers in a row
    GROUPS: tl.constexpr = (IN_SIZE + GROUP_SIZE - 1) // GROUP_SIZE
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None].to(tl.int64)
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    stripe = tl.arange(0, 32)[None, None, :]
    is_row = row < out_size
    number = block * 32 + stripe
    numbers = tl.load(packed_ptr + row * WIDTH + number, mask=is_row & (number < WIDTH), other=0)
    wait_for_previous(PDL)  # for an earlier kernel may still read what is written here
    for position in tl.static_range(4):
        first_column = block * 128 + position * 32
        parameter = row * GROUPS + first_column // GROUP_SIZE
        in_row = is_row & (first_column < IN_SIZE)
        scale = tl.load(scales_ptr + parameter, mask=in_row, other=0.0).to(tl.float32)
        zero = SYMMETRIC_ZERO
        if zeros_ptr is not None:
            zero = tl.load(zeros_ptr + parameter, mask=in_row, other=0).to(tl.float32)
        weight = (((numbers >> 4 * position) & 15).to(tl.float32) - zero) * scale
        column = first_column + stripe
        out_ptrs = out_ptr + row * IN_SIZE + column
        tl.store(out_ptrs, weight.to(out_ptr.dtype.element_ty), mask=is_row & (column < IN_SIZE))


def int4_dequantize(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]`, computed in float32.

    The reference is `dequantize_int4`, but for the order of the columns: they are as they are
    packed, and it is x that must be put in that order.
    """
    out_size = weight.out_size
    in_size = weight.in_size
    out = torch.empty(out_size, in_size, dtype=dtype, device=weight.packed.device)
    grid = (triton.cdiv(out_size, ROWS), triton.cdiv(in_size, BLOCKS * BLOCK))
    assert weight.packed.is_contiguous() and STRIPE == 32
    _int4_dequantize_kernel[grid](
        weight.packed,
        weight.scales,
        weight.zero_points,
        out,
        out_size,
        IN_SIZE=in_size,
        GROUP_SIZE=weight.group_size,
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        ROWS=ROWS,
        BLOCKS=BLOCKS,
        **pdl_options(),
    )
    return out
