"""`x W^T` of many tokens, both in FP8: by the tensor cores, as partial sums (split-K).

Of hundreds of tokens a narrow weight makes fewer tiles than there are multiprocessors. As in
`split_gemm`, the inner dimension is split then, and the kernel that reads the product adds the
partial sums; cuBLAS does not split it.

A scale of a row, and that of a token, is multiplied into the finished sum. Where the weight has
scales of blocks, x has one for each token and as many columns as a block has, so that a product of
128 columns has one scale for each pair of token and block. It is multiplied into the sum outside of
the tensor cores, in float32 (DeepSeek-AI, DeepSeek-V3 Technical Report, 2024).
"""

import torch
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
from nanovllm.kernels.fp8_config import (
    MAX_BLOCK_COLUMNS,
    FP8ScaledGemmConfig,
    fp8_scaled_gemm_config,
)
from nanovllm.kernels.fp8_weight import FP8Input, FP8Weight

PREFETCH = 2  # chunks of its rows of the weight that a program asks for while it waits
GROUP = 8  # tiles of tokens that are computed together, so that the L2 cache holds what they read


@triton.jit
def _prefetch(ptrs):
    """Have the 128 bytes around each pointer come to the L2 cache. Nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0",
        "=r,l",
        [ptrs.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_tokens", "split_size", "num_x_scales"])
def _scaled_gemm_kernel(
    x_desc,
    x_scales_ptr,
    weight_desc,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    partial_sums_ptr,
    num_tokens,
    out_size,
    split_size,
    num_x_scales,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PREFETCH: tl.constexpr,
    GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of TOKENS tokens over one split of the inner dimension."""
    launch_next(PDL)
    GRAINS: tl.constexpr = IN_SIZE // COLUMN_GRAIN
    token_tiles = tl.cdiv(num_tokens, TOKENS)
    row_tiles = tl.cdiv(out_size, ROWS)
    tiles_in_group = GROUP * row_tiles
    first_tile = tl.program_id(0) // tiles_in_group * GROUP
    group_size = tl.minimum(token_tiles - first_tile, GROUP)
    place = tl.program_id(0) % tiles_in_group
    # The last tile is moved back until it ends with the last token: it overlaps the tile before it,
    # and both write the same numbers there.
    first_token = (first_tile + place % group_size) * TOKENS
    first_token = tl.maximum(tl.minimum(first_token, num_tokens - TOKENS), 0)
    first_row = place // group_size * ROWS
    split = tl.program_id(1)
    first_column = split * split_size
    end = tl.minimum(first_column + split_size, IN_SIZE)
    token = first_token + tl.arange(0, TOKENS)
    row = first_row + tl.arange(0, ROWS)
    grain_row = tl.minimum(row, out_size - 1) // ROW_GRAIN
    if GRAINS > 1 and ROW_GRAIN % ROWS == 0:  # one scale for the whole tile of the weight
        grain_row = tl.full([1], first_row // ROW_GRAIN, tl.int32)
    x_scale_ptrs = x_scales_ptr + tl.minimum(token, num_tokens - 1)
    x_scale_ptrs += first_column // COLUMN_GRAIN * num_x_scales
    scale_ptrs = scales_ptr + grain_row * GRAINS + first_column // COLUMN_GRAIN
    # No earlier kernel writes the weight.
    scale = tl.load(scale_ptrs)
    if PDL:
        column = first_column + tl.arange(0, PREFETCH) * 128
        starts = weight_ptr + tl.minimum(row, out_size - 1).to(tl.int64)[:, None] * IN_SIZE
        _prefetch(starts + tl.minimum(column, end - 1)[None, :])
    wait_for_previous(PDL)
    x_scale = tl.load(x_scale_ptrs)
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    for column in range(first_column, end, CHUNK):
        x = x_desc.load([first_token, column])
        weight = weight_desc.load([first_row, column])
        product = tl.dot(x, tl.trans(weight))
        if GRAINS == 1:
            acc += product
        else:
            # The scales of the next block are on their way while this one is multiplied.
            is_last = column + CHUNK >= end
            x_scale_ptrs += tl.where(is_last, 0, num_x_scales)
            scale_ptrs += tl.where(is_last, 0, 1)
            next_x_scale = tl.load(x_scale_ptrs)
            next_scale = tl.load(scale_ptrs)
            acc += product * (x_scale[:, None] * scale[None, :])
            x_scale = next_x_scale
            scale = next_scale
    if GRAINS == 1:
        acc *= x_scale[:, None] * scale[None, :]
    row = row[None, :]
    if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if split == 0:  # the bias is added once
            acc += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    places = (split * num_tokens + token).to(tl.int64)[:, None] * out_size + row
    tl.store(
        partial_sums_ptr + places,
        acc.to(partial_sums_ptr.dtype.element_ty),
        mask=(token[:, None] < num_tokens) & (row < out_size),
    )


def fp8_scaled_gemm(
    x: FP8Input,
    weight: FP8Weight,
    bias: Tensor | None,
    reader_sums: bool = False,
    out: Tensor | None = None,
    config: FP8ScaledGemmConfig | None = None,
) -> Tensor:
    """Return partial sums `[splits, n, out]` whose sum is `x W^T + bias`, rounded to x's dtype.

    The reference is `F.linear` of `dequantize_input` and `dequantize_fp8` in float32.

    x: in groups as large as the column grain; in is a multiple of 16. bias: `[out]`, or None.
    weight: its column grain is a whole row, or a power of two from 32 to 128.
    reader_sums: whether there may be more than one.
    out: `[n, out]`, contiguous: the memory of the product, which is one part then.
    config: overrides `fp8_scaled_gemm_config`, for tests and tuning.
    """
    num_tokens = x.num_tokens
    num_x_rows, in_size = x.values.shape
    out_size = weight.out_size
    grain = weight.column_grain
    assert x.values.is_contiguous() and x.scales.shape == (in_size // grain, num_x_rows)
    if config is None:
        config = fp8_scaled_gemm_config(
            num_tokens,
            out_size,
            in_size,
            grain,
            *device_limits(x.values.device),
            reader_sums=reader_sums and out is None,
        )
    tokens, rows = config.tokens, config.rows
    chunk = MAX_BLOCK_COLUMNS if weight.has_whole_rows else grain
    split_size = triton.cdiv(triton.cdiv(in_size, chunk), config.splits) * chunk
    splits = triton.cdiv(in_size, split_size)
    if out is None:
        shape = (splits, num_tokens, out_size)
        out = torch.empty(shape, dtype=x.dtype, device=x.values.device)
    assert out.is_contiguous() and out.numel() == splits * num_tokens * out_size
    tiles = triton.cdiv(num_tokens, tokens) * triton.cdiv(out_size, rows)
    _scaled_gemm_kernel[(tiles, splits)](
        TensorDescriptor.from_tensor(x.values, [tokens, chunk]),
        x.scales,
        TensorDescriptor.from_tensor(weight.values, [rows, chunk]),
        weight.values,
        weight.scales,
        bias,
        out,
        num_tokens,
        out_size,
        split_size,
        num_x_rows,
        IN_SIZE=in_size,
        ROW_GRAIN=weight.row_grain,
        COLUMN_GRAIN=grain,
        TOKENS=tokens,
        ROWS=rows,
        CHUNK=chunk,
        PREFETCH=PREFETCH,
        GROUP=GROUP,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return out.view(splits, num_tokens, out_size)
