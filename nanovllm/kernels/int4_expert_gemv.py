"""The linear layers of a mixture's experts with INT4 weights, for one token: `expert_gemv` with the
arithmetic of packed_words.py.

The matrices of all experts are one INT4 weight: they lie one below the other.
"""

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
from nanovllm.kernels.gate_mul import gated
from nanovllm.kernels.int4_config import int4_expert_rows, int4_gemv_config
from nanovllm.kernels.int4_gemv import int4_tile
from nanovllm.kernels.int4_layout import Int4Weight
from nanovllm.kernels.moe_routing import Routing
from nanovllm.kernels.packed_config import PackedGemvConfig
from nanovllm.kernels.packed_input import (
    load_input,
    multiply_inputs,
    prepare_inputs,
    scale_inputs,
    sum_of_squares,
)
from nanovllm.kernels.packed_words import ONE, load_tile, multiply_words, sum_threads


@triton.jit
def _load_expert_tile(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    first_matrix_row,
    first_row,
    out_size,
    thread,
    TILE: tl.constexpr,
):
    """Load the rows of a tile of an expert's matrix: `TileWeight`.

    first_matrix_row: where that begins in the matrix of all experts; a number, or `[threads]`.
    first_row: of the tile, in the expert's matrix.
    """
    words_ptr = packed_ptr.to(tl.pointer_type(tl.int32)) + first_matrix_row * TILE.row_words
    if len(first_matrix_row.shape) > 0:
        words_ptr = words_ptr[:, None]
    grains_before = first_matrix_row * TILE.grains_per_row
    scales_ptr += grains_before
    if zeros_ptr is not None:
        zeros_ptr += grains_before
    is_tile = thread >= 0  # there is one
    return load_tile(words_ptr, scales_ptr, zeros_ptr, first_row, out_size, thread, is_tile, TILE)


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
    out_size,
    one,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes a tile of outputs of one expert."""
    ROWS: tl.constexpr = TILE.rows
    launch_next(PDL)
    slot = tl.program_id(1)
    first_row = tl.program_id(0) * ROWS
    thread = tl.arange(0, TILE.threads)
    wait_for_previous(PDL)
    first_matrix_row = tl.load(experts_ptr + slot).to(tl.int64) * (2 * out_size)
    weight = _load_expert_tile(
        packed_ptr, scales_ptr, zeros_ptr, first_matrix_row, first_row, out_size, thread, TILE
    )
    columns = load_input(x_ptr, order_ptr, thread, TILE)
    factor = 1.0
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the results.
        factor = tl.rsqrt(sum_of_squares(columns, TILE) / TILE.in_size + eps)
        norm = load_input(norm_ptr, order_ptr, thread, TILE)
        columns = multiply_inputs(columns, norm, TILE)
    products = multiply_words(weight, prepare_inputs(columns, TILE), one, TILE)
    both = sum_threads(products, 2 * ROWS) * factor
    gate, up = tl.split(tl.reshape(both, [ROWS, 2]))
    out = gated(gate, up, "silu").to(out_ptr.dtype.element_ty)
    output = first_row + tl.arange(0, ROWS)
    tl.store(out_ptr + slot * out_size + output, out, mask=output < out_size)


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
    out_size,
    one,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes a tile of outputs: all experts' products, weighted and added up.

    Each warp multiplies with another expert; SLOTS is TOP_K, rounded up to a power of two.
    """
    ROWS: tl.constexpr = TILE.rows
    launch_next(PDL)
    first_row = tl.program_id(0) * ROWS
    slot = tl.arange(0, SLOTS * 32) // 32
    thread = tl.arange(0, SLOTS * 32) % 32
    is_slot = slot < TOP_K
    slot = tl.minimum(slot, TOP_K - 1)
    wait_for_previous(PDL)
    first_matrix_row = tl.load(experts_ptr + slot).to(tl.int64) * out_size
    routing_weight = tl.load(routing_weights_ptr + slot, mask=is_slot, other=0.0)
    weight = _load_expert_tile(
        packed_ptr, scales_ptr, zeros_ptr, first_matrix_row, first_row, out_size, thread, TILE
    )
    columns = load_input((x_ptr + slot * TILE.in_size)[:, None], order_ptr, thread, TILE)
    columns = scale_inputs(columns, routing_weight[:, None], TILE)
    products = multiply_words(weight, prepare_inputs(columns, TILE), one, TILE)
    out = sum_threads(products, ROWS)
    output = first_row + tl.arange(0, ROWS)
    if residual_ptr is not None:
        ptrs = residual_ptr + output
        out += tl.load(ptrs, mask=output < out_size, other=0.0).to(tl.float32)
    tl.store(out_ptr + output, out.to(out_ptr.dtype.element_ty), mask=output < out_size)


def int4_expert_gate_up_gemv(
    x: Tensor,
    weight: Int4Weight,
    routing: Routing,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    config: PackedGemvConfig | None = None,
) -> Tensor:
    """`expert_gate_up_gemv` with an INT4 weight `[num_experts * 2 * intermediate, hidden]`.

    config: overrides `int4_gemv_config`, for tests and tuning; there is a program for each tile.
    """
    out_size = weight.out_size // (2 * len(routing.counts))
    top_k = routing.experts.shape[1]
    assert x.shape == (1, weight.in_size) and x.is_contiguous()
    out = torch.empty(top_k, out_size, dtype=x.dtype, device=x.device)
    config = config or int4_gemv_config(weight.in_size, is_gated=True)
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
        out_size,
        ONE,
        TILE=int4_tile(x, weight, 2, config),
        num_warps=config.warps,
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
    config = PackedGemvConfig(rows or int4_expert_rows(slots), words=4, warps=1, programs=1)
    _int4_down_kernel[(triton.cdiv(out_size, config.rows),)](
        x,
        weight.column_order,
        weight.packed,
        weight.scales,
        weight.zero_points,
        routing.experts,
        routing.weights,
        residual,
        out,
        out_size,
        ONE,
        TOP_K=top_k,
        SLOTS=slots,
        TILE=int4_tile(x, weight, 1, config),
        num_warps=slots,
        **pdl_options(),
    )
    return out
