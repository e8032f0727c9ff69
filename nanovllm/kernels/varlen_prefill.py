"""Prefill attention: many new query tokens a sequence, causal, sequences of any lengths side by side.

The algorithm is FlashAttention-2 (Dao 2023): a program owns a tile of queries of one head and walks over the tiles of
keys they may see, with online softmax, so that no score ever leaves the chip. The keys are those of the new tokens
or, when a sequence has earlier ones (a cached prefix, a chunked prompt), all of them are read from the paged cache.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    TensorDescriptor,
    device_limits,
    has_tma,
    next_power_of_2,
    tl,
    triton,
)


class PrefillConfig(NamedTuple):
    """The tiles of `varlen_prefill`; the result does not depend on them."""

    block_m: int  # queries a tile
    block_n: int  # keys a tile
    num_warps: int
    num_stages: int


def prefill_config(
    head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int = 1
) -> PrefillConfig:
    """The best measured configuration whose query tile and staged key and value tiles fit the shared memory.

    block_size: of the cache that the keys are read from; 1 without one.
    """
    # fp32 runs without tensor cores, which would cost precision; larger tiles would spill registers.
    best = (128, 64, 4, 3) if has_tma() and block_size % 64 == 0 else (128, 128, 8, 3)
    configs = [best, (128, 64, 8, 2), (64, 32, 4, 2)] if dtype.itemsize == 2 else [(32, 64, 8, 2)]
    for config in (PrefillConfig(*config) for config in (*configs, (16, 32, 4, 2))):
        rows = config.block_m + 2 * config.block_n * config.num_stages
        if rows * next_power_of_2(head_dim) * dtype.itemsize <= device_limits(device)[1]:
            break
    return config


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
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
):
    head = tl.program_id(
        0
    )  # fastest: heads that share keys run side by side and find them in the L2 cache
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # later queries see more keys: longest first
    seq = tl.program_id(2)
    q_start, k_start = tl.load(cu_seqlens_q_ptr + seq), tl.load(cu_seqlens_k_ptr + seq)
    q_len = tl.load(cu_seqlens_q_ptr + seq + 1) - q_start
    k_len = tl.load(cu_seqlens_k_ptr + seq + 1) - k_start
    first_query = tile * BLOCK_M
    if first_query >= q_len:
        return
    queries, dims = first_query + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q_mask = (queries < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (q_start + queries).to(tl.int64)
    q = tl.load(
        q_ptr + q_rows[:, None] * q_stride + head * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0
    )
    kv_dim = head // (HEADS // KV_HEADS) * HEAD_DIM
    if block_tables_ptr is not None:
        block_tables_ptr += seq.to(tl.int64) * table_stride
    # The last query sees all keys. Tiles wholly on the seen side of the diagonal come first and need no mask.
    earlier = k_len - q_len
    first_masked = (first_query + earlier + 1) // BLOCK_N * BLOCK_N
    last = tl.minimum(first_query + BLOCK_M + earlier, k_len)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(
            first_masked if MASKED else 0, last if MASKED else first_masked, BLOCK_N
        ):
            keys = start + tl.arange(0, BLOCK_N)
            if TMA:  # the tile lies in one piece: the hardware copies it
                row = k_start + start
                if block_tables_ptr is not None:
                    row = (
                        tl.load(block_tables_ptr + start // BLOCK_SIZE) * BLOCK_SIZE
                        + start % BLOCK_SIZE
                    )
                k, v = k_ptr.load([row, kv_dim]), v_ptr.load([row, kv_dim])
                if MASKED:
                    if start + BLOCK_N > k_len:  # what lies behind the last key may be NaN
                        v = tl.where((keys < k_len)[:, None], v, 0.0)
            else:
                mask = (dims < HEAD_DIM)[None, :]
                if MASKED:
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
            if MASKED:
                scores = tl.where(
                    keys[None, :] <= (queries + earlier)[:, None], scores, float("-inf")
                )
            new_max = tl.maximum(
                row_max, tl.max(scores, 1) * scale_log2
            )  # finite: every query sees key 0
            p = tl.exp2(scores * scale_log2 - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)
            row_sum = row_sum * alpha + tl.sum(p, 1)
            row_max = new_max
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(
        out_ptr + (q_rows * HEADS + head)[:, None] * HEAD_DIM + dims[None, :], out, mask=q_mask
    )


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
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention over sequences laid end to end, the last query of each seeing all its keys: a tensor like q.

    q, k, v: `[total_q or total_k, heads or kv_heads, head_dim]`, fp16, bf16 or fp32; maybe slices of the QKV output.
    cu_seqlens_q, cu_seqlens_k: `[num_seqs + 1]` int32, prefix sums of each sequence's queries and of all its tokens.
    max_seqlen_q, max_seqlen_k: the most queries and the most tokens of one sequence.
    k_cache, v_cache, block_tables, scale: as in `paged_decode`; scale is positive. With block_tables all keys are
    read from the cache, where the new ones are already; without (None), all tokens are new, and in k and v.
    config: overrides `prefill_config`, for tests and tuning.
    """
    (_, heads, head_dim), block_size, table_stride = (
        q.shape,
        1,
        0,
    )  # without block tables, no block size
    if block_tables is not None:
        assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(1) == 1
        k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        block_size, table_stride = k_cache.shape[1], block_tables.stride(0)
    assert (
        all(x.stride(2) == 1 and x.stride(1) == head_dim for x in (q, k, v))
        and heads % k.shape[1] == 0
    )
    config = config or prefill_config(head_dim, q.dtype, q.device, block_size)
    block_d = max(16, next_power_of_2(head_dim))
    # A tile in one piece, with rows that begin at multiples of 16 bytes.
    tma = (
        has_tma() and q.itemsize == 2 and (block_tables is None or block_size % config.block_n == 0)
    )
    tma = tma and all(x.data_ptr() % 16 == 0 and 2 * x.stride(0) % 16 == 0 for x in (k, v))
    keys, values = k, v
    if tma:
        keys, values = (
            TensorDescriptor(
                x.flatten(1),
                [x.shape[0], x[0].numel()],
                [x.stride(0), 1],
                [config.block_n, block_d],
            )
            for x in (k, v)
        )
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
        HEADS=heads,
        KV_HEADS=k.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        TMA=tma,
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
) -> Tensor:
    """The same in PyTorch, one sequence after the other: the reference, and the CPU's path."""
    outs, q_lens, k_lens = [], cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    new = list(zip(k.split(k_lens), v.split(k_lens))) if block_tables is None else []
    for i, (query, q_len, k_len) in enumerate(zip(q.split(q_lens), q_lens, k_lens)):
        if block_tables is None:
            keys, values = new[i]
        else:
            blocks = block_tables[i, : -(-k_len // k_cache.shape[1])].long()
            keys, values = (cache[blocks].flatten(0, 1)[:k_len] for cache in (k_cache, v_cache))
        group = q.shape[1] // keys.shape[1]
        keys, values = (
            x.transpose(0, 1).repeat_interleave(group, dim=0)[None] for x in (keys, values)
        )
        causal = (
            q_len == k_len
        )  # SDPA's own mask has the diagonal at the top left; the last query sees all keys
        mask = None
        if 1 < q_len < k_len:
            mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
        query = query.transpose(0, 1)[None]  # [1, heads, q_len, head_dim]
        out = F.scaled_dot_product_attention(
            query, keys, values, mask, is_causal=causal, scale=scale
        )
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)
