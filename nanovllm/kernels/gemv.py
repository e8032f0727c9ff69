"""A linear layer for one token, where nearly all the time goes into reading the weight.

cuBLAS reaches a quarter of the memory's bandwidth here. In this kernel each program takes a few
whole rows of the weight, so that all programs together read it once from end to end. The RMSNorm
before the product and the addition after it are computed in the same kernel, where they cost a few
registers instead of a launch each.
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

ELEMENTS_PER_PROGRAM = 32768  # of the weight


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
    CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs.

    Its tile is `[ROWS, CHUNKS, 256]`, because the 32 threads of a warp then share a row and take 8
    of its elements at a time. The sum over a row so never leaves its warp, and each warp loads all
    of x for itself: there is no shared memory, and no barrier between loading x and the result.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, CHUNKS)[None, :, None] * 256 + tl.arange(0, 256)[None, None, :]
    column = tl.broadcast_to(column, (ROWS, CHUNKS, 256))
    in_row = row < out_size
    in_column = column < IN_SIZE
    offsets = row.to(tl.int64)[:, None, None] * IN_SIZE + column
    mask = in_row[:, None, None] & in_column
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if ACTIVATION is not None:
        up_weight_ptr = weight_ptr + out_size.to(tl.int64) * IN_SIZE
        up_weight = tl.load(up_weight_ptr + offsets, mask=mask, other=0.0)
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + column, mask=in_column, other=0.0)
    launch_next(PDL)
    wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
    x = tl.load(x_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    # The norm divides all of x by the same number, so it is enough to scale the result.
    scale = 1.0
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=1) / IN_SIZE + eps)
        x *= norm.to(tl.float32)
    out = tl.sum(tl.sum(weight.to(tl.float32) * x, axis=1), axis=1) * scale
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        up = tl.sum(tl.sum(up_weight.to(tl.float32) * x, axis=1), axis=1) * scale
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
    """
    in_size = x.shape[1]
    is_gated = activation is not None
    out_size = weight.shape[0] // 2 if is_gated else weight.shape[0]
    assert x.shape[0] == 1 and not (is_gated and bias is not None)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, weight, residual))
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=out_dtype or x.dtype, device=x.device)
    chunks = max(1, next_power_of_2(in_size) // 256)
    rows = ELEMENTS_PER_PROGRAM // (256 * chunks)
    if is_gated:
        rows //= 2  # each output needs two rows of the weight
    rows = max(1, rows)
    _gemv_kernel[(triton.cdiv(out_size, rows),)](
        x,
        weight,
        bias,
        norm_weight,
        eps,
        residual,
        out,
        out_size,
        IN_SIZE=in_size,
        ROWS=rows,
        CHUNKS=chunks,
        ACTIVATION=activation,
        num_warps=8,
        **pdl_options(),
    )
    return out
