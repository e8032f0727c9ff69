"""The linear layers of a mixture's experts: one GEMM for each expert that has tokens, all in one
launch.

The host does not know which experts have tokens. It launches as many programs as there can be
tiles, and each program finds its tile in the experts' counters (see moe_routing.py); those for
which there is no tile return at once. Weights of experts without tokens are not read.

A tile is TOKENS pairs of one expert times ROWS rows of its weight. As in `split_gemm`, the rows of
the weight are the rows of the tensor cores' instruction, which takes 64 of them, but as few as 8
tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    TensorDescriptor,
    device_limits,
    has_tma,
    launch_next,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_weight import FP8Weight, scale_arguments, values_of
from nanovllm.kernels.moe_routing import Routing


@dataclass(frozen=True, slots=True)
class GroupedConfig:
    """The tiles of a grouped GEMM."""

    tokens: int  # pairs in a tile, at least 16
    rows: int  # of the weight in a tile; of gate and of up each
    chunk: int  # of the inner dimension
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_tokens"])
def _grouped_gemm_kernel(
    x_ptr,
    weight_desc,
    weight_ptr,
    scales_ptr,
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
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    GATED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes one tile, over the whole inner dimension.

    GATED: x has a row for each token, the weight of an expert is its gate above its up projection,
    and `silu(gate) * up` is written, a row for each pair. Otherwise x has a row for each pair, and
    the product times the pair's routing weight is written to `out[slot, token]`.

    A weight in FP8 gets x's dtype in registers, as in `fp8_gemm`. Without scales, COLUMN_GRAIN is
    IN_SIZE.
    """
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
    pair = tl.load(bucket_ptr + place, mask=is_pair, other=0)

    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < OUT_SIZE
    MATRIX_ROWS: tl.constexpr = 2 * OUT_SIZE if GATED else OUT_SIZE
    first_row = expert * MATRIX_ROWS + tl.program_id(0) * ROWS  # of all experts' rows
    x_row = pair // TOP_K if GATED else pair
    x_row_ptr = x_ptr + x_row.to(tl.int64)[:, None] * IN_SIZE
    weight_row_ptr = weight_ptr + (expert.to(tl.int64) * MATRIX_ROWS + row[:, None]) * IN_SIZE
    if scales_ptr is not None:
        GRAINS: tl.constexpr = IN_SIZE // COLUMN_GRAIN
        grain_row = (expert * MATRIX_ROWS + tl.minimum(row, OUT_SIZE - 1)) // ROW_GRAIN
        scale_ptrs = scales_ptr + grain_row * GRAINS
        up_scale_ptrs = scale_ptrs + OUT_SIZE // ROW_GRAIN * GRAINS
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    up_acc = acc
    for first in range(0, IN_SIZE, CHUNK):
        column = first + tl.arange(0, CHUNK)[None, :]
        in_row = column < IN_SIZE
        x = tl.load(x_row_ptr + column, mask=is_pair[:, None] & in_row, other=0.0)
        if weight_desc is not None:
            weight = weight_desc.load([first_row, first])
        else:
            mask = is_row[:, None] & in_row
            weight = tl.load(weight_row_ptr + column, mask=mask, other=0.0)
        if scales_ptr is not None:
            weight = weight.to(tl.float32).to(x.dtype)
        if COLUMN_GRAIN == IN_SIZE:
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
        else:
            scale = tl.load(scale_ptrs + first // COLUMN_GRAIN)[:, None]
            acc += tl.dot(weight, tl.trans(x), input_precision="ieee") * scale
        if GATED:
            if weight_desc is not None:
                up_weight = weight_desc.load([first_row + OUT_SIZE, first])
            else:
                up_row_ptr = weight_row_ptr + OUT_SIZE * IN_SIZE
                up_weight = tl.load(up_row_ptr + column, mask=mask, other=0.0)
            if scales_ptr is not None:
                up_weight = up_weight.to(tl.float32).to(x.dtype)
            if COLUMN_GRAIN == IN_SIZE:
                up_acc = tl.dot(up_weight, tl.trans(x), up_acc, input_precision="ieee")
            else:
                up_scale = tl.load(up_scale_ptrs + first // COLUMN_GRAIN)[:, None]
                up_acc += tl.dot(up_weight, tl.trans(x), input_precision="ieee") * up_scale
    if scales_ptr is not None and COLUMN_GRAIN == IN_SIZE:
        acc *= tl.load(scale_ptrs)[:, None]
        if GATED:
            up_acc *= tl.load(up_scale_ptrs)[:, None]
    out = acc
    if GATED:
        out = acc / (1.0 + tl.exp(-acc)) * up_acc  # silu(gate) * up
        out_row = pair
    else:
        routing_weight = tl.load(routing_weights_ptr + pair, mask=is_pair, other=0.0)
        out = acc * routing_weight[None, :]
        out_row = pair % TOP_K * num_tokens + pair // TOP_K
    out_ptrs = out_ptr + out_row.to(tl.int64)[:, None] * OUT_SIZE + row[None, :]
    out = tl.trans(out).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=is_pair[:, None] & is_row[None, :])


def grouped_config(
    num_pairs: int, num_experts: int, is_gated: bool, dtype: torch.dtype, device: torch.device
) -> GroupedConfig:
    """Choose the tiles for so many pairs. An expert should rarely need two tiles as long as reading
    its weight is what takes the time: each tile reads it again.
    """
    mean = triton.cdiv(num_pairs, num_experts)  # pairs of an expert
    tokens = min(128, max(16, next_power_of_2(2 * mean - 1)))
    if dtype.itemsize > 2:  # exact products are not for tensor cores, and the tiles are larger
        tokens = min(tokens, 32)
        return GroupedConfig(tokens, rows=64, chunk=32, num_warps=4, num_stages=2)
    # Measured on an H100.
    if tokens <= 32:
        stages = 3 if is_gated else 4
        config = GroupedConfig(tokens, rows=64, chunk=128, num_warps=4, num_stages=stages)
    elif tokens == 64:
        config = GroupedConfig(tokens, rows=64, chunk=64, num_warps=4, num_stages=4)
    elif is_gated:
        config = GroupedConfig(tokens, rows=128, chunk=64, num_warps=8, num_stages=4)
    else:  # so few stages that a multiprocessor has room for two programs
        config = GroupedConfig(tokens, rows=128, chunk=64, num_warps=4, num_stages=3)
    # A GPU with less shared memory has fewer stages.
    weight_rows = 2 * config.rows if is_gated else config.rows
    stage_bytes = (weight_rows + tokens) * config.chunk * dtype.itemsize
    _, shared_memory = device_limits(device)
    max_stages = max(1, shared_memory // stage_bytes)
    return replace(config, num_stages=min(config.num_stages, max_stages))


def expert_gate_up(
    x: Tensor, weight: Tensor | FP8Weight, routing: Routing, config: GroupedConfig | None = None
) -> Tensor:
    """Return `silu(gate) * up` of each pair of token and expert, `[n * top_k, intermediate]`.

    x: `[n, hidden]`, n >= 2. weight: `[num_experts, 2 * intermediate, hidden]`, each expert's gate
    projection above its up projection, or so in FP8: a scale for each row, or blocks of 32, 64 or
    128 columns. Both are contiguous.
    """
    num_pairs = routing.experts.numel()
    out = torch.empty(num_pairs, values_of(weight).shape[1] // 2, dtype=x.dtype, device=x.device)
    launch_grouped_gemm(x, weight, routing, out, is_gated=True, config=config)
    return out


def expert_down(
    x: Tensor, weight: Tensor | FP8Weight, routing: Routing, config: GroupedConfig | None = None
) -> Tensor:
    """Return the output of each pair times its routing weight, as partial sums
    `[top_k, n, hidden]`.

    x: `[n * top_k, intermediate]`. weight: `[num_experts, hidden, intermediate]`. Both are
    contiguous.
    """
    num_tokens, top_k = routing.experts.shape
    out = torch.empty(top_k, num_tokens, values_of(weight).shape[1], dtype=x.dtype, device=x.device)
    launch_grouped_gemm(x, weight, routing, out, is_gated=False, config=config)
    return out


def launch_grouped_gemm(
    x: Tensor,
    weight: Tensor | FP8Weight,
    routing: Routing,
    out: Tensor,
    is_gated: bool,
    config: GroupedConfig | None,
) -> None:
    """Launch the kernel that `expert_gate_up` and `expert_down` share."""
    values = values_of(weight)
    num_experts, matrix_rows, in_size = values.shape
    out_size = out.shape[-1]
    num_tokens, top_k = routing.experts.shape
    num_pairs = num_tokens * top_k
    assert x.is_contiguous() and values.is_contiguous()
    if config is None:
        config = grouped_config(num_pairs, num_experts, is_gated, x.dtype, x.device)
    chunk = min(config.chunk, max(16, next_power_of_2(in_size)))
    if isinstance(weight, FP8Weight) and not weight.has_whole_rows:
        chunk = min(chunk, weight.column_grain)
        if config.rows * config.tokens > 64 * 128:
            config = replace(config, num_warps=8)  # two sums of a tile take twice the registers
    weight_desc = None
    if has_tma() and in_size * values.itemsize % 16 == 0:
        rows = values.view(num_experts * matrix_rows, in_size)
        weight_desc = TensorDescriptor.from_tensor(rows, [config.rows, chunk])
    # The most there can be: each expert with a tile of which a single place is taken, and all other
    # pairs in full tiles.
    num_used = min(num_pairs, num_experts)
    max_tiles = num_used + (num_pairs - num_used) // config.tokens
    _grouped_gemm_kernel[(triton.cdiv(out_size, config.rows), max_tiles)](
        x,
        weight_desc,
        values,
        **scale_arguments(weight),
        counts_ptr=routing.counts,
        buckets_ptr=routing.buckets,
        routing_weights_ptr=routing.weights,
        out_ptr=out,
        num_tokens=num_tokens,
        NUM_EXPERTS=num_experts,
        EXPERTS=next_power_of_2(num_experts),
        TOP_K=top_k,
        IN_SIZE=in_size,
        OUT_SIZE=out_size,
        GATED=is_gated,
        TOKENS=config.tokens,
        ROWS=config.rows,
        CHUNK=chunk,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
