"""Decode attention of sequences that begin with the same blocks: what they share is read once.

`paged_decode` reads the whole context of each sequence. Where 256 sequences share a prompt of 2,048
tokens, it reads the same K and V 256 times, for two query heads each time. Here a *group* of such
sequences is attended to in three kernels ("Hydragen", Juravsky et al. 2024):

1. `_prefix_kernel`: a program takes a tile of up to 64 query rows, which are the members of a group
   times the query heads of a KV head, and a part of the group's prefix, which it reads once for all
   rows.
2. `_suffix_kernel`: as in `paged_decode`, a program takes one sequence, or a split of it, from the
   end of the prefix on. A sequence without a group has a prefix of no tokens.
3. `_merge_kernel` adds up what 1 and 2 have found, each with its log-sum-exp.

The first computes and hardly reads, the second reads and hardly computes. So they run side by side:
programs of 2 start as soon as all those of 1 have started, and need none of their results.

Which tiles there are is told in prefix_groups.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    TensorDescriptor,
    device_limits,
    has_tma,
    launch_next,
    next_power_of_2,
    pdl_options,
    soft_capped,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.decode_config import DecodeConfig, decode_config
from nanovllm.kernels.fp8_cache import as_operand, dot_dtype, read_slots
from nanovllm.kernels.prefix_tensors import PartialResults, SharedPrefixes
from nanovllm.kernels.suffix_decode import attend_to_suffixes, merge


class PrefixConfig(NamedTuple):
    """The tiles of `_prefix_kernel`; the result does not depend on them."""

    block_m: int  # query rows in a tile
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int  # tiles of K and V in shared memory


def prefix_config(
    head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int
) -> PrefixConfig:
    """Return the fastest measured tiles that fit in the shared memory."""
    block_n = 128
    if block_size % 16 == 0:
        # The largest power of two that divides block_size: a tile in one block is found faster.
        block_n = min(block_n, block_size & -block_size)
    if dtype.itemsize != 2:
        # fp32 runs without tensor cores, which would cost precision; larger tiles would spill.
        return PrefixConfig(16, min(32, block_n), num_warps=4, num_stages=2)
    block_m = 64
    row_bytes = next_power_of_2(head_dim) * dtype.itemsize
    stages = 2 if block_n == 128 else 3
    _, shared_memory = device_limits(device)
    while (block_m + 2 * stages * block_n) * row_bytes > shared_memory and block_n > 16:
        block_n //= 2
    return PrefixConfig(block_m, block_n, num_warps=4, num_stages=stages)


def suffix_config(num_seqs: int, heads: int, k_cache: Tensor, dtype: torch.dtype) -> DecodeConfig:
    """Return the fastest measured configuration for what is behind the prefixes."""
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    device = k_cache.device
    config = decode_config(
        num_seqs, kv_heads, head_dim, dtype, device, block_size, cache_dtype=k_cache.dtype
    )
    if config.num_splits > 1 or dtype.itemsize != 2:
        return config._replace(num_stages=3)  # for any number of sequences one kernel to compile
    # There are many programs with little to read. If they are small, many fit on a multiprocessor,
    # beside a program of `_prefix_kernel`.
    num_warps = 2 if heads // kv_heads <= 16 else 4
    return DecodeConfig(min(32, config.block_n), num_splits=1, num_warps=num_warps)


@triton.jit(
    do_not_specialize=[
        "tiles_ptr",
        "members_ptr",
        "block_tables_ptr",
        "table_stride",
        "column_stride",
        "num_slots",
    ]
)
def _prefix_kernel(
    q_ptr,
    k_cache,
    v_cache,
    results_ptr,
    lse_ptr,
    tiles_ptr,
    members_ptr,
    block_tables_ptr,
    q_stride,
    table_stride,
    column_stride,
    num_slots,
    scale_log2,
    softcap_log2,
    v_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes a tile of rows and a part of their prefix, for one KV head.

    With TMA, `k_cache` and `v_cache` are tensor descriptors. `softcap_log2` is None without a cap.
    """
    kv_head = tl.program_id(0)
    tile_ptr = tiles_ptr + tl.program_id(1) * 5
    first_member = tl.load(tile_ptr)
    num_members = tl.load(tile_ptr + 1)
    first_key = tl.load(tile_ptr + 2)
    num_keys = tl.load(tile_ptr + 3)
    part = tl.load(tile_ptr + 4)
    # Every program waits before it lets the next kernel start, also one that finds no work. So when
    # a program of `_suffix_kernel` starts, the kernel that stored q, K and V has ended.
    wait_for_previous(PDL)
    launch_next(PDL)
    if num_keys == 0:  # the list has room for more tiles
        return
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    is_row = rows < num_members * GROUP
    seqs = tl.load(members_ptr + first_member + rows // GROUP, mask=is_row, other=0).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = seqs * q_stride + heads * HEAD_DIM
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    q = as_operand(q, DOT_DTYPE)
    # The block table of any member: up to the end of the prefix they are equal.
    seq = tl.load(members_ptr + first_member)
    table_ptr = block_tables_ptr + seq * table_stride
    scores_to_log2 = scale_log2 if softcap_log2 is None else 1.0
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = first_key + num_keys
    for start in range(first_key, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        if BLOCK_SIZE % BLOCK_N == 0:
            # A tile lies in one block, and the prefix consists of whole tiles.
            block = tl.load(table_ptr + start // BLOCK_SIZE * column_stride)
            row = block * BLOCK_SIZE + start % BLOCK_SIZE
            if TMA:
                k = k_cache.load([row, kv_head * HEAD_DIM])
                v = v_cache.load([row, kv_head * HEAD_DIM])
            else:
                slots = row.to(tl.int64) + tl.arange(0, BLOCK_N)
                offsets = (
                    slots[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + dims[None, :]
                )
                kv_mask = (dims < HEAD_DIM)[None, :]
                k = tl.load(k_cache + offsets, mask=kv_mask, other=0.0)
                v = tl.load(v_cache + offsets, mask=kv_mask, other=0.0)
        else:
            is_key = keys < end
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE * column_stride, mask=is_key, other=0)
            slots = blocks.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE
            offsets = slots[:, None] * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM + dims[None, :]
            kv_mask = is_key[:, None] & (dims < HEAD_DIM)[None, :]
            k = tl.load(k_cache + offsets, mask=kv_mask, other=0.0)
            v = tl.load(v_cache + offsets, mask=kv_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee")
        if softcap_log2 is not None:
            scores = soft_capped(scores * scale_log2, softcap_log2)
        if BLOCK_SIZE % BLOCK_N != 0:
            scores = tl.where((keys < end)[None, :], scores, float("-inf"))
        # Online softmax, to the base 2, as in `paged_decode`. Each tile has a key that is seen.
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scores_to_log2)
        p = tl.exp2(scores * scores_to_log2 - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        v = v.to(DOT_DTYPE)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    if v_scale is not None:
        acc *= v_scale
    result_rows = (seqs * (KV_HEADS * GROUP) + heads) * num_slots + part
    tl.store(
        results_ptr + result_rows[:, None] * HEAD_DIM + dims[None, :],
        acc / row_sum[:, None],
        mask=mask,
    )
    tl.store(lse_ptr + result_rows, row_max + tl.log2(row_sum), mask=is_row)


def attend_to_prefixes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefixes: SharedPrefixes,
    results: PartialResults,
    block_tables: Tensor,
    scale: float,
    softcap: float | None,
    v_scale: float | None,
    tiles: PrefixConfig,
) -> None:
    """Write the attention of all members to the parts of their group's prefix into `results`.

    The arguments are those of `shared_prefix_decode`.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    block_d = max(16, next_power_of_2(head_dim))
    # TMA copies a tile in one piece.
    uses_tma = (
        has_tma() and q.itemsize == 2 and block_size % tiles.block_n == 0 and head_dim == block_d
    )
    _prefix_kernel[(kv_heads, len(prefixes.tiles))](
        q,
        _tile_descriptor(k_cache, tiles.block_n) if uses_tma else k_cache,
        _tile_descriptor(v_cache, tiles.block_n) if uses_tma else v_cache,
        results.values,
        results.lse,
        prefixes.tiles,
        prefixes.members,
        block_tables,
        q.stride(0),
        block_tables.stride(0),
        block_tables.stride(1),
        results.num_slots,
        scale * math.log2(math.e),
        None if softcap is None else softcap * math.log2(math.e),
        v_scale,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_D=block_d,
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        DOT_DTYPE=dot_dtype(q, k_cache),
        TMA=uses_tma,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **pdl_options(),
    )


def _tile_descriptor(cache: Tensor, tile_rows: int) -> TensorDescriptor:
    """Describe K or V to TMA as a matrix of tiles, with a row for each slot."""
    slots = cache.view(-1, cache.shape[2] * cache.shape[3])
    tile = [tile_rows, cache.shape[3]]
    return TensorDescriptor(slots, [*slots.shape], [slots.stride(0), 1], tile)


def shared_prefix_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefixes: SharedPrefixes,
    block_tables: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    v_scale: float | None = None,
    config: DecodeConfig | None = None,
    tiles: PrefixConfig | None = None,
) -> Tensor:
    """Return what `paged_decode` does, reading what a group shares once: a tensor like q.

    The launches do not depend on the contents of `prefixes` and `block_tables`, so that a CUDA
    graph can record them.

    q, k_cache, v_cache, block_tables, scale, softcap, v_scale: as in `paged_decode`.
    prefixes: which sequences share what; a sequence's last token is never in a shared prefix.
    config: overrides `suffix_config`, for tests and tuning.
    tiles: overrides `prefix_config`; the list in `prefixes` must have been made for them.
    """
    num_seqs, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    assert heads % kv_heads == 0 and q.stride(2) == 1 and q.stride(1) == head_dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous() and prefixes.tiles.is_contiguous()
    tiles = tiles or prefix_config(head_dim, q.dtype, q.device, block_size)
    if config is None:
        config = suffix_config(num_seqs, heads, k_cache, q.dtype)
    shape = (num_seqs, heads, prefixes.max_parts + config.num_splits)
    results = PartialResults(
        values=torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device),
        lse=torch.empty(shape, dtype=torch.float32, device=q.device),
    )
    inputs = (q, k_cache, v_cache, prefixes, results, block_tables, scale, softcap, v_scale)
    attend_to_prefixes(*inputs, tiles)
    attend_to_suffixes(*inputs, config)
    return merge(prefixes, results, q, config)


def shared_prefix_decode_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefixes: SharedPrefixes,
    block_tables: Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    v_scale: float | None = None,
) -> Tensor:
    """`shared_prefix_decode` in PyTorch, one tile or sequence after the other: the reference."""
    num_seqs, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    grouped = q.float().unflatten(1, (kv_heads, -1))  # [num_seqs, kv_heads, GROUP, head_dim]
    # Of each row the sum of exp(score) * value, and the sum of exp(score), over the keys so far.
    sums = torch.zeros(grouped.shape, device=q.device)
    weights = torch.zeros(grouped.shape[:3], device=q.device)

    def attend(rows: Tensor, first_key: int, num_keys: int) -> None:
        keys = torch.arange(first_key, first_key + num_keys, device=q.device)
        blocks = block_tables[rows[0], keys // block_size].long()
        slots = blocks * block_size + keys % block_size
        k = read_slots(k_cache.flatten(0, 1), slots, torch.float32)  # [num_keys, kv_heads, ...]
        v = read_slots(v_cache.flatten(0, 1), slots, torch.float32)
        scores = torch.einsum("rhgd,khd->rhgk", grouped[rows], k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.exp()
        sums[rows] += torch.einsum("rhgk,khd->rhgd", scores, v)
        weights[rows] += scores.sum(-1)

    for first_member, num_members, first_key, num_keys, _ in prefixes.tiles.tolist():
        if num_keys > 0:
            rows = prefixes.members[first_member : first_member + num_members].long()
            attend(rows, first_key, num_keys)
    for seq in range(num_seqs):
        suffix_len = int(prefixes.suffix_lens[seq])
        attend(torch.tensor([seq], device=q.device), int(prefixes.prefix_lens[seq]), suffix_len)
    out = sums / weights.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    if v_scale is not None:
        out = out * v_scale
    return out.flatten(1, 2).to(q.dtype)
