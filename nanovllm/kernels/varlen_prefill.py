"""Prefill attention: many new query tokens a sequence, causal, sequences of any lengths side by side.

The algorithm is FlashAttention-2 (Dao 2023): a program owns a tile of queries of one head and walks over the tiles of
keys they may see, with online softmax, so that no score ever leaves the chip. The keys are those of the new tokens
or, when a sequence has earlier ones (a cached prefix, a chunked prompt), all of them are read from the paged cache.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanovllm.kernels._triton import device_limits, next_power_of_2, tl, triton


class PrefillConfig(NamedTuple):
    """The tiles of `varlen_prefill`; the result does not depend on them."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int


def prefill_config(head_dim: int, dtype: torch.dtype, device: torch.device) -> PrefillConfig:
    """The best measured configuration whose query tile and staged key and value tiles fit the shared memory."""
    # fp32 runs without tensor cores, which would cost precision; larger tiles would spill registers.
    configs = [(128, 128, 8, 3), (128, 64, 8, 2), (64, 32, 4, 2)] if dtype.itemsize == 2 else [(32, 64, 8, 2)]
    for config in (*configs, (16, 32, 4, 2)):
        rows = config[0] + 2 * config[1] * config[3]
        if rows * next_power_of_2(head_dim) * dtype.itemsize <= device_limits(device)[1]:
            break
    return PrefillConfig(*config)


