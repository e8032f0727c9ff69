"""A linear layer of FP8 weights for one token, where nearly all the time goes into reading them.

As in `gemv`, a program takes a few rows of the weight, and the RMSNorm before the product and the
addition after it are a part of the kernel. The weights become float32 in registers. Where a row has
one scale, its finished sum is multiplied by it; where blocks have one, what a thread has summed of
a block is.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_config import FP8GemvConfig, fp8_gemv_config
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.gate_mul import gated

# Of a row, that a thread reads at a time; they are of one grain. Were they 16 (bytes), as many of x
# would be two loads, and Triton would move all weights between threads to make them fit.
THREAD_COLUMNS = 8


@triton.jit
def _load_weight(ptrs, column, IN_SIZE: tl.constexpr):
    """Load what a step reads once. The L2 cache had better keep K and V, which may fit in it."""
    return tl.load(ptrs + column, mask=column < IN_SIZE, other=0.0, eviction_policy="evict_first")


@triton.jit
def _multiply(
    weight,
    x,
    scales_ptr,
    row,
    first_column,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
):
    """Multiply what each thread has of a row: `[ROWS, CHUNKS, 32]`.

    weight: `[ROWS, CHUNKS, 32, 8]`. x: `[1, CHUNKS, 32, 8]`.
    row: `[ROWS, 1, 1]`, or `[1, 1, 1]` if all of them are of one grain.
    first_column: `[1, CHUNKS, 32]`, a thread's.
    """
    products = tl.sum(weight.to(tl.float32) * x, axis=3)
    if COLUMN_GRAIN != IN_SIZE:
        GRAINS: tl.constexpr = IN_SIZE // COLUMN_GRAIN
        grain = tl.minimum(first_column // COLUMN_GRAIN, GRAINS - 1)
        products *= tl.load(scales_ptr + row // ROW_GRAIN * GRAINS + grain)
    return products


@triton.jit
def _fp8_gemv_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    residual_ptr,
    out_ptr,
    out_size,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs, from CHUNKS * 256 columns at a time.

    Its tile of the weight is `[ROWS, CHUNKS, 32, 8]`: the 32 threads of a warp read 8 bytes each.
    A thread has the same columns of every row, and so reads them of x once.
    """
    WIDTH: tl.constexpr = CHUNKS * 256
    PIECES: tl.constexpr = (IN_SIZE + WIDTH - 1) // WIDTH
    first_output = tl.program_id(0) * ROWS
    output = first_output + tl.arange(0, ROWS)
    is_output = output < out_size
    row = tl.minimum(output, out_size - 1)[:, None, None]
    scale_row = row
    if ROW_GRAIN % ROWS == 0:
        scale_row = tl.full([1, 1, 1], first_output, tl.int32)
    thread = tl.arange(0, CHUNKS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    row_ptr = weight_ptr + row.to(tl.int64)[:, :, :, None] * IN_SIZE
    up_row_ptr = row_ptr + out_size.to(tl.int64) * IN_SIZE
    out = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    up = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    squares = tl.zeros([1, CHUNKS, 32, 8], tl.float32)
    for piece in tl.static_range(PIECES):
        first_column = piece * WIDTH + thread * 8
        column = first_column[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
        weight = _load_weight(row_ptr, column, IN_SIZE)
        if ACTIVATION is not None:
            up_weight = _load_weight(up_row_ptr, column, IN_SIZE)
        if norm_ptr is not None:
            norm = tl.load(norm_ptr + column, mask=column < IN_SIZE, other=0.0)
        if piece == 0:
            launch_next(PDL)
            wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
        x = tl.load(x_ptr + column, mask=column < IN_SIZE, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += x * x
            x *= norm.to(tl.float32)
        out += _multiply(
            weight, x, scales_ptr, scale_row, first_column, IN_SIZE, ROW_GRAIN, COLUMN_GRAIN
        )
        if ACTIVATION is not None:
            up_row = scale_row + out_size
            up += _multiply(
                up_weight, x, scales_ptr, up_row, first_column, IN_SIZE, ROW_GRAIN, COLUMN_GRAIN
            )
    result = tl.sum(tl.sum(out, axis=2), axis=1)
    up_result = tl.sum(tl.sum(up, axis=2), axis=1)
    if COLUMN_GRAIN == IN_SIZE:
        grain = tl.minimum(output, out_size - 1) // ROW_GRAIN
        result *= tl.load(scales_ptr + grain)
        if ACTIVATION is not None:
            up_result *= tl.load(scales_ptr + out_size // ROW_GRAIN + grain)
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the result.
        total = tl.sum(tl.sum(tl.sum(squares, axis=3), axis=2), axis=1)
        factor = tl.rsqrt(total / IN_SIZE + eps)
        result *= factor
        up_result *= factor
    if bias_ptr is not None:
        result += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        result = gated(result, up_result, ACTIVATION)
    if residual_ptr is not None:
        result += tl.load(residual_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=is_output)


def fp8_gemv(
    x: Tensor,
    weight: FP8Weight,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    config: FP8GemvConfig | None = None,
) -> Tensor:
    """`gemv` with an FP8 weight: `residual + rms_norm(x) W^T + bias`, `[1, out]`.

    The reference is that of `gemv`, with the weight of `dequantize_fp8`.

    weight: its column grain is a multiple of 8, or a whole row.
    x, bias, norm_weight, eps, residual, activation, out_dtype: as for `gemv`.
    config: overrides `fp8_gemv_config`, for tests and tuning.
    """
    is_gated = activation is not None
    out_size = weight.out_size // 2 if is_gated else weight.out_size
    assert x.shape == (1, weight.in_size) and not (is_gated and bias is not None)
    assert weight.has_whole_rows or weight.column_grain % THREAD_COLUMNS == 0
    assert not is_gated or out_size % weight.row_grain == 0
    assert all(t is None or t.is_contiguous() for t in (x, weight.values, weight.scales, residual))
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=out_dtype or x.dtype, device=x.device)
    config = config or fp8_gemv_config(out_size, weight.in_size, is_gated)
    _fp8_gemv_kernel[(triton.cdiv(out_size, config.rows),)](
        x,
        weight.values,
        weight.scales,
        bias,
        norm_weight,
        eps,
        residual,
        out,
        out_size,
        IN_SIZE=weight.in_size,
        ROW_GRAIN=weight.row_grain,
        COLUMN_GRAIN=weight.column_grain,
        ROWS=config.rows,
        CHUNKS=config.chunks,
        ACTIVATION=activation,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return out
