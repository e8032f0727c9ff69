"""Prefill attention: many new query tokens a sequence, causal, sequences of any lengths in a row.

The algorithm is FlashAttention-2 (Dao 2023): a program takes a tile of queries of one head and goes
through the tiles of keys that they may see, with online softmax, so that no score ever leaves the
chip. The keys are those of the new tokens; or, where a sequence has earlier ones (a cached prefix,
a chunked prompt), all of them are read from the paged cache.
"""

import math

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    TensorDescriptor,
    has_tma,
    launch_next,
    next_power_of_2,
    pdl_options,
    soft_capped,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_cache import as_operand, dot_dtype
from nanovllm.kernels.prefill_config import PrefillConfig, prefill_config
from nanovllm.kernels.prefill_parts import PartResults, leave_part

# The phases of a program: which tiles of keys it goes through.
LEFT_EDGE = tl.constexpr(0)
UNMASKED = tl.constexpr(1)
DIAGONAL = tl.constexpr(2)


@triton.jit(
    do_not_specialize=[
        "tiles_ptr",
        "part_out_ptr",
        "part_lse_ptr",
        "arrivals_ptr",
        "cu_seqlens_q_ptr",
        "cu_seqlens_k_ptr",
        "block_tables_ptr",
        "table_stride",
    ]
)
def _varlen_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    tiles_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrivals_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    block_tables_ptr,
    q_stride,
    k_stride,
    v_stride,
    table_stride,
    column_stride,
    scale_log2,
    softcap_log2,
    v_scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr,
    FIELDS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes a tile of BLOCK_M queries of one head of one sequence.

    It takes the tile from a list, see prefill_tiles.py, or finds it in the sequences' borders if
    `tiles_ptr` is None. With a `part_out_ptr`, a tile of the list may be a part of one, which has
    some of its keys, see prefill_parts.py. A query sees the WINDOW keys up to its own; 0: all.
    `softcap_log2` is None without a cap, `v_scale` unless the cache is FP8; for DOT_DTYPE see
    fp8_cache.py. With TMA, `k_ptr` and `v_ptr` are tensor descriptors.
    """
    # The head is the fastest index: heads that share a KV head run side by side, and find its keys
    # in the L2 cache.
    head = tl.program_id(0)
    if tiles_ptr is not None:
        # To this program, the sequence ends with the last query of the tile.
        tile_ptr = tiles_ptr + tl.program_id(1) * FIELDS
        first_query = 0
        q_start = tl.load(tile_ptr)
        q_len = tl.load(tile_ptr + 1)
        k_start = 0
        k_len = tl.load(tile_ptr + 2) + q_len
        seq = tl.load(tile_ptr + 3)
    else:
        # Of the tiles the last comes first: its queries see the most keys, and the programs that
        # run longest should begin first.
        tile = tl.num_programs(1) - 1 - tl.program_id(1)
        first_query = tile * BLOCK_M
        seq = tl.program_id(2)
        q_start = tl.load(cu_seqlens_q_ptr + seq)
        k_start = tl.load(cu_seqlens_k_ptr + seq)
        q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
        k_len = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    if first_query >= q_len:  # the grid has room for the longest sequence, or the longest list
        return
    wait_for_previous(PDL)
    queries = first_query + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_mask = (queries < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (q_start + queries).to(tl.int64)
    q_ptrs = q_ptr + q_rows[:, None] * q_stride + head * HEAD_DIM + dims[None, :]
    q = as_operand(tl.load(q_ptrs, mask=q_mask, other=0.0), DOT_DTYPE)
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
    if tiles_ptr is not None:
        # Padding sees no key: its `earlier` is -q_len.
        first_masked = tl.maximum(first_masked, 0)
    last = tl.minimum(first_query + BLOCK_M + earlier, k_len)  # exclusive
    begin = 0
    left_end = 0
    if WINDOW:
        first_seen = tl.maximum(first_query + earlier - WINDOW + 1, 0)  # by the first query
        begin = first_seen // BLOCK_N * BLOCK_N
        first_seen_by_all = tl.maximum(first_query + BLOCK_M + earlier - WINDOW, 0)
        left_end = tl.minimum(tl.cdiv(first_seen_by_all, BLOCK_N) * BLOCK_N, first_masked)
    if part_out_ptr is not None:
        part = tl.load(tile_ptr + 4)
        num_parts = tl.load(tile_ptr + 5)
        part_begin = part * tl.load(tile_ptr + 6)
        part_end = part_begin + tl.load(tile_ptr + 6)
        begin = tl.maximum(begin, part_begin)
        left_end = tl.minimum(tl.maximum(left_end, part_begin), part_end)
        first_masked = tl.minimum(tl.maximum(first_masked, part_begin), part_end)
        last = tl.minimum(last, part_end)
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
                    block = tl.load(block_tables_ptr + start // BLOCK_SIZE * column_stride)
                    row = block * BLOCK_SIZE + start % BLOCK_SIZE
                k = k_ptr.load([row, kv_dim])
                v = v_ptr.load([row, kv_dim]).to(DOT_DTYPE)
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
                    block_ptrs = block_tables_ptr + keys // BLOCK_SIZE * column_stride
                    blocks = tl.load(block_ptrs, mask=keys < k_len, other=0)
                    rows = blocks * BLOCK_SIZE + keys % BLOCK_SIZE
                rows = rows.to(tl.int64)[:, None]  # a cache has more than 2^31 elements
                k = tl.load(k_ptr + rows * k_stride + kv_dim + dims[None, :], mask=mask, other=0.0)
                v = tl.load(v_ptr + rows * v_stride + kv_dim + dims[None, :], mask=mask, other=0.0)
                v = v.to(DOT_DTYPE)
            scores = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
            if softcap_log2 is not None:
                scores = soft_capped(scores * scale_log2, softcap_log2)
            if PHASE != UNMASKED:
                is_seen = keys[None, :] <= (queries + earlier)[:, None]
                if WINDOW:
                    is_seen = is_seen & (keys[None, :] > (queries + earlier - WINDOW)[:, None])
                scores = tl.where(is_seen, scores, float("-inf"))
            # Online softmax, as in `paged_decode`. With all keys and without a window the maximum
            # is finite, since every query sees key 0. Otherwise a query may have seen no key yet;
            # -inf less -inf would be NaN.
            new_max = tl.maximum(row_max, tl.max(scores, 1) * scores_to_log2)
            finite_max = new_max
            if WINDOW or part_out_ptr is not None:
                finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores * scores_to_log2 - finite_max[:, None])
            alpha = tl.exp2(row_max - finite_max)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            row_max = new_max
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        begin = end
    launch_next(PDL)
    if tiles_ptr is not None:
        # Padding, and queries that see no key of this part: their result is zeros.
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    if v_scale is not None:
        acc *= v_scale
    out = acc / row_sum[:, None]
    if part_out_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if num_parts > 1:
            leave_part(
                out,
                row_max + tl.log2(row_sum),  # the log-sum-exp
                out_ptr,
                part_out_ptr,
                part_lse_ptr,
                arrivals_ptr,
                tl.load(tile_ptr + 7),
                part,
                num_parts,
                q_start,
                queries,
                q_len,
                dims,
                head,
                HEADS=HEADS,
                HEAD_DIM=HEAD_DIM,
                BLOCK_D=BLOCK_D,
            )
            q_len = 0  # nothing is left to be stored
        q_mask = (queries < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    out_ptrs = out_ptr + (q_rows * HEADS + head)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=q_mask)


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
    v_scale: float | None = None,
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
    scale: of the scores, positive; times the scale of K where the cache is FP8.
    block_tables: as in `paged_decode`: all keys are read from the cache, where the new ones already
        are. None: all tokens are new, and in k and v.
    window: a query sees the last `window` tokens up to its own; None: all. Tiles of keys that no
        query of a tile sees are not read.
    softcap: as in `paged_decode`.
    v_scale: the scale of V where the cache is FP8, also of v in 16 bits, see fp8_cache.py.
    config: overrides `prefill_config`, for tests and tuning.
    """
    block_size = 1
    if block_tables is not None:
        assert k_cache is not None and v_cache is not None
        block_size, kv_heads, head_dim = k_cache.shape[1:]
        k = k_cache.view(-1, kv_heads, head_dim)
        v = v_cache.view(-1, kv_heads, head_dim)
    config = config or prefill_config(q.shape[2], q.dtype, q.device, block_size)
    num_seqs = cu_seqlens_q.numel() - 1
    return launch_prefill(
        q,
        k,
        v,
        grid=(q.shape[1], triton.cdiv(max_seqlen_q, config.block_m), num_seqs),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_tables=block_tables,
        block_size=block_size,
        scale=scale,
        window=window,
        softcap=softcap,
        v_scale=v_scale,
        config=config,
    )


