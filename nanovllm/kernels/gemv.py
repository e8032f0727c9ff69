"""A linear layer for a few tokens: what is left of the matrix product is reading the weight.

cuBLAS reaches a quarter of the memory's speed here. One program takes a few whole rows of the weight, so that all
together read it in one sweep. The norm before and the addition after cost a few registers instead of a kernel each.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import launch_next, next_power_of_2, pdl_options, tl, triton, wait_for_previous

MAX_TOKENS = 2  # with more, cuBLAS (or skinny_gemm) is as fast
TILE = 16384  # elements of the weight that a program takes


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, eps, residual_ptr, out_ptr, num_tokens, out_size, IN_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, column = tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK)[None, :]
    in_row, in_token, in_column = row < out_size, token < num_tokens, column < IN_SIZE
    offsets, mask = row.to(tl.int64)[:, None] * IN_SIZE + column, in_row[:, None] & in_column
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0)
    if GATED:
        up_weight = tl.load(weight_ptr + out_size.to(tl.int64) * IN_SIZE + offsets, mask=mask, other=0.0)
    launch_next(PDL)
    wait_for_previous(PDL)  # the weight above does not depend on the kernel before; x does
    x = tl.load(x_ptr + token * IN_SIZE + column, mask=in_token & in_column, other=0.0).to(tl.float32)
    scale = tl.full([TOKENS, 1], 1.0, tl.float32)
    if norm_ptr is not None:  # the scale of a token is common to all its products
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / IN_SIZE + eps)[:, None]
        x *= tl.load(norm_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    out = tl.sum(weight.to(tl.float32)[None, :, :] * x[:, None, :], axis=2) * scale  # [TOKENS, ROWS]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=in_row, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = tl.sum(up_weight.to(tl.float32)[None, :, :] * x[:, None, :], axis=2) * scale
        out = out / (1.0 + tl.exp(-out)) * up
    offsets, mask = token * out_size + row[None, :], in_token & in_row[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


def gemv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, norm_weight: Tensor | None = None, eps: float = 0.0,
    residual: Tensor | None = None, gated: bool = False,
) -> Tensor:  # fmt: skip
    """`residual + rms_norm(x) W^T + bias`, each part but the product optional.

    x `[n, in]` with a small n, weight `[out, in]`, bias `[out]`, norm_weight `[in]`, residual `[n, out]`, which is
    overwritten with the result; all contiguous. gated, and no bias: weight is `[2 * out, in]`, a gate above an up
    projection, and `silu(gate) * up` takes the place of the product.
    """
    num_tokens, in_size = x.shape
    out_size = weight.shape[0] // (2 if gated else 1)
    assert not (gated and bias is not None)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, weight, residual))
    out = residual if residual is not None else torch.empty(num_tokens, out_size, dtype=x.dtype, device=x.device)
    block = next_power_of_2(in_size)
    rows = max(1, TILE // block // (2 if gated else 1))
    _gemv_kernel[(triton.cdiv(out_size, rows),)](
        x, weight, bias, norm_weight, eps, residual, out, num_tokens, out_size, IN_SIZE=in_size,
        TOKENS=next_power_of_2(num_tokens), ROWS=rows, BLOCK=block, GATED=gated, num_warps=8, **pdl_options(),
    )  # fmt: skip
    return out
