"""A linear layer for a few tokens: what is left of the matrix product is reading the weight.

cuBLAS reaches a quarter of the memory's speed here. One program takes a few whole rows of the weight, so that all
together read it in one sweep. The norm before and the addition after cost a few registers instead of a kernel each.
"""

import torch

from nanovllm.kernels._triton import launch_next, next_power_of_2, pdl_options, tl, triton, wait_for_previous

MAX_TOKENS = 2  # with more, cuBLAS is as fast
TILE = 16384  # elements of the weight that a program takes


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_ptr, eps, residual_ptr, out_ptr, num_tokens, out_size,
    IN_SIZE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens, columns = tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    in_rows, in_tokens, in_columns = rows < out_size, tokens < num_tokens, columns < IN_SIZE
    offsets = rows.to(tl.int64)[:, None] * IN_SIZE + columns[None, :]
    weight_mask = in_rows[:, None] & in_columns[None, :]
    weight = tl.load(weight_ptr + offsets, mask=weight_mask, other=0.0)
    if GATED:
        up_weight = tl.load(weight_ptr + out_size.to(tl.int64) * IN_SIZE + offsets, mask=weight_mask, other=0.0)
    launch_next(PDL)
    wait_for_previous(PDL)  # the weight above does not depend on the kernel before; x does
    x_offsets = tokens[:, None] * IN_SIZE + columns[None, :]
    x = tl.load(x_ptr + x_offsets, mask=in_tokens[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    if HAS_NORM:  # the scale of a token is common to all its products
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / IN_SIZE + eps)
        x *= tl.load(norm_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    acc = tl.sum(weight.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)  # [TOKENS, ROWS]
    if HAS_NORM:
        acc *= scale[:, None]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows, mask=in_rows, other=0.0).to(tl.float32)[None, :]
    if GATED:
        up = tl.sum(up_weight.to(tl.float32)[None, :, :] * x[:, None, :], axis=2)
        if HAS_NORM:
            up *= scale[:, None]
        acc = acc / (1.0 + tl.exp(-acc)) * up
    out_offsets = tokens[:, None] * out_size + rows[None, :]
    mask = in_tokens[:, None] & in_rows[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + out_offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def gemv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, norm_weight: torch.Tensor | None = None,
    eps: float = 0.0, residual: torch.Tensor | None = None, gated: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`residual + rms_norm(x) W^T + bias`, each part but the product optional.

    Args:
        x, weight, bias: `[n, in]` with a small n, `[out, in]`, `[out]`; contiguous.
        norm_weight, eps: `[in]`, of the RMSNorm on x.
        residual: `[n, out]`, contiguous; overwritten with the result and returned.
        gated: weight is `[2 * out, in]`, a gate above an up projection; the result is `silu(gate) * up`. No bias.
    """
    num_tokens, in_size = x.shape
    out_size = weight.shape[0] // (2 if gated else 1)
    assert not (gated and bias is not None)
    assert all(tensor is None or tensor.is_contiguous() for tensor in (x, weight, residual))
    out = residual if residual is not None else torch.empty(num_tokens, out_size, dtype=x.dtype, device=x.device)
    block = next_power_of_2(in_size)
    rows = max(1, TILE // block // (2 if gated else 1))
    _gemv_kernel[(triton.cdiv(out_size, rows),)](
        x, weight, x if bias is None else bias, x if norm_weight is None else norm_weight, eps, out, out, num_tokens,
        out_size, IN_SIZE=in_size, TOKENS=next_power_of_2(num_tokens), ROWS=rows, BLOCK=block,
        HAS_BIAS=bias is not None, HAS_NORM=norm_weight is not None, HAS_RESIDUAL=residual is not None, GATED=gated,
        num_warps=8, **pdl_options(),
    )  # fmt: skip
    return out