def launch_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, ...],
    *,
    tiles: Tensor | None = None,
    parts: PartResults | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    block_tables: Tensor | None,
    block_size: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    v_scale: float | None,
    config: PrefillConfig,
) -> Tensor:
    """Launch the kernel on tiles, or on sequences' borders; see `tiled_prefill`, `varlen_prefill`.

    k, v: with block tables all slots of the cache, `[num_slots, kv_heads, head_dim]`.
    """
    heads, head_dim = q.shape[1:]
    assert all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (q, k, v))
    assert heads % k.shape[1] == 0
    block_d = max(16, next_power_of_2(head_dim))
    # TMA copies a tile in one piece. Rows, and heads in them, begin at multiples of 16 bytes.
    in_one_piece = block_tables is None or block_size % config.block_n == 0
    uses_tma = (
        has_tma()
        and q.itemsize == 2
        and in_one_piece
        and head_dim * k.itemsize % 16 == 0
        and all(x.data_ptr() % 16 == 0 and x.stride(0) * x.itemsize % 16 == 0 for x in (k, v))
    )
    keys = _tile_descriptor(k, config.block_n, block_d) if uses_tma else k
    values = _tile_descriptor(v, config.block_n, block_d) if uses_tma else v
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _varlen_prefill_kernel[grid](
        q,
        keys,
        values,
        out,
        tiles,
        None if parts is None else parts.out,
        None if parts is None else parts.lse,
        None if parts is None else parts.arrivals,
        cu_seqlens_q,
        cu_seqlens_k,
        block_tables,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        0 if block_tables is None else block_tables.stride(0),
        0 if block_tables is None else block_tables.stride(1),
        scale * math.log2(math.e),
        None if softcap is None else softcap * math.log2(math.e),
        v_scale,
        HEADS=heads,
        KV_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        WINDOW=window or 0,
        FIELDS=0 if tiles is None else tiles.shape[1],
        DOT_DTYPE=dot_dtype(q, k),
        TMA=uses_tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"PDL": False} if tiles is None else pdl_options()),
    )
    return out
