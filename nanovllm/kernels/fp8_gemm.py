"""`x W^T` of an FP8 weight for the few tokens of a decode step, as partial sums (split-K).

As in `split_gemm`, the inner dimension is split until every multiprocessor has some of the work,
and the kernel that reads the product adds the partial sums. The weight comes to shared memory in
FP8; on its way to the tensor cores it goes through registers, where it gets x's dtype, which has
every FP8 number. The scale of a row is multiplied into its finished sum, that of a block into the
sum over a chunk of columns.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    TensorDescriptor,
    device_limits,
    launch_next,
    pdl_options,
    readable_rows,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_config import FP8GemmConfig, fp8_gemm_config
from nanovllm.kernels.fp8_weight import FP8Weight


@triton.jit(do_not_specialize=["num_tokens", "split_size"])
def _fp8_gemm_kernel(
    x_desc,
    weight_desc,
    scales_ptr,
    bias_ptr,
    partial_sums_ptr,
    num_tokens,
    out_size,
    split_size,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of TOKENS tokens over one split of the inner dimension."""
    launch_next(PDL)
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    # The last tile is moved back until it ends with the last token: it overlaps the tile before it,
    # and both write the same numbers there.
    first_token = tl.program_id(2) * TOKENS
    first_token = tl.maximum(tl.minimum(first_token, num_tokens - TOKENS), 0)
    row = first_row + tl.arange(0, ROWS)
    grain_row = tl.minimum(row, out_size - 1) // ROW_GRAIN
    if COLUMN_GRAIN != IN_SIZE and ROW_GRAIN % ROWS == 0:  # one scale for the whole tile
        grain_row = tl.full([1], first_row // ROW_GRAIN, tl.int32)
    scale_ptrs = scales_ptr + grain_row * (IN_SIZE // COLUMN_GRAIN)
    first_column = split * split_size
    end = tl.minimum(first_column + split_size, IN_SIZE)
    wait_for_previous(PDL)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for column in range(first_column, end, CHUNK):
        weight = weight_desc.load([first_row, column])
        x = x_desc.load([first_token, column])
        # By float32, since the GPU's instruction from FP8 gives fp16, and the one from that to
        # bf16 is eight times slower than these.
        weight = weight.to(tl.float32).to(x.dtype)
        if COLUMN_GRAIN == IN_SIZE:
            acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
        else:
            scale = tl.load(scale_ptrs + column // COLUMN_GRAIN)
            acc += tl.dot(weight, tl.trans(x), input_precision="ieee") * scale[:, None]
    if COLUMN_GRAIN == IN_SIZE:
        acc *= tl.load(scale_ptrs)[:, None]
    token = first_token + tl.arange(0, TOKENS)[:, None]
    row = row[None, :]
    out = tl.trans(acc)
    if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if split == 0:  # the bias is added once
            out += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    offsets = (split * num_tokens + token) * out_size + row
    tl.store(
        partial_sums_ptr + offsets,
        out.to(partial_sums_ptr.dtype.element_ty),
        mask=(token < num_tokens) & (row < out_size),
    )


def fp8_gemm(
    x: Tensor,
    weight: FP8Weight,
    bias: Tensor | None = None,
    reader_sums: bool = True,
    config: FP8GemmConfig | None = None,
) -> Tensor:
    """Return partial sums `[splits, n, out]` whose sum is `x W^T + bias`, rounded to x's dtype.

    The reference is `F.linear` with the weight of `dequantize_fp8`.

    x: `[n, in]`, contiguous; fastest in memory from `padded_empty`. bias: `[out]`, or None.
    weight: in is a multiple of 16, and its column grain of 32, or a whole row.
    reader_sums: whether there may be more than one.
    config: overrides `fp8_gemm_config`, for tests and tuning.
    """
    num_tokens, in_size = x.shape
    out_size = weight.out_size
    assert x.is_contiguous() and weight.values.is_contiguous() and weight.scales.is_contiguous()
    if config is None:
        num_multiprocessors, _ = device_limits(x.device)
        config = fp8_gemm_config(
            num_tokens, out_size, in_size, weight.column_grain, num_multiprocessors, reader_sums
        )
    assert weight.has_whole_rows or weight.column_grain % config.chunk == 0
    tokens, rows, chunk = config.tokens, config.rows, config.chunk
    split_size = triton.cdiv(triton.cdiv(in_size, chunk), config.splits) * chunk
    splits = triton.cdiv(in_size, split_size)
    partial_sums = torch.empty(splits, num_tokens, out_size, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_size, rows), splits, triton.cdiv(num_tokens, tokens))
    x_shape = [readable_rows(x, tokens), in_size]
    _fp8_gemm_kernel[grid](
        TensorDescriptor(x, x_shape, [in_size, 1], [tokens, chunk]),
        TensorDescriptor.from_tensor(weight.values, [rows, chunk]),
        weight.scales,
        bias,
        partial_sums,
        num_tokens,
        out_size,
        split_size,
        IN_SIZE=in_size,
        ROW_GRAIN=weight.row_grain,
        COLUMN_GRAIN=weight.column_grain,
        TOKENS=tokens,
        ROWS=rows,
        CHUNK=chunk,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return partial_sums
