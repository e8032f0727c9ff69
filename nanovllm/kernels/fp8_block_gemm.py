"""`x W^T` of many tokens, both in FP8: by the tensor cores, with a scale for each block of W.

x has a scale for each token and as many columns as a block has, so that a product of 128 columns
has one scale for each pair of token and block; it is multiplied into the sum outside of the tensor
cores, in float32 (DeepSeek-AI, DeepSeek-V3 Technical Report, 2024). A weight that has a scale for
each row does not need this: `torch._scaled_mm` serves it.
"""

from torch import Tensor

from nanovllm.kernels._triton import (
    TensorDescriptor,
    device_limits,
    launch_next,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_config import FP8BlockGemmConfig, fp8_block_gemm_config
from nanovllm.kernels.fp8_weight import FP8Input, FP8Weight

GROUP = 8  # tiles of tokens that are computed together, so that the L2 cache holds what they read


@triton.jit(do_not_specialize=["num_tokens"])
def _block_gemm_kernel(
    x_desc,
    x_scales_ptr,
    weight_desc,
    scales_ptr,
    bias_ptr,
    out_ptr,
    num_tokens,
    out_size,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of TOKENS tokens."""
    launch_next(PDL)
    GRAINS: tl.constexpr = IN_SIZE // COLUMN_GRAIN
    token_tiles = tl.cdiv(num_tokens, TOKENS)
    row_tiles = tl.cdiv(out_size, ROWS)
    tiles_in_group = GROUP * row_tiles
    first_tile = tl.program_id(0) // tiles_in_group * GROUP
    group_size = tl.minimum(token_tiles - first_tile, GROUP)
    place = tl.program_id(0) % tiles_in_group
    first_token = (first_tile + place % group_size) * TOKENS
    first_row = place // group_size * ROWS
    token = first_token + tl.arange(0, TOKENS)
    row = first_row + tl.arange(0, ROWS)
    grain_row = tl.minimum(row, out_size - 1) // ROW_GRAIN
    if ROW_GRAIN % ROWS == 0:  # one scale for the whole tile of the weight
        grain_row = tl.full([1], first_row // ROW_GRAIN, tl.int32)
    wait_for_previous(PDL)
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for grain in range(GRAINS):
        x = x_desc.load([first_token, grain * COLUMN_GRAIN])
        weight = weight_desc.load([first_row, grain * COLUMN_GRAIN])
        x_ptrs = x_scales_ptr + grain * num_tokens + token
        x_scale = tl.load(x_ptrs, mask=token < num_tokens, other=0.0)
        scale = tl.load(scales_ptr + grain_row * GRAINS + grain)
        acc += tl.dot(x, tl.trans(weight)) * (x_scale[:, None] * scale[None, :])
    row = row[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + token.to(tl.int64)[:, None] * out_size + row,
        acc.to(out_ptr.dtype.element_ty),
        mask=(token[:, None] < num_tokens) & (row < out_size),
    )


def fp8_block_gemm(
    x: FP8Input,
    weight: FP8Weight,
    bias: Tensor | None,
    out: Tensor,
    config: FP8BlockGemmConfig | None = None,
) -> Tensor:
    """Write `x W^T + bias` to `out` `[n, out]`, which is contiguous, and return it.

    The reference is `F.linear` of `dequantize_input` and `dequantize_fp8` in float32.

    x: in groups as large as the column grain. weight: its column grain is a power of two from 32 on
        of which in is a multiple.
    config: overrides `fp8_block_gemm_config`, for tests and tuning.
    """
    num_tokens, in_size = x.values.shape
    grain = weight.column_grain
    assert out.is_contiguous() and out.shape == (num_tokens, weight.out_size)
    assert x.scales.shape == (in_size // grain, num_tokens)
    if config is None:
        limits = device_limits(out.device)
        config = fp8_block_gemm_config(num_tokens, weight.out_size, *limits)
    row_tiles = triton.cdiv(weight.out_size, config.rows)
    _block_gemm_kernel[(triton.cdiv(num_tokens, config.tokens) * row_tiles,)](
        TensorDescriptor.from_tensor(x.values, [config.tokens, grain]),
        x.scales,
        TensorDescriptor.from_tensor(weight.values, [config.rows, grain]),
        weight.scales,
        bias,
        out,
        num_tokens,
        weight.out_size,
        IN_SIZE=in_size,
        ROW_GRAIN=weight.row_grain,
        COLUMN_GRAIN=grain,
        TOKENS=config.tokens,
        ROWS=config.rows,
        GROUP=GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return out
