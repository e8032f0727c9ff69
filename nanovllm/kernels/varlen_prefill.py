"""Prefill attention: many new query tokens a sequence, causal, sequences of any lengths in a row.

The algorithm is FlashAttention-2 (Dao 2023): a program takes a tile of queries of one head and goes
through the tiles of keys that they may see, with online softmax, so that no score ever leaves the
chip. The keys are those of the new tokens; or, where a sequence has earlier ones (a cached prefix,
a chunked prompt), all of them are read from the paged cache.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    TensorDescriptor,
    device_limits,
    has_tma,
    next_power_of_2,
    soft_capped,
    tl,
    triton,
)
from nanovllm.kernels.torch_attention import causal_mask, masked_attention

# The phases of a program: which tiles of keys it goes through.
LEFT_EDGE = tl.constexpr(0)
UNMASKED = tl.constexpr(1)
DIAGONAL = tl.constexpr(2)


class PrefillConfig(NamedTuple):
    """The tiles of `varlen_prefill`; the result does not depend on them."""

    block_m: int  # queries in a tile
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int  # tiles of keys and values in shared memory


# The fastest measured configurations, each of which needs more shared memory than the next.
FOR_16_BITS_WITH_TMA = PrefillConfig(128, 64, 4, 3)
FOR_16_BITS = PrefillConfig(128, 128, 8, 3)
SMALLER_FOR_16_BITS = (PrefillConfig(128, 64, 8, 2), PrefillConfig(64, 32, 4, 2))
# fp32 runs without tensor cores, which would cost precision; larger tiles would spill registers.
FOR_32_BITS = PrefillConfig(32, 64, 8, 2)
SMALLEST = PrefillConfig(16, 32, 4, 2)


def prefill_config(
    head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int = 1
) -> PrefillConfig:
    """Return the fastest measured configuration whose tiles fit in the shared memory.

    block_size: of the cache that the keys are read from; 1 without one.
    """
    if dtype.itemsize != 2:
        configs: tuple[PrefillConfig, ...] = (FOR_32_BITS,)
    elif has_tma() and block_size % 64 == 0:
        configs = (FOR_16_BITS_WITH_TMA, *SMALLER_FOR_16_BITS)
    else:
        configs = (FOR_16_BITS, *SMALLER_FOR_16_BITS)
    _, shared_memory = device_limits(device)
    row_bytes = next_power_of_2(head_dim) * dtype.itemsize
    for config in configs:
        rows = config.block_m + 2 * config.block_n * config.num_stages  # of Q, and of K and V
        if rows * row_bytes <= shared_memory:
            return config
    return SMALLEST


@triton.jit(
    do_not_specialize=["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "block_tables_ptr", "table_stride"]
)
def _varlen_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    block_tables_ptr,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    scale_log2,
    softcap_log2,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    TMA: tl.constexpr,
):
    """A program takes a tile of BLOCK_M queries of one head of one sequence.

    A query sees the WINDOW keys up to its own; 0: all. `softcap_log2` is None without a cap. With
    TMA, `k_ptr` and `v_ptr` are tensor descriptors.
    """
    # The head is the fastest index: heads that share a KV head run side by side, and find its keys
    # in the L2 cache. Of the tiles the last comes first: its queries see the most keys, and the
    # programs that run longest should begin first.
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = tl.program_id(2)
    q_start = tl.load(cu_seqlens_q_ptr + seq)
    k_start = tl.load(cu_seqlens_k_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    k_len = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    first_query = tile * BLOCK_M
    if first_query >= q_len:  # the grid is that of the longest sequence
        return
    queries = first_query + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_mask = (queries < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (q_start + queries).to(tl.int64)
    q_ptrs = q_ptr + q_rows[:, None] * q_stride + head * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptrs, mask=q_mask, other=0.0)
    kv_dim = head // (HEADS // KV_HEADS) * HEAD_DIM  # the first element of the KV head in a row
    if block_tables_ptr is not None:
        block_tables_ptr += seq.to(tl.int64) * table_stride
    # Query i sees the keys up to number `earlier + i`, so that the last query sees all of them; and
    # from number `earlier + i - WINDOW + 1` on. The tiles of keys, which begin at multiples of
    # BLOCK_N, come in three phases:
    #   LEFT_EDGE  tiles that the left edges of the windows cross; there are none without a window
    #   UNMASKED   tiles that every query of this program sees whole
    #   DIAGONAL   tiles that the diagonal crosses and, if the window is short, left edges too
    earlier = k_len - q_len
    first_masked = (first_query + earlier + 1) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_query + BLOCK_M + earlier, k_len)  # exclusive
    begin = 0
    left_end = 0
    if WINDOW:
        first_seen = tl.maximum(first_query + earlier - WINDOW + 1, 0)  # by the first query
        begin = first_seen // BLOCK_N * BLOCK_N
        first_seen_by_all = tl.maximum(first_query + BLOCK_M + earlier - WINDOW, 0)
        left_end = tl.minimum(tl.cdiv(first_seen_by_all, BLOCK_N) * BLOCK_N, first_masked)
    scores_to_log2 = scale_log2 if softcap_log2 is None else 1.0
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for PHASE in tl.static_range(LEFT_EDGE if WINDOW else UNMASKED, DIAGONAL + 1):
        if PHASE == LEFT_EDGE:
            end = left_end
        elif PHASE == UNMASKED:
            end = first_masked
        else:
            end = last
        for start in range(begin, end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            if TMA:  # the tile lies in one piece, which the hardware copies
                row = k_start + start
                if block_tables_ptr is not None:
                    block = tl.load(block_tables_ptr + start // BLOCK_SIZE)
                    row = block * BLOCK_SIZE + start % BLOCK_SIZE
                k = k_ptr.load([row, kv_dim])
                v = v_ptr.load([row, kv_dim])
                if PHASE != UNMASKED:  # noqa: SIM102 (this is decided when the kernel is compiled)
                    if start + BLOCK_N > k_len:
                        # What lies behind the last key may be NaN, and 0 * NaN is NaN.
                        v = tl.where((keys < k_len)[:, None], v, 0.0)
            else:
                mask = (dims < HEAD_DIM)[None, :]
                if PHASE != UNMASKED:
                    mask = mask & (keys < k_len)[:, None]
                rows = k_start + keys
                if block_tables_ptr is not None:
                    blocks = tl.load(
                        block_tables_ptr + keys // BLOCK_SIZE, mask=keys < k_len, other=0
                    )
                    rows = blocks * BLOCK_SIZE + keys % BLOCK_SIZE
                rows = rows.to(tl.int64)[:, None]  # a cache has more than 2^31 elements
                k = tl.load(k_ptr + rows * k_stride + kv_dim + dims[None, :], mask=mask, other=0.0)
                v = tl.load(v_ptr + rows * v_stride + kv_dim + dims[None, :], mask=mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
            if softcap_log2 is not None:
                scores = soft_capped(scores * scale_log2, softcap_log2)
            if PHASE != UNMASKED:
                is_seen = keys[None, :] <= (queries + earlier)[:, None]
                if WINDOW:
                    is_seen = is_seen & (keys[None, :] > (queries + earlier - WINDOW)[:, None])
                scores = tl.where(is_seen, scores, float("-inf"))
            # Online softmax, as in `paged_decode`. Without a window the maximum is finite, since
            # every query sees key 0. With one a query may have seen no key yet; -inf less -inf
            # would be NaN.
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scores_to_log2)
            finite_max = new_max
            if WINDOW:
                finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores * scores_to_log2 - finite_max[:, None])
            alpha = tl.exp2(row_max - finite_max)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            row_max = new_max
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        begin = end
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    out_ptrs = out_ptr + (q_rows * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, out, mask=q_mask)


def _tile_descriptor(x: Tensor, tile_rows: int, tile_columns: int) -> TensorDescriptor:
    """Describe x `[rows, heads, head_dim]` to TMA as a matrix of tiles, a row for each of x."""
    shape = [x.shape[0], x[0].numel()]
    return TensorDescriptor(x.flatten(1), shape, [x.stride(0), 1], [tile_rows, tile_columns])


def varlen_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    block_tables: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Return causal attention over sequences laid end to end: a tensor like q, contiguous.

    The last query of a sequence sees all its keys, the query before it one key less, and so on.

    q, k, v: `[total_q or total_k, heads or kv_heads, head_dim]`, fp16, bf16 or fp32; they may be
        slices of the QKV output.
    k_cache, v_cache: as in `paged_decode`.
    cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32, prefix sums of each sequence's queries (its
        new tokens) and of all its tokens.
    max_seqlen_q, max_seqlen_k: the most queries and the most tokens of one sequence.
    scale: of the scores, positive.
    block_tables: as in `paged_decode`: all keys are read from the cache, where the new ones already
        are. None: all tokens are new, and in k and v.
    window: a query sees the last `window` tokens up to its own; None: all. Tiles of keys that no
        query of a tile sees are not read.
    softcap: as in `paged_decode`.
    config: overrides `prefill_config`, for tests and tuning.
    """
    _, heads, head_dim = q.shape
    block_size = 1
    table_stride = 0
    if block_tables is not None:
        assert k_cache is not None and v_cache is not None
        assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(1) == 1
        k = k_cache.flatten(0, 1)
        v = v_cache.flatten(0, 1)
        block_size = k_cache.shape[1]
        table_stride = block_tables.stride(0)
    assert all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (q, k, v))
    assert heads % k.shape[1] == 0
    config = config or prefill_config(head_dim, q.dtype, q.device, block_size)
    block_d = max(16, next_power_of_2(head_dim))
    # TMA copies a tile in one piece. Rows, and heads in them, begin at multiples of 16 bytes.
    in_one_piece = block_tables is None or block_size % config.block_n == 0
    uses_tma = (
        has_tma()
        and q.itemsize == 2
        and in_one_piece
        and head_dim % 8 == 0
        and all(x.data_ptr() % 16 == 0 and 2 * x.stride(0) % 16 == 0 for x in (k, v))
    )
    keys, values = k, v
    if uses_tma:
        keys = _tile_descriptor(k, config.block_n, block_d)
        values = _tile_descriptor(v, config.block_n, block_d)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grid = (heads, triton.cdiv(max_seqlen_q, config.block_m), cu_seqlens_q.numel() - 1)
    _varlen_prefill_kernel[grid](
        q,
        keys,
        values,
        out,
        cu_seqlens_q,
        cu_seqlens_k,
        block_tables,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        table_stride,
        scale * math.log2(math.e),
        None if softcap is None else softcap * math.log2(math.e),
        HEADS=heads,
        KV_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        WINDOW=window or 0,
        TMA=uses_tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


def varlen_prefill_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    block_tables: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`varlen_prefill` in PyTorch, one sequence at a time: the reference, and the CPU's path."""
    q_lens = cu_seqlens_q.diff().tolist()
    k_lens = cu_seqlens_k.diff().tolist()
    outs = []
    q_start = 0
    k_start = 0
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        query = q[q_start : q_start + q_len]
        if block_tables is None:
            keys = k[k_start : k_start + k_len]
            values = v[k_start : k_start + k_len]
        else:
            assert k_cache is not None and v_cache is not None
            blocks = block_tables[i, : -(-k_len // k_cache.shape[1])].long()
            keys = k_cache[blocks].flatten(0, 1)[:k_len]
            values = v_cache[blocks].flatten(0, 1)[:k_len]
        q_start += q_len
        k_start += k_len
        # [batch, heads, tokens, head_dim], with as many KV heads as query heads
        query = query.transpose(0, 1)[None]
        group = q.shape[1] // keys.shape[1]
        keys = keys.transpose(0, 1).repeat_interleave(group, dim=0)[None]
        values = values.transpose(0, 1).repeat_interleave(group, dim=0)[None]
        mask = causal_mask(q_len, k_len, window, q.device)
        is_causal = mask is None and q_len > 1
        out = masked_attention(query, keys, values, mask, scale, softcap, is_causal)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
