"""A linear layer for one token: what is left of the matrix product is reading the weight.

cuBLAS reaches a quarter of the memory's speed here. One program takes a few whole rows of the weight, so that all
together read it in one sweep. The norm before and the addition after cost a few registers instead of a kernel each.
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

TILE = 32768  # elements of the weight that a program takes


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
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    # [ROWS, PARTS, 256]: the 32 threads of a warp share a row, 8 elements each at a time. So its sum never leaves the
    # warp, and each warp loads all of x for itself: no shared memory, no barrier between x and the result.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PARTS)[None, :, None] * 256 + tl.arange(0, 256)[None, None, :]
    column = tl.broadcast_to(column, (ROWS, PARTS, 256))
    in_row, in_column = row < out_size, column < IN_SIZE
    offsets, mask = (
        row.to(tl.int64)[:, None, None] * IN_SIZE + column,
        in_row[:, None, None] & in_column,
    )
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if GATED:
        up_weight = tl.load(
            weight_ptr + out_size.to(tl.int64) * IN_SIZE + offsets, mask=mask, other=0.0
        )
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + column, mask=in_column, other=0.0)
    launch_next(PDL)
    wait_for_previous(PDL)  # the weights above do not depend on the kernel before; x does
    x = tl.load(x_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    scale = 1.0
    if norm_ptr is not None:  # the scale is common to all products
        scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=1) / IN_SIZE + eps)
        x *= norm.to(tl.float32)
    out = tl.sum(tl.sum(weight.to(tl.float32) * x, axis=1), axis=1) * scale
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=in_row, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(tl.sum(up_weight.to(tl.float32) * x, axis=1), axis=1) * scale
        out = out / (1.0 + tl.exp(-out)) * up
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
    gated: bool = False,
) -> Tensor:
    """`residual + rms_norm(x) W^T + bias`, each part but the product optional.

    x `[1, in]`, weight `[out, in]`, bias `[out]`, norm_weight `[in]`, residual `[1, out]`, which is overwritten with
    the result; all contiguous. gated, and no bias: weight is `[2 * out, in]`, a gate above an up projection, and
    `silu(gate) * up` takes the place of the product.
    """
    in_size, out_size = x.shape[1], weight.shape[0] // (2 if gated else 1)
    assert x.shape[0] == 1 and not (gated and bias is not None)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, weight, residual))
    out = (
        residual
        if residual is not None
        else torch.empty(1, out_size, dtype=x.dtype, device=x.device)
    )
    parts = max(1, next_power_of_2(in_size) // 256)
    rows = max(1, TILE // (256 * parts) // (2 if gated else 1))
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
        PARTS=parts,
        GATED=gated,
        num_warps=8,
        **pdl_options(),
    )
    return out
