"""Decode attention: one new query token a sequence, keys and values read from the paged cache.

Reading K and V is all the time it takes. So each is read once, for all the query heads that share it, in tiles that
are loaded while earlier ones are computed, the first even before the kernel ahead has ended, with the online softmax
of Milakov & Gimelshein (2018). When there are too few sequences to occupy the card, several programs share each
("Flash-Decoding", Dao et al. 2023).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    device_limits,
    launch_next,
    next_power_of_2,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)

MAX_SPLITS = 32


class DecodeConfig(NamedTuple):
    """How `paged_decode` divides the work; the result does not depend on it."""

    block_n: int  # tokens a tile
    num_splits: int  # programs that share one sequence and KV head, at most MAX_SPLITS
    num_warps: int = 4
    num_stages: int = 3  # tiles in the works, the one that is computed included
    max_registers: int | None = None  # a thread's: fewer let more programs share a multiprocessor


def decode_config(
    num_seqs: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
) -> DecodeConfig:
    """The measured choice. It knows nothing of context lengths: a CUDA graph outlives them."""
    num_sms, shared_memory = device_limits(device)
    programs, splits, stages = max(1, num_seqs * kv_heads), 1, 3
    if (
        programs < 3 * num_sms // 2
    ):  # up to four a multiprocessor: more do not help, fewer leave the longest alone
        splits = min(MAX_SPLITS, 1 << (4 * num_sms // programs).bit_length() - 1)
    elif programs <= 2 * num_sms:
        stages = 5  # so few read enough at a time only with more tiles each
    block_n, token_bytes = 64, next_power_of_2(head_dim) * dtype.itemsize
    if block_size % 16 == 0:  # a tile of one block is found faster
        block_n = min(block_n, block_size & -block_size)
    stages = max(3, min(stages, shared_memory // (2 * block_n * token_bytes)))
    while block_n > 16 and 2 * stages * block_n * token_bytes > shared_memory:
        block_n //= 2
    # Many programs, with maybe short contexts, gain by being three on a multiprocessor, few by having no such limit.
    max_registers = 168 if programs > 6 * num_sms and token_bytes == 256 else None
    return DecodeConfig(block_n, splits, num_stages=stages, max_registers=max_registers)


@triton.jit
def _shares(context_len, num_splits, BLOCK_N: tl.constexpr):
    """Tiles that a split takes of a sequence, and how many splits that leaves with any (at least one)."""
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), 1)
    return tiles_per_split, tl.maximum(tl.cdiv(num_tiles, tiles_per_split), 1)


@triton.jit(do_not_specialize=["context_lens_ptr", "block_tables_ptr", "table_stride"])
def _paged_decode_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    lse_ptr,
    context_lens_ptr,
    block_tables_ptr,
    q_stride,
    table_stride,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    READ_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head, split, seq, num_splits = (
        tl.program_id(0),
        tl.program_id(1),
        tl.program_id(2),
        tl.num_programs(1),
    )
    # The grid is fixed, the context length is not: each split takes its share of the tiles there are now.
    context_len = tl.load(context_lens_ptr + seq)
    tiles_per_split, num_shares = _shares(context_len, num_splits, BLOCK_N)
    if split >= num_shares:
        return
    group = tl.arange(0, BLOCK_G)  # the query heads of this KV head, padded to what tl.dot takes
    heads = kv_head * GROUP + group
    dims = tl.arange(0, BLOCK_D)
    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = seq.to(tl.int64) * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    table = block_tables_ptr + seq * table_stride
    first_tile, num_tiles = split * tiles_per_split, tl.cdiv(context_len, BLOCK_N)
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)
    if READ_AHEAD:
        # The loop's first tiles are on their way before its first round, which waits for this step's numbers. Of K
        # and V those are in the sequence's last tile only; where that is near, wait at once. What earlier steps wrote
        # can be read: each step has begun with plain kernels since.
        q = tl.zeros([BLOCK_G, BLOCK_D], q_ptr.dtype.element_ty)
        if num_tiles - first_tile <= STAGES:
            wait_for_previous(PDL)
    else:
        wait_for_previous(PDL)
        q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
    columns = (kv_head * HEAD_DIM + dims)[None, :]
    if (
        BLOCK_SIZE % BLOCK_N == 0
    ):  # a tile lies in one block: known a tile ahead, its keys do not wait for it
        in_tile = tl.arange(0, BLOCK_N)[:, None] * (KV_HEADS * HEAD_DIM) + columns
        block = tl.load(table + first_tile * BLOCK_N // BLOCK_SIZE).to(tl.int64)
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for tile in range(first_tile, last_tile):
        if READ_AHEAD:
            if tile == first_tile:
                wait_for_previous(PDL)
                q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0)
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = tokens < context_len
        if BLOCK_SIZE % BLOCK_N == 0:  # in 64 bits: a cache has more than 2^31 elements
            slot = block * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
            offsets = slot * (KV_HEADS * HEAD_DIM) + in_tile
            next_block = table + (tile + 1) * BLOCK_N // BLOCK_SIZE
            block = tl.load(next_block, mask=tile + 1 < last_tile, other=0).to(tl.int64)
        else:
            blocks = tl.load(table + tokens // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
            slots = blocks * BLOCK_SIZE + tokens % BLOCK_SIZE
            offsets = slots[:, None] * (KV_HEADS * HEAD_DIM) + columns
        kv_mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_cache_ptr + offsets, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_max = tl.maximum(
            row_max, tl.max(scores, 1)
        )  # finite: a tile has at least one valid token
        p = tl.exp2(scores - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        v = tl.load(v_cache_ptr + offsets, mask=kv_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    launch_next(PDL)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a padding row, with context 0, gives zeros
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    rows = (seq.to(tl.int64) * (KV_HEADS * GROUP) + heads) * num_splits + split
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out, mask=q_mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=group < GROUP)


@triton.jit(do_not_specialize=["num_splits"])
def _combine_kernel(
    partial_ptr,
    lse_ptr,
    out_ptr,
    context_lens_ptr,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64)  # one sequence and query head
    num_shares = _shares(tl.load(context_lens_ptr + row // HEADS), num_splits, BLOCK_N)[1]
    wait_for_previous(PDL)
    splits, dims = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    there = splits < num_shares
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=there, other=float("-inf"))
    largest = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    offsets = (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    partial = tl.load(
        partial_ptr + offsets, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
    )
    out = tl.sum(partial * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(
        out_ptr + row * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM
    )


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Attention of one query token a sequence over all its cached keys: a tensor like q. The launch does not depend
    on what `context_lens` and `block_tables` hold, so a CUDA graph can record it.

    q: `[num_seqs, heads, head_dim]`, fp16, bf16 or fp32; heads is a multiple of kv_heads.
    k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, of q's dtype.
    context_lens: `[num_seqs]` int32, tokens in the cache, the new one included. 0: a padding row; it gives zeros.
    block_tables: `[num_seqs, max_blocks]` int32; entries past the context are never used.
    scale, config: of the scores, usually head_dim ** -0.5; overrides `decode_config`, for tests and tuning.
    """
    (num_seqs, heads, head_dim), (block_size, kv_heads) = q.shape, k_cache.shape[1:3]
    assert heads % kv_heads == 0 and q.stride(2) == 1 and q.stride(1) == head_dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and block_tables.stride(1) == 1
    config = config or decode_config(num_seqs, kv_heads, head_dim, q.dtype, q.device, block_size)
    splits, group, block_d = (
        config.num_splits,
        heads // kv_heads,
        max(16, next_power_of_2(head_dim)),
    )
    partial = out = padded_empty(num_seqs, heads * head_dim, q).view(q.shape)
    lse = None  # without splits, the one share is the result
    if splits > 1:
        partial = torch.empty(
            num_seqs, heads, splits, head_dim, dtype=torch.float32, device=q.device
        )
        lse = torch.empty(num_seqs, heads, splits, dtype=torch.float32, device=q.device)
    _paged_decode_kernel[(kv_heads, splits, num_seqs)](
        q,
        k_cache,
        v_cache,
        partial,
        lse,
        context_lens,
        block_tables,
        q.stride(0),
        block_tables.stride(0),
        scale * math.log2(math.e),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_G=max(16, next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        READ_AHEAD=q.itemsize
        == 2,  # in float32, q carried through the loop would not stay in registers
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        **pdl_options(),
    )
    if splits > 1:
        _combine_kernel[(num_seqs * heads,)](
            partial,
            lse,
            out,
            context_lens,
            splits,
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_N=config.block_n,
            SPLITS=next_power_of_2(splits),
            **pdl_options(),
        )
    return out


def paged_decode_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path. On a GPU it does not wait for the device."""
    block_size, kv_heads = k_cache.shape[1:3]
    # The longest context if it costs nothing to know, else all that the tables could hold.
    max_len = (
        max(1, int(context_lens.max()))
        if q.device.type == "cpu"
        else block_tables.shape[1] * block_size
    )
    tokens, lens = torch.arange(max_len, device=q.device), context_lens.long()[:, None]
    # Positions past a sequence's end read its last token again, padding rows read slot 0: both exist.
    positions = tokens.minimum(lens - 1).clamp(min=0)
    blocks = block_tables.long().gather(1, positions // block_size)
    slots = torch.where(lens > 0, blocks * block_size + positions % block_size, 0)
    (
        k,
        v,
    ) = (  # [num_seqs, kv_heads, max_len, head_dim]; index_select is several times faster than indexing
        cache.flatten(0, 1)
        .index_select(0, slots.flatten())
        .unflatten(0, slots.shape)
        .transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    # The query heads that share a KV head take the place of query positions: K and V are not repeated.
    grouped, mask = q.unflatten(1, (kv_heads, -1)), (tokens < lens)[:, None, None, :]
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).flatten(1, 2)
    return torch.where(lens[:, :, None] > 0, out, 0)
