"""A linear layer for a few tokens: what is left of the matrix product is reading the weight.

cuBLAS is made for tall matrices and reaches a quarter of the memory's speed here. One program takes a few rows of
the weight, whole, so that all programs together read it in one sweep. The norm before the layer and the addition
after it are folded in: they cost a few registers instead of a kernel each.
"""

import torch

from nanovllm.kernels._triton import next_power_of_2, tl, triton

MAX_TOKENS = 4  # from about here on, cuBLAS is as fast
ROWS = 4  # of the weight, a program
MAX_BLOCK = 1024  # columns at a time


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, eps, residual_ptr, out_ptr, num_tokens, out_size,
    IN_SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    in_rows, in_tokens = rows < out_size, tokens < num_tokens
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    squares = tl.zeros([TOKENS], tl.float32)
    for start in tl.static_range(0, IN_SIZE, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        in_columns = columns < IN_SIZE
        offsets = rows.to(tl.int64)[:, None] * IN_SIZE + columns[None, :]
        weight = tl.load(weight_ptr + offsets, mask=in_rows[:, None] & in_columns[None, :], other=0.0)
        x_offsets = tokens[:, None] * IN_SIZE + columns[None, :]
        x = tl.load(x_ptr + x_offsets, mask=in_tokens[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += tl.sum(x * x, axis=1)
            x *= tl.load(norm_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        acc += tl.sum(weight.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
    if HAS_NORM:  # the scale of a token is common to all its products
        acc *= tl.rsqrt(squares / IN_SIZE + eps)[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    out_offsets = tokens[:, None] * out_size + rows[None, :]
    mask = in_tokens[:, None] & in_rows[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + out_offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm_weight: torch.Tensor | None = None,
    eps: float = 0.0, residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`residual + rms_norm(x) W^T + bias`, each part but the product optional.

    Args:
        x: `[n, in]`, contiguous, n at most MAX_TOKENS.
        weight: `[out, in]`, contiguous.
        bias: `[out]`.
        norm_weight, eps: `[in]`, of the RMSNorm on x.
        residual: `[n, out]`, contiguous; overwritten with the result and returned.
    """
    num_tokens, in_size = x.shape
    out_size = weight.shape[0]
    assert num_tokens <= MAX_TOKENS and x.is_contiguous() and weight.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = residual if residual is not None else torch.empty(num_tokens, out_size, dtype=x.dtype, device=x.device)
    _gemv_kernel[(triton.cdiv(out_size, ROWS),)](
        x, weight, x if bias is None else bias, x if norm_weight is None else norm_weight, eps, out, out, num_tokens,
        out_size, IN_SIZE=in_size, TOKENS=next_power_of_2(num_tokens), ROWS=ROWS,
        BLOCK=min(MAX_BLOCK, next_power_of_2(in_size)), HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None, num_warps=8,
    )  # fmt: skip
    return out
