"""`x W^T` for the few tokens of a decode step, as partial sums that the next kernel adds (split-K).

So few tokens and a narrow weight make few output tiles, and most multiprocessors would have none.
Therefore the inner dimension is split, too, until every multiprocessor has some of the work. cuBLAS
splits it less, adds the partial sums in a kernel of its own, and starts late. Here the kernel that
reads the product, and has to read it anyway, adds them. The reference is `F.linear`.

There are two kernels. Where a split is so narrow that its tile of the weight fits the shared memory
as a whole, the tile is loaded before the kernel ahead has ended, and what is left to do after the
wait is one product. Else a loop goes through the split in chunks.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    MAX_GEMM_TILE_ROWS,
    TensorDescriptor,
    device_limits,
    gemm_tile_rows,
    has_tma,
    launch_next,
    next_power_of_2,
    pdl_options,
    readable_rows,
    tl,
    triton,
    wait_for_previous,
)

MAX_TOKENS = 512  # above, output tiles are enough work, and cuBLAS is faster
MAX_UNSPLIT_TOKENS = 64  # the same where the inner dimension would not be split
ROWS = 64  # of the weight in a tile: what one tensor-core instruction takes
SHARED_BYTES = 200 << 10  # of shared memory for a program; GPUs for desktops have half as much


@triton.jit(do_not_specialize=["num_tokens", "split_size"])
def _split_gemm_kernel(
    x_desc,
    weight_desc,
    weight_ptr,
    bias_ptr,
    partial_sums_ptr,
    num_tokens,
    out_size,
    in_size,
    split_size,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of TOKENS tokens over one split of the inner dimension."""
    launch_next(PDL)
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    first_token = tl.program_id(2) * TOKENS
    # The last tile is moved back until it ends with the last token: it overlaps the tile before it,
    # and both write the same numbers there.
    first_token = tl.maximum(tl.minimum(first_token, num_tokens - TOKENS), 0)
    first_column = split * split_size
    row = first_row + tl.arange(0, ROWS)
    # This load has the address of each weight row translated, so that the loop need not wait for
    # that. The result is not used ("volatile" keeps the load). Measured: 1% of a decode step.
    is_weight_row = row < out_size
    row_start = weight_ptr + row.to(tl.int64) * in_size + first_column
    tl.load(row_start, mask=is_weight_row, volatile=True)
    wait_for_previous(PDL)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for column in range(first_column, tl.minimum(first_column + split_size, in_size), CHUNK):
        weight = weight_desc.load([first_row, column])
        x = x_desc.load([first_token, column])
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
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


