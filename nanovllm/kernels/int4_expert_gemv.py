"""The linear layers of a mixture's experts with INT4 weights, for one token: `expert_gemv` with the
arithmetic of int4_gemv.py.

The matrices of all experts are one INT4 weight: they lie one below the other.
"""

from dataclasses import dataclass

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
from nanovllm.kernels.int4_config import int4_expert_rows
from nanovllm.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, positions_per_group
from nanovllm.kernels.moe_routing import Routing


ONE = 0x3F800000


@dataclass(frozen=True, slots=True)
class Int4GemvConfig:
    """How `int4_gemv` divides the work; the result does not depend on it."""

    rows: int  # of the weight, that a program takes; of the gate and of up as many each
    chunks: int  # of 1,024 columns, that are multiplied at a time: a power of two
    num_warps: int  # at most `chunks`: then each warp reads the part of x that it multiplies with


def int4_gemv_config(out_size: int, in_size: int, is_gated: bool) -> Int4GemvConfig:
    """Choose the rows and columns of a program.

    More rows share the work of loading x and of normalising it, some five instructions an element,
    where a weight takes four. Fewer give every multiprocessor something to do, and leave registers
    where the columns are multiplied in several pieces, all of which are loaded at once.
    """
    chunks = min(4, next_power_of_2(max(1, in_size // 1024)))
    rows = 8 if out_size >= 2048 and in_size <= chunks * 1024 else 4
    if is_gated:
        rows //= 2  # each output needs two rows of the weight
    return Int4GemvConfig(rows=rows, chunks=chunks, num_warps=chunks)


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
def _int4_gate_up_kernel(
    x_ptr,
    order_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    experts_ptr,
    norm_ptr,
    eps,
    out_ptr,
    one,
    IN_SIZE: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of one expert; its tiles are those of `_int4_gemv_kernel`."""
    launch_next(PDL)
    WIDTH: tl.constexpr = (IN_SIZE + 127) // 128 * 32  # numbers in a row of the weight
    PIECES: tl.constexpr = (WIDTH + CHUNKS * 256 - 1) // (CHUNKS * 256)
    GROUPS: tl.constexpr = (IN_SIZE + GROUP_SIZE - 1) // GROUP_SIZE
    slot = tl.program_id(1)
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    thread = tl.arange(0, CHUNKS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
    wait_for_previous(PDL)
    expert = tl.load(experts_ptr + slot).to(tl.int64)
    row = expert * (2 * OUT_SIZE) + tl.minimum(output, OUT_SIZE - 1)[:, None, None]
    row_ptr = packed_ptr + row[:, :, :, None] * WIDTH
    gate = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    up = tl.zeros([ROWS, CHUNKS, 32], tl.float32)
    squares = tl.zeros([1, CHUNKS, 32, 8], tl.float32)
    for piece in tl.static_range(PIECES):
        first_number = piece * (CHUNKS * 256) + thread * 8
        number = first_number[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
        in_row = number < WIDTH
        numbers = tl.load(row_ptr + number, mask=in_row, other=0)
        up_numbers = tl.load(row_ptr + OUT_SIZE * WIDTH + number, mask=in_row, other=0)
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
        gate += multiply(
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
        up += multiply(
            up_numbers,
            x0,
            x1,
            x2,
            x3,
            scales_ptr,
            zeros_ptr,
            row + OUT_SIZE,
            first_column,
            one,
            GROUPS,
            GROUP_SIZE,
            POSITIONS,
            SYMMETRIC_ZERO,
        )
    scale = 1.0
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the results.
        total = tl.sum(tl.sum(tl.sum(squares, axis=3), axis=2), axis=1)
        scale = tl.rsqrt(total / IN_SIZE + eps)
    gate_sum = tl.sum(tl.sum(gate, axis=2), axis=1) * scale
    up_sum = tl.sum(tl.sum(up, axis=2), axis=1) * scale
    out = gate_sum / (1.0 + tl.exp(-gate_sum)) * up_sum  # silu(gate) * up
    out_ptrs = out_ptr + slot * OUT_SIZE + output
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=output < OUT_SIZE)


@triton.jit(do_not_specialize=["one"])
def _int4_down_kernel(
    x_ptr,
    order_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    experts_ptr,
    routing_weights_ptr,
    residual_ptr,
    out_ptr,
    one,
    IN_SIZE: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs: all experts' products, weighted and added up.

    Its tile of the weights is `[ROWS, SLOTS, 32, 8]`, for SLOTS experts instead of as many chunks;
    SLOTS is TOP_K, rounded up to a power of two.
    """
    launch_next(PDL)
    WIDTH: tl.constexpr = (IN_SIZE + 127) // 128 * 32  # numbers in a row of the weight
    PIECES: tl.constexpr = (WIDTH + 255) // 256
    GROUPS: tl.constexpr = (IN_SIZE + GROUP_SIZE - 1) // GROUP_SIZE
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)[None, :, None]
    is_slot = slot < TOP_K
    slot_start = tl.minimum(slot, TOP_K - 1)[:, :, :, None] * IN_SIZE
    out = tl.zeros([ROWS, SLOTS, 32], tl.float32)
    wait_for_previous(PDL)
    # One load for the experts of all slots, so that none of them waits for another.
    expert = tl.load(experts_ptr + slot, mask=is_slot, other=0).to(tl.int64)
    routing_weight = tl.load(routing_weights_ptr + slot, mask=is_slot, other=0.0)[:, :, :, None]
    row = expert * OUT_SIZE + tl.minimum(output, OUT_SIZE - 1)[:, None, None]
    row_ptr = packed_ptr + row[:, :, :, None] * WIDTH
    for piece in tl.static_range(PIECES):
        first_number = piece * 256 + tl.arange(0, 32)[None, None, :] * 8
        first_number = tl.broadcast_to(first_number, (1, SLOTS, 32))
        number = first_number[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
        in_row = is_slot[:, :, :, None] & (number < WIDTH)
        numbers = tl.load(row_ptr + number, mask=in_row, other=0)
        first_column = first_number // 32 * 128 + first_number % 32
        column = first_column[:, :, :, None] + tl.arange(0, 8)[None, None, None, :]
        x_ptrs = x_ptr + slot_start
        x0 = load_input(x_ptrs, order_ptr, column, IN_SIZE) * (routing_weight * 65536.0)
        x1 = load_input(x_ptrs, order_ptr, column + 32, IN_SIZE) * (routing_weight * 4096.0)
        x2 = load_input(x_ptrs, order_ptr, column + 64, IN_SIZE) * (routing_weight * 256.0)
        x3 = load_input(x_ptrs, order_ptr, column + 96, IN_SIZE) * (routing_weight * 16.0)
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
    result = tl.sum(tl.sum(out, axis=2), axis=1)
    is_output = output < OUT_SIZE
    if residual_ptr is not None:
        result += tl.load(residual_ptr + output, mask=is_output, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, result.to(out_ptr.dtype.element_ty), mask=is_output)


def int4_expert_gate_up_gemv(
    x: Tensor,
    weight: Int4Weight,
    routing: Routing,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    config: Int4GemvConfig | None = None,
) -> Tensor:
    """`expert_gate_up_gemv` with an INT4 weight `[num_experts * 2 * intermediate, hidden]`."""
    num_experts = len(routing.counts)
    out_size = weight.out_size // (2 * num_experts)
    top_k = routing.experts.shape[1]
    assert x.shape == (1, weight.in_size) and x.is_contiguous()
    out = torch.empty(top_k, out_size, dtype=x.dtype, device=x.device)
    if config is None:
        config = int4_gemv_config(top_k * out_size, weight.in_size, is_gated=True)
    _int4_gate_up_kernel[(triton.cdiv(out_size, config.rows), top_k)](
        x,
        weight.column_order,
        weight.packed,
        weight.scales,
        weight.zero_points,
        routing.experts,
        norm_weight,
        eps,
        out,
        ONE,
        IN_SIZE=weight.in_size,
        OUT_SIZE=out_size,
        GROUP_SIZE=weight.group_size,
        POSITIONS=positions_per_group(weight.group_size, weight.in_size),
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        ROWS=config.rows,
        CHUNKS=config.chunks,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return out


def int4_expert_down_gemv(
    x: Tensor,
    weight: Int4Weight,
    routing: Routing,
    residual: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """`expert_down_gemv` with an INT4 weight `[num_experts * hidden, intermediate]`.

    rows: outputs of a program; it overrides `int4_expert_rows`, for tests and tuning.
    """
    out_size = weight.out_size // len(routing.counts)
    top_k = routing.experts.shape[1]
    assert x.shape == (top_k, weight.in_size) and x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=x.dtype, device=x.device)
    slots = next_power_of_2(top_k)
    rows = rows or int4_expert_rows(slots)
    _int4_down_kernel[(triton.cdiv(out_size, rows),)](
        x,
        weight.column_order,
        weight.packed,
        weight.scales,
        weight.zero_points,
        routing.experts,
        routing.weights,
        residual,
        out,
        ONE,
        IN_SIZE=weight.in_size,
        OUT_SIZE=out_size,
        GROUP_SIZE=weight.group_size,
        POSITIONS=positions_per_group(weight.group_size, weight.in_size),
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        TOP_K=top_k,
        SLOTS=slots,
        ROWS=rows,
        num_warps=min(4, slots),
        **pdl_options(),
    )
    return out
