"""A linear layer of INT4 weights for one token, where nearly all the time goes into reading them.

As in `gemv`, a program takes a few rows of the weight, and the RMSNorm before the product and the
addition after it are a part of the kernel. What differs is that a byte holds two weights (see
int4_layout.py), so that there are four times as many multiplications to a byte: they take about as
long as reading it, and each weight must cost few instructions.

So nothing is converted. Four bits in the mantissa of a float32, under the exponent of 1.0, *are* a
number: 1 + n / 16 in its upper four bits, 1 + n / 256 in the four below, and so on. One operation
masks the bits and sets the exponent, and subtracting what the zero point becomes in the same place
is exact. The power of 16 that is left is multiplied into x, and the scale into the sum over what a
thread has of a group.
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
from nanovllm.kernels.gate_mul import gated
from nanovllm.kernels.int4_config import Int4GemvConfig, int4_gemv_config
from nanovllm.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, positions_per_group

ONE = 0x3F800000  # the bits of the float32 1.0


@triton.jit
def _load_numbers(ptrs, number, WIDTH: tl.constexpr):
    """Load what a step reads once. The L2 cache had better keep K and V, which may fit in it."""
    return tl.load(ptrs, mask=number < WIDTH, other=0, eviction_policy="evict_first")


@triton.jit
def load_input(ptr, order_ptr, column, IN_SIZE: tl.constexpr):
    """Load x, or the norm's weight, of some columns of the weight, in float32."""
    in_row = column < IN_SIZE
    if order_ptr is not None:
        column = tl.load(order_ptr + column, mask=in_row, other=0)
    return tl.load(ptr + column, mask=in_row, other=0.0).to(tl.float32)


@triton.jit
def multiply(
    numbers,
    x0,
    x1,
    x2,
    x3,
    scales_ptr,
    zeros_ptr,
    row,
    first_column,
    one,
    GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
):
    """Multiply what each thread has of a row with x: `[ROWS, CHUNKS, 32]`.

    numbers: `[ROWS, CHUNKS, 32, 8]`.
    x0, x1, x2, x3: what the lowest to the highest four bits of the numbers are multiplied with,
        `[1, CHUNKS, 32, 8]` each, times 16^4, 16^3, 16^2 and 16.
    first_column: `[1, CHUNKS, 32]`, of a thread's first number.
    one: ONE. It is an argument since the compiler makes two operations of mask and exponent if it
        knows both.
    """
    bits = numbers.to(tl.int32) << 7  # the upper four bits are the mantissa's now
    out = tl.zeros([numbers.shape[0], numbers.shape[1], numbers.shape[2]], tl.float32)
    for position in tl.static_range(4):
        x = x0
        if position == 1:
            x = x1
        if position == 2:
            x = x2
        if position == 3:
            x = x3
        if position % POSITIONS == 0:
            group = tl.minimum((first_column + position * 32) // GROUP_SIZE, GROUPS - 1)
            parameter = row.to(tl.int64) * GROUPS + group
            scale = tl.load(scales_ptr + parameter).to(tl.float32)
            zero = SYMMETRIC_ZERO
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + parameter).to(tl.float32)[:, :, :, None]
            products = tl.zeros(numbers.shape, tl.float32)
        weight = ((bits & (0x780 << 4 * position)) | one).to(tl.float32, bitcast=True)
        products += (weight - (1.0 + zero / (1 << (16 - 4 * position)))) * x
        if (position + 1) % POSITIONS == 0:
            out += tl.sum(products, axis=3) * scale
    return out


