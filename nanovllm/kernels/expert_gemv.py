"""The linear layers of a mixture's experts for one token, where reading the weights takes the time.

As in `gemv`, a program takes a few whole rows of a weight, here of the experts that the router has
just chosen: there is one launch for gate and up of all of them, and one for down and their sum.
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
from nanovllm.kernels.fp8_weight import FP8Weight, scale_arguments, values_of
from nanovllm.kernels.moe_routing import Routing

# Of weights, of gate and of up each. Measured for these on an H100; for down not yet.
ELEMENTS_PER_PROGRAM = 16384


@dataclass(frozen=True, slots=True)
class ExpertGemvConfig:
    """How the rows of the experts' weights are shared out."""

    rows: int  # outputs of a program
    num_warps: int


def expert_gemv_config(output_elements: int) -> ExpertGemvConfig:
    """Choose how many outputs a program computes, each of which reads so many numbers at most."""
    return ExpertGemvConfig(rows=max(1, ELEMENTS_PER_PROGRAM // output_elements), num_warps=4)


@triton.jit
def _scaled_sum(
    products,
    scales_ptr,
    row,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
):
    """Sum `[ROWS, SLOTS, COLUMNS]` over slots and columns, with the scale of each grain of an FP8
    weight: `[ROWS]`.

    row: `[ROWS, SLOTS]`, of all experts' matrices.
    """
    ROWS: tl.constexpr = products.shape[0]
    SLOTS: tl.constexpr = products.shape[1]
    COLUMNS: tl.constexpr = products.shape[2]
    WIDTH: tl.constexpr = COLUMNS if COLUMN_GRAIN == IN_SIZE else COLUMN_GRAIN
    GRAINS: tl.constexpr = IN_SIZE // COLUMN_GRAIN
    sums = tl.sum(tl.reshape(products, [ROWS, SLOTS, COLUMNS // WIDTH, WIDTH]), axis=3)
    grain = tl.minimum(tl.arange(0, COLUMNS // WIDTH), GRAINS - 1)[None, None, :]
    scale = tl.load(scales_ptr + (row // ROW_GRAIN * GRAINS)[:, :, None] + grain)
    return tl.sum(tl.sum(sums * scale, axis=2), axis=1)


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    experts_ptr,
    norm_ptr,
    eps,
    out_ptr,
    IN_SIZE: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of one expert; its tiles are those of `_gemv_kernel`."""
    launch_next(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.program_id(1)
    column = tl.arange(0, CHUNKS)[None, :, None] * 256 + tl.arange(0, 256)[None, None, :]
    column = tl.broadcast_to(column, (ROWS, CHUNKS, 256))
    in_column = column < IN_SIZE
    mask = (row < OUT_SIZE)[:, None, None] & in_column
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + column, mask=in_column, other=0.0)
    wait_for_previous(PDL)
    expert = tl.load(experts_ptr + slot).to(tl.int64)
    gate_ptr = weight_ptr + expert * (2 * OUT_SIZE * IN_SIZE)
    offsets = row[:, None, None] * IN_SIZE + column
    gate_weight = tl.load(gate_ptr + offsets, mask=mask, other=0.0)
    up_weight = tl.load(gate_ptr + OUT_SIZE * IN_SIZE + offsets, mask=mask, other=0.0)
    x = tl.load(x_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    # The norm divides all of x by the same number, so it is enough to scale the results.
    scale = 1.0
    if norm_ptr is not None:
        if scales_ptr is None:
            total = tl.sum(tl.sum(x * x, axis=1), axis=1)
        else:  # a thread has 16 columns of an FP8 weight, and so few that warps share a row
            total = tl.sum(tl.sum(x * x, axis=2), axis=1)
        scale = tl.rsqrt(total / IN_SIZE + eps)
        x *= norm.to(tl.float32)
    if scales_ptr is None:
        gate = tl.sum(tl.sum(gate_weight.to(tl.float32) * x, axis=1), axis=1) * scale
        up = tl.sum(tl.sum(up_weight.to(tl.float32) * x, axis=1), axis=1) * scale
    else:
        gate_products = tl.reshape(gate_weight.to(tl.float32) * x, [ROWS, 1, CHUNKS * 256])
        up_products = tl.reshape(up_weight.to(tl.float32) * x, [ROWS, 1, CHUNKS * 256])
        gate_row = (expert * (2 * OUT_SIZE) + tl.minimum(row, OUT_SIZE - 1))[:, None]
        up_row = gate_row + OUT_SIZE
        gate = scale * _scaled_sum(
            gate_products, scales_ptr, gate_row, IN_SIZE, ROW_GRAIN, COLUMN_GRAIN
        )
        up = scale * _scaled_sum(up_products, scales_ptr, up_row, IN_SIZE, ROW_GRAIN, COLUMN_GRAIN)
    out = gate / (1.0 + tl.exp(-gate)) * up  # silu(gate) * up
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + slot * OUT_SIZE + row, out, mask=row < OUT_SIZE)


@triton.jit
def _down_kernel(
    x_ptr,
    weight_ptr,
    scales_ptr,
    experts_ptr,
    routing_weights_ptr,
    residual_ptr,
    out_ptr,
    IN_SIZE: tl.constexpr,
    OUT_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs: all experts' products, weighted and added up.

    SLOTS and COLUMNS are TOP_K and IN_SIZE, rounded up to powers of two.
    """
    launch_next(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)[None, :, None]
    column = tl.arange(0, COLUMNS)[None, None, :]
    is_row = row < OUT_SIZE
    is_slot = slot < TOP_K
    in_row = is_slot & (column < IN_SIZE)
    wait_for_previous(PDL)
    # One load for the tiles of all experts, so that none of them waits for another.
    expert = tl.load(experts_ptr + slot, mask=is_slot, other=0).to(tl.int64)
    offsets = expert * (OUT_SIZE * IN_SIZE) + row[:, None, None] * IN_SIZE + column
    mask = is_row[:, None, None] & in_row
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + slot * IN_SIZE + column, mask=in_row, other=0.0).to(tl.float32)
    routing_weight = tl.load(routing_weights_ptr + slot, mask=is_slot, other=0.0)
    if scales_ptr is None:
        out = tl.sum(tl.sum(weight * (x * routing_weight), axis=2), axis=1)
    else:
        slot_expert = tl.reshape(expert, [1, SLOTS])
        matrix_row = slot_expert * OUT_SIZE + tl.minimum(row, OUT_SIZE - 1)[:, None]
        products = weight * (x * routing_weight)
        out = _scaled_sum(products, scales_ptr, matrix_row, IN_SIZE, ROW_GRAIN, COLUMN_GRAIN)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=is_row)


def expert_gate_up_gemv(
    x: Tensor,
    weight: Tensor | FP8Weight,
    routing: Routing,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    config: ExpertGemvConfig | None = None,
) -> Tensor:
    """`expert_gate_up` for one token: x `[1, hidden]`, the result `[top_k, intermediate]`.

    norm_weight, eps: `[hidden]` and the epsilon of an RMSNorm that x goes through first, or None.
    """
    values = values_of(weight)
    _, matrix_rows, in_size = values.shape
    out_size = matrix_rows // 2
    top_k = routing.experts.shape[1]
    assert x.shape == (1, in_size) and x.is_contiguous() and values.is_contiguous()
    out = torch.empty(top_k, out_size, dtype=x.dtype, device=x.device)
    chunks = max(1, next_power_of_2(in_size) // 256)
    if config is None:
        config = expert_gemv_config(chunks * 256)
    _gate_up_kernel[(triton.cdiv(out_size, config.rows), top_k)](
        x,
        values,
        **scale_arguments(weight),
        experts_ptr=routing.experts,
        norm_ptr=norm_weight,
        eps=eps,
        out_ptr=out,
        IN_SIZE=in_size,
        OUT_SIZE=out_size,
        ROWS=config.rows,
        CHUNKS=chunks,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return out


def expert_down_gemv(
    x: Tensor,
    weight: Tensor | FP8Weight,
    routing: Routing,
    residual: Tensor | None = None,
    config: ExpertGemvConfig | None = None,
) -> Tensor:
    """Return the experts' outputs times their routing weights, added up, `[1, hidden]`.

    x: `[top_k, intermediate]`. weight: `[num_experts, hidden, intermediate]`, or so in FP8.
    residual: `[1, hidden]`; added, overwritten with the result, and returned.
    """
    values = values_of(weight)
    _, out_size, in_size = values.shape
    top_k = routing.experts.shape[1]
    assert x.shape == (top_k, in_size) and x.is_contiguous() and values.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=x.dtype, device=x.device)
    slots = next_power_of_2(top_k)
    columns = next_power_of_2(in_size)
    if config is None:
        config = expert_gemv_config(slots * columns)
    _down_kernel[(triton.cdiv(out_size, config.rows),)](
        x,
        values,
        **scale_arguments(weight),
        experts_ptr=routing.experts,
        routing_weights_ptr=routing.weights,
        residual_ptr=residual,
        out_ptr=out,
        IN_SIZE=in_size,
        OUT_SIZE=out_size,
        TOP_K=top_k,
        ROWS=config.rows,
        SLOTS=slots,
        COLUMNS=columns,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return out