@triton.jit
def _attend(
    acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride, v_stride, block_table_ptr, query_positions, first, last, k_len,
    scale_log2, dims, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, PAGED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add keys [first, last) to the running softmax. Without MASKED every query sees every one of them."""
    for start in range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if MASKED:
            mask = (keys < k_len)[:, None] & (dims < HEAD_DIM)[None, :]
        elif HEAD_DIM != dims.shape[0]:
            mask = (dims < HEAD_DIM)[None, :]
        else:
            mask = None  # the whole tile is there: plain loads
        other = None if mask is None else 0.0
        if PAGED:
            blocks = tl.load(block_table_ptr + keys // BLOCK_SIZE, mask=keys < k_len, other=0)
            rows = (blocks * BLOCK_SIZE + keys % BLOCK_SIZE).to(tl.int64)  # a cache has > 2^31 elements
        else:
            rows = keys.to(tl.int64)
        k = tl.load(k_ptr + rows[:, None] * k_stride + dims[None, :], mask=mask, other=other)
        v = tl.load(v_ptr + rows[:, None] * v_stride + dims[None, :], mask=mask, other=other)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            scores = tl.where(keys[None, :] <= query_positions[:, None], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)  # finite: every query sees key 0
        p = tl.exp2(scores * scale_log2 - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["cu_seqlens_q_ptr", "cu_seqlens_k_ptr", "block_tables_ptr", "table_stride"])
def _varlen_prefill_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, block_tables_ptr, q_stride, k_stride, v_stride,
    table_stride, scale_log2, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)  # fastest: heads that share keys run side by side and find them in the L2 cache
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later queries see more keys: longest first
    seq = tl.program_id(2)
    q_start = tl.load(cu_seqlens_q_ptr + seq)
    k_start = tl.load(cu_seqlens_k_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    k_len = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    first_query = tile * BLOCK_M
    if first_query >= q_len:
        return
    queries = first_query + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    q_mask = queries[:, None] < q_len
    if HEAD_DIM != BLOCK_D:
        q_mask = q_mask & (dims < HEAD_DIM)[None, :]
    q_rows = (q_start + queries).to(tl.int64)
    q = tl.load(q_ptr + q_rows[:, None] * q_stride + head * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)
    kv_head = head // (HEADS // KV_HEADS)
    k_ptr += kv_head * HEAD_DIM
    v_ptr += kv_head * HEAD_DIM
    if not PAGED:
        k_ptr += k_start.to(tl.int64) * k_stride
        v_ptr += k_start.to(tl.int64) * v_stride
    block_table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
    # The last query sees all keys. Tiles wholly on the seen side of the diagonal need no mask.
    earlier = k_len - q_len
    first_masked = (first_query + earlier + 1) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_query + BLOCK_M + earlier, k_len)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride, v_stride, block_table_ptr, queries + earlier,
        0, first_masked, k_len, scale_log2, dims, HEAD_DIM, BLOCK_SIZE, BLOCK_N, PAGED, MASKED=False,
    )  # fmt: skip
    acc, row_max, row_sum = _attend(
        acc, row_max, row_sum, q, k_ptr, v_ptr, k_stride, v_stride, block_table_ptr, queries + earlier,
        first_masked, last, k_len, scale_log2, dims, HEAD_DIM, BLOCK_SIZE, BLOCK_N, PAGED, MASKED=True,
    )  # fmt: skip
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (q_rows * HEADS + head)[:, None] * HEAD_DIM + dims[None, :], out, mask=q_mask)


def varlen_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor | None, v_cache: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    block_tables: torch.Tensor | None = None, config: PrefillConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal attention over sequences laid end to end, the last query of each seeing all its keys: a tensor like q.

    Args:
        q: `[total_q, heads, head_dim]`, fp16, bf16 or fp32; heads is a multiple of kv_heads.
        k, v: `[total_k, kv_heads, head_dim]`, of q's dtype; read without block_tables. Like q's, their rows may be
            slices of the merged QKV output.
        k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, of q's dtype, the new keys and
            values stored already; read with block_tables.
        cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32, prefix sums of the new and of all tokens of each sequence;
            the same without block_tables.
        max_seqlen_q, max_seqlen_k: the most new and the most tokens of one sequence.
        scale: what the scores are multiplied by, positive, usually head_dim ** -0.5.
        block_tables: `[num_seqs, max_blocks]` int32, or None; entries past a sequence's end are never used.
        config: overrides `prefill_config`, for tests and tuning.
    """
    total_q, heads, head_dim = q.shape
    paged = block_tables is not None
    if paged:
        assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(1) == 1
        k, v, table_stride = k_cache.flatten(0, 1), v_cache.flatten(0, 1), block_tables.stride(0)
    else:
        block_tables, table_stride = cu_seqlens_k, 0  # any pointer: it is not read
    for x in (q, k, v):
        assert x.stride(2) == 1 and x.stride(1) == head_dim
    assert heads % k.shape[1] == 0
    config = config or prefill_config(head_dim, q.dtype, q.device)
    out = torch.empty(total_q, heads, head_dim, dtype=q.dtype, device=q.device)
    grid = (heads, triton.cdiv(max_seqlen_q, config.block_m), cu_seqlens_q.numel() - 1)
    _varlen_prefill_kernel[grid](
        q, k, v, out, cu_seqlens_q, cu_seqlens_k, block_tables, q.stride(0), k.stride(0), v.stride(0), table_stride,
        scale * math.log2(math.e), HEADS=heads, KV_HEADS=k.shape[1], HEAD_DIM=head_dim,
        BLOCK_SIZE=k_cache.shape[1] if paged else 1, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, next_power_of_2(head_dim)), PAGED=paged, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return out


def varlen_prefill_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor | None, v_cache: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, scale: float,
    block_tables: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`varlen_prefill` in PyTorch, one sequence after the other: the reference and the CPU path."""
    total_q, heads, head_dim = q.shape
    out = torch.empty(total_q, heads, head_dim, dtype=q.dtype, device=q.device)
    q_ends, k_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(q_ends) - 1):
        q_rows = slice(q_ends[i], q_ends[i + 1])
        q_len, k_len = q_ends[i + 1] - q_ends[i], k_ends[i + 1] - k_ends[i]
        if block_tables is None:
            keys, values = k[q_rows], v[q_rows]
        else:
            blocks = block_tables[i, : -(-k_len // k_cache.shape[1])].long()
            keys, values = (cache[blocks].flatten(0, 1)[:k_len] for cache in (k_cache, v_cache))
        group = heads // keys.shape[1]
        query = q[q_rows].transpose(0, 1)[None]  # [1, heads, q_len, head_dim]
        keys, values = (x.transpose(0, 1).repeat_interleave(group, dim=0)[None] for x in (keys, values))
        mask = None
        if 1 < q_len < k_len:  # is_causal aligns to the top left; here the last query sees all keys
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
        causal = q_len == k_len
        attended = F.scaled_dot_product_attention(query, keys, values, mask, is_causal=causal, scale=scale)
        out[q_rows] = attended[0].transpose(0, 1)
    return out
