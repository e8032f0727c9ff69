"""The linear layers of a mixture's experts with INT4 weights, for several tokens: `grouped_gemm`
with the arithmetic of int4_gemm.py.

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
from nanovllm.kernels.int4_config import Int4ExpertConfig, int4_expert_config
from nanovllm.kernels.int4_gemm import dequantization, take_out
from nanovllm.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, positions_per_group
from nanovllm.kernels.moe_routing import Routing


@triton.jit(do_not_specialize=["num_tokens"])
def _int4_grouped_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    counts_ptr,
    buckets_ptr,
    routing_weights_ptr,
    out_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    IN_SIZE: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    GATED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes one tile, over the whole inner dimension; see `_grouped_gemm_kernel`."""
    launch_next(PDL)
    tile = tl.program_id(1)
    wait_for_previous(PDL)
    # Expert after expert, each has ceil(count / TOKENS) tiles. Which expert's is this one?
    ids = tl.arange(0, EXPERTS)
    counts = tl.load(counts_ptr + ids, mask=ids < NUM_EXPERTS, other=0)
    ends = tl.cumsum((counts + TOKENS - 1) // TOKENS, axis=0)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    if expert >= NUM_EXPERTS:
        return  # there are fewer tiles than there could be
    first_tile = tl.max(tl.where(ends <= tile, ends, 0), axis=0)
    place = (tile - first_tile) * TOKENS + tl.arange(0, TOKENS)
    is_pair = place < tl.load(counts_ptr + expert)
    bucket_ptr = buckets_ptr + expert.to(tl.int64) * num_tokens
    pair = tl.load(bucket_ptr + place, mask=is_pair, other=0)  # else the first one, again

    BLOCKS: tl.constexpr = (IN_SIZE + 127) // 128
    GROUPS: tl.constexpr = (IN_SIZE + GROUP_SIZE - 1) // GROUP_SIZE
    MATRIX_ROWS: tl.constexpr = 2 * OUT_SIZE if GATED else OUT_SIZE
    dtype = x_ptr.dtype.element_ty
    output = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    read_row = expert.to(tl.int64) * MATRIX_ROWS + tl.minimum(output, OUT_SIZE - 1)
    stripe = tl.arange(0, 32)[None, :]
    number_ptrs = packed_ptr + read_row[:, None] * (BLOCKS * 32) + stripe
    x_row = pair // TOP_K if GATED else pair
    x_ptrs = x_ptr + x_row.to(tl.int64)[:, None] * IN_SIZE + stripe
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    up_acc = acc
    minus_zero = tl.full([ROWS, 32], -OFFSET - SYMMETRIC_ZERO, dtype)
    up_minus_zero = minus_zero
    for block in range(0, BLOCKS):
        numbers = tl.load(number_ptrs + block * 32)
        if GATED:
            up_numbers = tl.load(number_ptrs + OUT_SIZE * BLOCKS * 32 + block * 32)
        for position in tl.static_range(4):
            column = block * 128 + position * 32
            if position % POSITIONS == 0:
                parameter = read_row * GROUPS + tl.minimum(column // GROUP_SIZE, GROUPS - 1)
                scale = tl.load(scales_ptr + parameter).to(tl.float32)
                group_sum = tl.zeros([ROWS, TOKENS], tl.float32)
                if GATED:
                    up_parameter = parameter + OUT_SIZE * GROUPS
                    up_scale = tl.load(scales_ptr + up_parameter).to(tl.float32)
                    up_group_sum = group_sum
                if zeros_ptr is not None:
                    zero = tl.load(zeros_ptr + parameter).to(tl.float32)
                    minus_zero = tl.broadcast_to((-OFFSET - zero).to(dtype)[:, None], (ROWS, 32))
                    if GATED:
                        up_zero = tl.load(zeros_ptr + up_parameter).to(tl.float32)
                        up_zero = (-OFFSET - up_zero).to(dtype)
                        up_minus_zero = tl.broadcast_to(up_zero[:, None], (ROWS, 32))
            if IN_SIZE % 128 == 0:
                x = tl.load(x_ptrs + column)
            else:
                x = tl.load(x_ptrs + column, mask=column + stripe < IN_SIZE, other=0.0)
            x = tl.trans(x)
            weight = take_out(numbers, minus_zero, position, ASSEMBLY)
            group_sum = tl.dot(weight, x, group_sum, input_precision="ieee")
            if GATED:
                up_weight = take_out(up_numbers, up_minus_zero, position, ASSEMBLY)
                up_group_sum = tl.dot(up_weight, x, up_group_sum, input_precision="ieee")
            if (position + 1) % POSITIONS == 0:
                acc += group_sum * scale[:, None]
                if GATED:
                    up_acc += up_group_sum * up_scale[:, None]
    out = acc
    if GATED:
        out = acc / (1.0 + tl.exp(-acc)) * up_acc  # silu(gate) * up
        out_row = pair
    else:
        routing_weight = tl.load(routing_weights_ptr + pair, mask=is_pair, other=0.0)
        out = acc * routing_weight[None, :]
        out_row = pair % TOP_K * num_tokens + pair // TOP_K
    out_ptrs = out_ptr + out_row.to(tl.int64)[:, None] * OUT_SIZE + output[None, :]
    out = tl.trans(out).to(dtype)
    tl.store(out_ptrs, out, mask=is_pair[:, None] & (output < OUT_SIZE)[None, :])


def int4_expert_gate_up(
    x: Tensor, weight: Int4Weight, routing: Routing, config: Int4ExpertConfig | None = None
) -> Tensor:
    """`expert_gate_up` with an INT4 weight `[num_experts * 2 * intermediate, hidden]`."""
    num_pairs = routing.experts.numel()
    out_size = weight.out_size // (2 * len(routing.counts))
    out = torch.empty(num_pairs, out_size, dtype=x.dtype, device=x.device)
    _launch_grouped(x, weight, routing, out, is_gated=True, config=config)
    return out


def int4_expert_down(
    x: Tensor, weight: Int4Weight, routing: Routing, config: Int4ExpertConfig | None = None
) -> Tensor:
    """`expert_down` with an INT4 weight `[num_experts * hidden, intermediate]`."""
    num_tokens, top_k = routing.experts.shape
    out_size = weight.out_size // len(routing.counts)
    out = torch.empty(top_k, num_tokens, out_size, dtype=x.dtype, device=x.device)
    _launch_grouped(x, weight, routing, out, is_gated=False, config=config)
    return out


def _launch_grouped(
    x: Tensor,
    weight: Int4Weight,
    routing: Routing,
    out: Tensor,
    is_gated: bool,
    config: Int4ExpertConfig | None,
) -> None:
    num_experts = len(routing.counts)
    num_tokens, top_k = routing.experts.shape
    num_pairs = num_tokens * top_k
    assert x.is_contiguous() and weight.packed.is_contiguous()
    if weight.column_order is not None:
        x = x[:, weight.column_order]
    if config is None:
        config = int4_expert_config(num_pairs, num_experts, x.dtype.itemsize)
    # The most there can be: each expert with a tile of which a single place is taken, and all other
    # pairs in full tiles.
    num_used = min(num_pairs, num_experts)
    max_tiles = num_used + (num_pairs - num_used) // config.tokens
    out_size = out.shape[-1]
    how = dequantization(x)
    _int4_grouped_kernel[(triton.cdiv(out_size, config.rows), max_tiles)](
        x,
        weight.packed,
        weight.scales,
        weight.zero_points,
        routing.counts,
        routing.buckets,
        routing.weights,
        out,
        num_tokens,
        NUM_EXPERTS=num_experts,
        EXPERTS=next_power_of_2(num_experts),
        TOP_K=top_k,
        IN_SIZE=weight.in_size,
        OUT_SIZE=out_size,
        GATED=is_gated,
        GROUP_SIZE=weight.group_size,
        POSITIONS=positions_per_group(weight.group_size, weight.in_size),
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        TOKENS=config.tokens,
        ROWS=config.rows,
        OFFSET=how.offset,
        ASSEMBLY=how.assembly,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