@triton.jit(do_not_specialize=["num_tokens"])
def _whole_tile_kernel(
    x_desc,
    weight_desc,
    bias_ptr,
    partial_sums_ptr,
    num_tokens,
    out_size,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of all tokens over COLUMNS of the inner dimension."""
    launch_next(PDL)
    first_row = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    weight = weight_desc.load([first_row, split * COLUMNS])
    wait_for_previous(PDL)  # no earlier kernel writes the weight, but one writes x
    x = x_desc.load([0, split * COLUMNS])
    out = tl.trans(tl.dot(weight, tl.trans(x), input_precision="ieee"))
    token = tl.arange(0, TOKENS)[:, None]
    row = first_row + tl.arange(0, ROWS)[None, :]
    if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if split == 0:  # the bias is added once
            out += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    offsets = (split * num_tokens + token) * out_size + row
    tl.store(
        partial_sums_ptr + offsets,
        out.to(partial_sums_ptr.dtype.element_ty),
        mask=(token < num_tokens) & (row < out_size),
    )


def whole_tile_columns(num_tokens: int, in_size: int, splits: int, itemsize: int) -> int:
    """Return the columns of a split if its tiles fit the shared memory as a whole, otherwise 0.

    They are a power of two, so that there may be more or fewer splits than `splits`, if these are
    more than one. Measured for Qwen3-0.6B, of which all matrices fit for up to 32 tokens.
    """
    tile_tokens = gemm_tile_rows(num_tokens)
    columns = max(256, next_power_of_2(triton.cdiv(in_size, splits)))
    if tile_tokens == 64 and splits > 1 and columns == 512:
        columns = 256  # three programs a multiprocessor instead of one
    fits = columns * (ROWS + tile_tokens) * itemsize <= SHARED_BYTES
    return columns if fits and tile_tokens <= 64 else 0


def num_splits(x: Tensor, weight: Tensor) -> int:
    """Return the number of splits with which `split_gemm` is fastest, or 0 if cuBLAS is to be used.

    0 means that cuBLAS is faster for these sizes, or that the kernel cannot take them.

    x: `[n, in]`. weight: `[out, in]`.
    """
    num_tokens, in_size = x.shape
    out_size = weight.shape[0]
    num_multiprocessors, shared_memory = device_limits(x.device)
    if not (x.is_cuda and has_tma() and shared_memory >= SHARED_BYTES):
        return 0
    rows_are_aligned = x.dtype.itemsize == 2 and in_size % 8 == 0  # to 16 bytes, as TMA needs
    if not (rows_are_aligned and out_size and 2 <= num_tokens <= MAX_TOKENS):
        return 0
    num_tiles = triton.cdiv(out_size, ROWS) * triton.cdiv(num_tokens, MAX_GEMM_TILE_ROWS)
    splits = min(num_multiprocessors // num_tiles, max(1, in_size // 256))
    if splits > 1 or num_tokens <= MAX_UNSPLIT_TOKENS:
        return splits
    return 0


def split_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, splits: int) -> Tensor:
    """Return partial sums `[some, n, out]` whose sum is `x W^T + bias`.

    They are rounded to x's dtype, so that the next kernel has less to read. There may be fewer or
    more of them than `splits`, but of one split there is one.

    x: `[n, in]`, contiguous; fastest in memory from `padded_empty`.
    weight: `[out, in]`, contiguous. A row of x or weight is a multiple of 16 bytes.
    bias: `[out]`, or None.
    splits: at least 1, usually from `num_splits`.
    """
    num_tokens, in_size = x.shape
    out_size = weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous()
    tile_tokens = gemm_tile_rows(num_tokens)
    # TMA copies a whole tile where x has memory behind its rows.
    x_shape = [readable_rows(x, tile_tokens), in_size]
    columns = whole_tile_columns(num_tokens, in_size, splits, x.itemsize)
    if columns > 0:
        splits = triton.cdiv(in_size, columns)
        partial_sums = torch.empty(splits, num_tokens, out_size, dtype=x.dtype, device=x.device)
        _whole_tile_kernel[(triton.cdiv(out_size, ROWS), splits)](
            TensorDescriptor(x, x_shape, [in_size, 1], [tile_tokens, columns]),
            TensorDescriptor.from_tensor(weight, [ROWS, columns]),
            bias,
            partial_sums,
            num_tokens,
            out_size,
            TOKENS=tile_tokens,
            ROWS=ROWS,
            COLUMNS=columns,
            **pdl_options(),
        )
        return partial_sums
    # Measured, like the number of stages.
    has_wide_chunks = tile_tokens <= 32 and in_size >= 512 * splits
    chunk_bytes = 512 if has_wide_chunks else 256
    chunk = chunk_bytes // x.dtype.itemsize
    split_size = triton.cdiv(triton.cdiv(in_size, chunk), splits) * chunk
    splits = triton.cdiv(in_size, split_size)
    partial_sums = torch.empty(splits, num_tokens, out_size, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(out_size, ROWS), splits, triton.cdiv(num_tokens, tile_tokens))
    _split_gemm_kernel[grid](
        TensorDescriptor(x, x_shape, [in_size, 1], [tile_tokens, chunk]),
        TensorDescriptor.from_tensor(weight, [ROWS, chunk]),
        weight,
        bias,
        partial_sums,
        num_tokens,
        out_size,
        in_size,
        split_size,
        TOKENS=tile_tokens,
        ROWS=ROWS,
        CHUNK=chunk,
        num_stages=3 if tile_tokens in (32, 64) else 4,
        **pdl_options(),
    )
    return partial_sums
