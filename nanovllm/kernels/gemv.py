"""A linear layer for one token, where nearly all the time goes into reading the weight.

cuBLAS reaches a quarter of the memory's bandwidth here. In this kernel each program takes a few
whole rows of the weight, so that all programs together read it once from end to end. The RMSNorm
before the product and the addition after it are computed in the same kernel, where they cost a few
registers instead of a launch each.
"""

from typing import NamedTuple

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


class GemvConfig(NamedTuple):
    """How `gemv` divides the work; the result does not depend on it."""

    rows: int  # of the weight, that a program takes; of the gate and of up as many each
    width: int  # columns that are multiplied at a time, a power of two and at least 256
    num_warps: int


def gemv_config(in_size: int, is_gated: bool) -> GemvConfig:
    """Return the configuration that was measured to be fastest on an H100.

    What counts is how many bytes a thread has on their way, and that none of its loads are masked:
    a row of 12,288 elements is 6 pieces of 2,048, but three quarters of a tile of 16,384.
    """
    divisor = in_size & -in_size  # the largest power of two that divides it
    whole_row = max(256, next_power_of_2(in_size))
    if in_size >= 4096:
        if divisor >= 512:
            width = min(divisor, 2048)
            return GemvConfig(rows=8192 // width, width=width, num_warps=4)
        return GemvConfig(rows=max(1, 32768 // whole_row), width=whole_row, num_warps=4)
    if is_gated and divisor >= 512:
        return GemvConfig(rows=8, width=512, num_warps=4)
    rows = 32768 // whole_row
    if is_gated:
        rows //= 2  # each output needs two rows of the weight
    return GemvConfig(rows, whole_row, num_warps=8)


@triton.jit
def _load_weight(ptrs, mask):
    """Load what a step reads once. The L2 cache had better keep K and V, which may fit in it."""
    return tl.load(ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    residual_ptr,
    out_ptr,
    out_size,
    IN_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs, from WIDTH columns at a time.

    Its tile is `[ROWS, WIDTH / 256, 256]`, because the 32 threads of a warp then share a row and
    take 8 of its elements at a time. The sum over a row so never leaves its warp, and each warp
    loads all of x for itself: there is no shared memory, and no barrier between loading x and the
    result.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_row = row < out_size
    CHUNKS: tl.constexpr = WIDTH // 256
    PIECES: tl.constexpr = (IN_SIZE + WIDTH - 1) // WIDTH
    tile_column = tl.arange(0, CHUNKS)[None, :, None] * 256 + tl.arange(0, 256)[None, None, :]
    tile_column = tl.broadcast_to(tile_column, (ROWS, CHUNKS, 256))
    row_start = row.to(tl.int64)[:, None, None] * IN_SIZE
    up_weight_ptr = weight_ptr + out_size.to(tl.int64) * IN_SIZE
    # The first piece is loaded before the wait.
    mask = in_row[:, None, None] & (tile_column < IN_SIZE)
    weight = _load_weight(weight_ptr + row_start + tile_column, mask)
    if ACTIVATION is not None:
        up_weight = _load_weight(up_weight_ptr + row_start + tile_column, mask)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + tile_column, mask=tile_column < IN_SIZE, other=0.0)
    launch_next(PDL)
    wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
    out = tl.zeros([ROWS], tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    for piece in tl.static_range(PIECES):
        column = piece * WIDTH + tile_column
        in_column = column < IN_SIZE
        if piece > 0:
            mask = in_row[:, None, None] & in_column
            weight = _load_weight(weight_ptr + row_start + column, mask)
            if ACTIVATION is not None:
                up_weight = _load_weight(up_weight_ptr + row_start + column, mask)
            if norm_ptr is not None:
                norm = tl.load(norm_ptr + column, mask=in_column, other=0.0)
        x = tl.load(x_ptr + column, mask=in_column, other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += tl.sum(tl.sum(x * x, axis=1), axis=1)
            x *= norm.to(tl.float32)
        out += tl.sum(tl.sum(weight.to(tl.float32) * x, axis=1), axis=1)
        if ACTIVATION is not None:
            up += tl.sum(tl.sum(up_weight.to(tl.float32) * x, axis=1), axis=1)
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the result.
        scale = tl.rsqrt(squares / IN_SIZE + eps)
        out *= scale
        up *= scale
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        out = gated(out, up, ACTIVATION)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, out.to(out_ptr.dtype.element_ty), mask=in_row)


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    config: GemvConfig | None = None,
) -> Tensor:
    """Return `residual + rms_norm(x) W^T + bias`, `[1, out]`; all but the product is optional.

    The reference is `F.linear` with `rms_norm_torch` before it and the addition, or
    `gate_mul_torch`, after it.

    x: `[1, in]`. weight: `[out, in]`. bias: `[out]`. All tensors are contiguous and of one dtype,
        but for norm_weight, which may be float32.
    norm_weight, eps: `[in]` and the epsilon of the RMSNorm; None: x is taken as it is.
    residual: `[1, out]`; it is overwritten with the result, and returned.
    activation: "silu" or "gelu_tanh": the weight is `[2 * out, in]`, the gate projection above the
        up projection, and `act(gate) * up` takes the place of the product; without bias.
    out_dtype: of the result, if there is no residual; by default x's.
    config: overrides `gemv_config`, for tests and tuning.
    """
    in_size = x.shape[1]
    is_gated = activation is not None
    out_size = weight.shape[0] // 2 if is_gated else weight.shape[0]
    assert x.shape[0] == 1 and not (is_gated and bias is not None)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, weight, residual))
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=out_dtype or x.dtype, device=x.device)
    config = config or gemv_config(in_size, is_gated)
    _gemv_kernel[(triton.cdiv(out_size, config.rows),)](
        x,
        weight,
        bias,
        norm_weight,
        eps,
        residual,
        out,
        out_size,
        IN_SIZE=in_size,
        ROWS=config.rows,
        WIDTH=config.width,
        ACTIVATION=activation,
        num_warps=config.num_warps,
        **pdl_options(),
    )
    return out
