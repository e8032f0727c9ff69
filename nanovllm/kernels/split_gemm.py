"""`x W^T` for the few tokens of a decode step, in parts: the sum is left to the kernel that reads it.

So few tokens make few tiles of a narrow weight, and most of the card would have none. Therefore the inner dimension
is split until every multiprocessor has a part. cuBLAS splits it less, adds the parts up itself, and starts late.
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
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)

MAX_TOKENS = 256  # with more, a wide tile has enough to do, and cuBLAS is faster
MAX_UNSPLIT_TOKENS = 64  # likewise in one part
ROWS = 64  # of the weight, a tile: what a tensor-core instruction takes
SHARED_BYTES = 200 << 10  # that a program may take; cards for desktops have half as much


@triton.jit(do_not_specialize=["num_tokens", "part_size"])
def _split_gemm_kernel(
    x_desc,
    weight_desc,
    weight_ptr,
    bias_ptr,
    parts_ptr,
    num_tokens,
    out_size,
    in_size,
    part_size,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    first_row, part, first_token = (
        tl.program_id(0) * ROWS,
        tl.program_id(1),
        tl.program_id(2) * TOKENS,
    )
    first_token = tl.maximum(
        tl.minimum(first_token, num_tokens - TOKENS), 0
    )  # the last tile overlaps the one before
    first, row = part * part_size, first_row + tl.arange(0, ROWS)
    # While it waits, each row that it will read is looked up: measured, that saves 1% of a step.
    tl.load(weight_ptr + row.to(tl.int64) * in_size + first, mask=row < out_size, volatile=True)
    wait_for_previous(PDL)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    for column in range(first, tl.minimum(first + part_size, in_size), CHUNK):
        weight, x = weight_desc.load([first_row, column]), x_desc.load([first_token, column])
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    token, row = first_token + tl.arange(0, TOKENS)[:, None], row[None, :]
    out = tl.trans(acc)
    if bias_ptr is not None:
        if part == 0:
            out += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    offsets = (part * num_tokens + token) * out_size + row
    tl.store(
        parts_ptr + offsets,
        out.to(parts_ptr.dtype.element_ty),
        mask=(token < num_tokens) & (row < out_size),
    )


def num_splits(x: Tensor, weight: Tensor) -> int:
    """Into how many parts `split_gemm` best splits the inner dimension; 0: cuBLAS is faster, or must be taken."""
    (num_tokens, in_size), out_size = x.shape, weight.shape[0]
    num_sms, shared_memory = device_limits(x.device)
    is_able = x.is_cuda and has_tma() and shared_memory >= SHARED_BYTES
    if not (
        is_able
        and x.dtype.itemsize == 2
        and in_size % 8 == 0
        and out_size
        and 2 <= num_tokens <= MAX_TOKENS
    ):
        return 0
    tiles = triton.cdiv(out_size, ROWS) * triton.cdiv(num_tokens, MAX_GEMM_TILE_ROWS)
    parts = min(num_sms // tiles, max(1, in_size // 256))
    return parts if parts > 1 or num_tokens <= MAX_UNSPLIT_TOKENS else 0


def split_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, splits: int) -> Tensor:
    """`[parts, n, out]`, at most splits, whose sum is `x W^T + bias`; in x's dtype, so that less has to be read.

    x `[n, in]`, better in `padded_empty`, weight `[out, in]`, bias `[out]`, contiguous; a row of x or weight is a
    multiple of 16 bytes.
    """
    (num_tokens, in_size), out_size = x.shape, weight.shape[0]
    assert x.is_contiguous() and weight.is_contiguous()
    tokens = gemm_tile_rows(num_tokens)
    chunk_bytes = (
        512 if tokens <= 32 and in_size >= 512 * splits else 256
    )  # measured, like the stages
    chunk = chunk_bytes // x.dtype.itemsize
    part_size = triton.cdiv(triton.cdiv(in_size, chunk), splits) * chunk
    splits = triton.cdiv(in_size, part_size)
    # A tile may reach past x's rows where there is memory.
    has_tile = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset() >= tokens * in_size
    x_shape = [max(num_tokens, tokens) if has_tile else num_tokens, in_size]
    parts = torch.empty(splits, num_tokens, out_size, dtype=x.dtype, device=x.device)
    _split_gemm_kernel[(triton.cdiv(out_size, ROWS), splits, triton.cdiv(num_tokens, tokens))](
        TensorDescriptor(x, x_shape, [in_size, 1], [tokens, chunk]),
        TensorDescriptor.from_tensor(weight, [ROWS, chunk]),
        weight,
        bias,
        parts,
        num_tokens,
        out_size,
        in_size,
        part_size,
        TOKENS=tokens,
        ROWS=ROWS,
        CHUNK=chunk,
        num_stages=4,
        **pdl_options(),
    )
    return parts