@triton.jit(do_not_specialize=["one"])
def _int4_gemv_kernel(
    x_ptr,
    order_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    residual_ptr,
    out_ptr,
    out_size,
    one,
    IN_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs, from CHUNKS * 1024 columns at a time.

    Its tile of the weight is `[ROWS, CHUNKS, 32, 8]`: the 32 threads of a warp read 8 numbers each,
    16 bytes. A thread has the same columns of every row, and so reads them of x once.
    """
    WIDTH: tl.constexpr = (IN_SIZE + 127) // 128 * 32  # numbers in a row of the weight
    PIECES: tl.constexpr = (WIDTH + CHUNKS * 256 - 1) // (CHUNKS * 256)
    GROUPS: tl.constexpr = (IN_SIZE + GROUP_SIZE - 1) // GROUP_SIZE
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_output = output < out_size
    row = tl.minimum(output, out_size - 1)[:, None, None]
    thread = tl.arange(0, CHUNKS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    row_ptr = packed_ptr + row.to(tl.int64)[:, :, :, None] * WIDTH
    up_row_ptr = row_ptr + out_size.to(tl.int64) * WIDTH
    out = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    up = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    squares = tl.zeros([1, CHUNKS, 32, 8], tl.float32)
    for piece in tl.static_range(PIECES):
        first_number = piece * (CHUNKS * 256) + thread * 8
        number = first_number[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
        numbers = _load_numbers(row_ptr + number, number, WIDTH)
        if ACTIVATION is not None:
            up_numbers = _load_numbers(up_row_ptr + number, number, WIDTH)
        if piece == 0:
            launch_next(PDL)
            wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
        first_column = first_number // 32 * 128 + first_number % 32
        column = first_column[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
        x0 = load_input(x_ptr, order_ptr, column, IN_SIZE)
        x1 = load_input(x_ptr, order_ptr, column + 32, IN_SIZE)
        x2 = load_input(x_ptr, order_ptr, column + 64, IN_SIZE)
        x3 = load_input(x_ptr, order_ptr, column + 96, IN_SIZE)
        if norm_ptr is not None:
            squares += x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3
            x0 *= load_input(norm_ptr, order_ptr, column, IN_SIZE)
            x1 *= load_input(norm_ptr, order_ptr, column + 32, IN_SIZE)
            x2 *= load_input(norm_ptr, order_ptr, column + 64, IN_SIZE)
            x3 *= load_input(norm_ptr, order_ptr, column + 96, IN_SIZE)
        x0 *= 65536.0
        x1 *= 4096.0
        x2 *= 256.0
        x3 *= 16.0
        out += multiply(
            numbers,
            x0,
            x1,
            x2,
            x3,
            scales_ptr,
            zeros_ptr,
            row,
            first_column,
            one,
            GROUPS,
            GROUP_SIZE,
            POSITIONS,
            SYMMETRIC_ZERO,
        )
        if ACTIVATION is not None:
            up += multiply(
                up_numbers,
                x0,
                x1,
                x2,
                x3,
                scales_ptr,
                zeros_ptr,
                row + out_size,
                first_column,
                one,
                GROUPS,
                GROUP_SIZE,
                POSITIONS,
                SYMMETRIC_ZERO,
            )
    result = tl.sum(tl.sum(out, axis=2), axis=1)
    scale = 1.0
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the result.
        total = tl.sum(tl.sum(tl.sum(squares, axis=3), axis=2), axis=1)
        scale = tl.rsqrt(total / IN_SIZE + eps)
    result *= scale
    if bias_ptr is not None:
        result += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        result = gated(result, tl.sum(tl.sum(up, axis=2), axis=1) * scale, ACTIVATION)
    if residual_ptr is not None:
        result += tl.load(residual_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=is_output)


def int4_gemv(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    config: Int4GemvConfig | None = None,
) -> Tensor:
    """`gemv` with an INT4 weight: `residual + rms_norm(x) W^T + bias`, `[1, out]`.

    The reference is that of `gemv`, with the weight of `dequantize_int4`.

    x, bias, norm_weight, eps, residual, activation: as for `gemv`.
    config: overrides `int4_gemv_config`, for tests and tuning.
    """
    is_gated = activation is not None
    out_size = weight.out_size // 2 if is_gated else weight.out_size
    assert x.shape == (1, weight.in_size) and not (is_gated and bias is not None)
    assert all(t is None or t.is_contiguous() for t in (x, weight.packed, weight.scales, residual))
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=x.dtype, device=x.device)
    config = config or int4_gemv_config(out_size, weight.in_size, is_gated)
    _int4_gemv_kernel[(triton.cdiv(out_size, config.rows),)](
        x,
        weight.column_order,
        weight.packed,
        weight.scales,
        weight.zero_points,
        bias,
        norm_weight,
        eps,
        residual,
        out,
        out_size,
        ONE,
        IN_SIZE=weight.in_size,
        GROUP_SIZE=weight.group_size,
        POSITIONS=positions_per_group(weight.group_size, weight.in_size),
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        ROWS=config.rows,
        CHUNKS=config.chunks,
        ACTIVATION=activation,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return out
