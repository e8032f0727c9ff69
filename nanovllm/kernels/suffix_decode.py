"""Decode attention behind shared prefixes, and what it is together with theirs.

shared_prefix.py tells how this belongs together.
"""

import math

from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    padded_empty,
    pdl_options,
    soft_capped,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.decode_config import DecodeConfig
from nanovllm.kernels.fp8_cache import as_operand, dot_dtype, unpack_pairs, unpacks_natively
from nanovllm.kernels.paged_decode import _divide_tiles
from nanovllm.kernels.prefix_tensors import PartialResults, SharedPrefixes

MERGED_HEADS = 4  # of a program of `_merge_kernel`


@triton.jit(
    do_not_specialize=[
        "suffix_lens_ptr",
        "prefix_lens_ptr",
        "block_tables_ptr",
        "table_stride",
        "column_stride",
        "max_parts",
        "num_slots",
    ]
)
def _suffix_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    results_ptr,
    lse_ptr,
    suffix_lens_ptr,
    prefix_lens_ptr,
    block_tables_ptr,
    q_stride,
    table_stride,
    column_stride,
    max_parts,
    num_slots,
    scale_log2,
    softcap_log2,
    v_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one split of a sequence's suffix, for the GROUP query heads of one KV head.

    It differs from `_paged_decode_kernel` in where the context begins, and in what it waits for.
    Its result goes into slot `max_parts + split`.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    num_splits = tl.num_programs(1)
    suffix_len = tl.load(suffix_lens_ptr + seq)
    prefix_len = tl.load(prefix_lens_ptr + seq)
    num_tiles = tl.cdiv(suffix_len, BLOCK_N)
    tiles_per_split, used_splits = _divide_tiles(num_tiles, num_splits)
    if split >= used_splits:
        return
    # There is no wait for q and for the newest K and V: see `_prefix_kernel`. A multiprocessor may
    # still have old contents of their memory in its L1 cache, and ".cg" reads past that.
    group = tl.arange(0, BLOCK_G)
    heads = kv_head * GROUP + group
    dims = tl.arange(0, BLOCK_D)
    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = seq.to(tl.int64) * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0, cache_modifier=".cg")
    q = as_operand(q, DOT_DTYPE)
    table_ptr = block_tables_ptr + seq * table_stride + prefix_len // BLOCK_SIZE * column_stride
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)  # exclusive
    columns = (kv_head * HEAD_DIM + dims)[None, :]
    if BLOCK_SIZE % BLOCK_N == 0:
        # A tile lies in one block, whose number is loaded one round ahead.
        in_tile = tl.arange(0, BLOCK_N)[:, None] * (KV_HEADS * HEAD_DIM) + columns
        block = tl.load(table_ptr + first_tile * BLOCK_N // BLOCK_SIZE * column_stride).to(tl.int64)
    NUM_SUMS: tl.constexpr = BLOCK_D if v_scale is None else BLOCK_D // 2
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, NUM_SUMS], tl.float32)
    if v_scale is not None:
        odd_acc = tl.zeros([BLOCK_G, NUM_SUMS], tl.float32)  # and `acc` is of the even dimensions
        pairs = tl.arange(0, NUM_SUMS)
        pair_columns = (kv_head * (HEAD_DIM // 2) + pairs)[None, :]
        v_pairs_ptr = v_cache_ptr.to(tl.pointer_type(tl.int16))
    for tile in range(first_tile, last_tile):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = tokens < suffix_len
        if BLOCK_SIZE % BLOCK_N == 0:
            slot = block * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
            slots = slot + tl.arange(0, BLOCK_N)
            offsets = slot * (KV_HEADS * HEAD_DIM) + in_tile
            next_ptr = table_ptr + (tile + 1) * BLOCK_N // BLOCK_SIZE * column_stride
            block = tl.load(next_ptr, mask=tile + 1 < last_tile, other=0).to(tl.int64)
        else:
            blocks = tl.load(table_ptr + tokens // BLOCK_SIZE * column_stride, mask=valid, other=0)
            slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
            offsets = slots[:, None] * (KV_HEADS * HEAD_DIM) + columns
        kv_mask = valid[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(k_cache_ptr + offsets, mask=kv_mask, other=0.0, cache_modifier=".cg")
        scores = tl.dot(q, tl.trans(k.to(DOT_DTYPE)), input_precision="ieee") * scale_log2
        if softcap_log2 is not None:
            scores = soft_capped(scores, softcap_log2)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        p = p.to(DOT_DTYPE)
        if v_scale is None:
            v = tl.load(v_cache_ptr + offsets, mask=kv_mask, other=0.0, cache_modifier=".cg")
            acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
        else:
            pair_offsets = slots[:, None] * (KV_HEADS * HEAD_DIM // 2) + pair_columns
            pair_mask = valid[:, None] & (pairs < HEAD_DIM // 2)[None, :]
            v_pairs = tl.load(
                v_pairs_ptr + pair_offsets, mask=pair_mask, other=0, cache_modifier=".cg"
            )
            even, odd = unpack_pairs(v_pairs, DOT_DTYPE, NATIVE)
            acc = tl.dot(p, even, acc * alpha[:, None], input_precision="ieee")
            odd_acc = tl.dot(p, odd, odd_acc * alpha[:, None], input_precision="ieee")
    launch_next(PDL)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # of a padding row, whose context is 0
    if v_scale is not None:
        acc = tl.interleave(acc, odd_acc) * v_scale
    rows = (seq.to(tl.int64) * (KV_HEADS * GROUP) + heads) * num_slots + max_parts + split
    tl.store(
        results_ptr + rows[:, None] * HEAD_DIM + dims[None, :], acc / row_sum[:, None], mask=q_mask
    )
    tl.store(lse_ptr + rows, row_max + tl.log2(row_sum), mask=group < GROUP)
    # When this kernel has ended, so must have `_prefix_kernel`, for the merge. The programs of one
    # sequence wait for it; all others make room for the next ones at once.
    if seq == tl.num_programs(2) - 1:
        wait_for_previous(PDL)


@triton.jit(do_not_specialize=["max_parts", "num_slots", "num_splits"])
def _merge_kernel(
    results_ptr,
    lse_ptr,
    out_ptr,
    suffix_lens_ptr,
    num_parts_ptr,
    max_parts,
    num_slots,
    num_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program adds up the parts of a prefix and the splits of the suffix, for BLOCK_H heads.

    Each counts like a key whose score is the log-sum-exp of its keys, and whose value its result.
    """
    launch_next(PDL)
    seq = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    mask = (heads < HEADS)[:, None] & (dims < HEAD_DIM)[None, :]
    num_parts = tl.load(num_parts_ptr + seq)
    suffix_len = tl.load(suffix_lens_ptr + seq)
    _, used_splits = _divide_tiles(tl.cdiv(suffix_len, BLOCK_N), num_splits)
    rows = seq.to(tl.int64) * HEADS + heads
    row_max = tl.full([BLOCK_H], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    wait_for_previous(PDL)
    for index in range(num_parts + used_splits):
        slot = tl.where(index < num_parts, index, max_parts + index - num_parts)
        slot_rows = rows * num_slots + slot
        lse = tl.load(lse_ptr + slot_rows, mask=heads < HEADS, other=0.0)
        values = tl.load(
            results_ptr + slot_rows[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0
        )
        new_max = tl.maximum(row_max, lse)
        # A padding row has seen no keys; -inf less -inf would be NaN.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(lse - finite_max)
        alpha = tl.exp2(row_max - finite_max)
        row_sum = row_sum * alpha + weight
        row_max = new_max
        acc = acc * alpha[:, None] + values * weight[:, None]
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)


def attend_to_suffixes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    prefixes: SharedPrefixes,
    results: PartialResults,
    block_tables: Tensor,
    scale: float,
    softcap: float | None,
    v_scale: float | None,
    config: DecodeConfig,
) -> None:
    """Write the attention to what is behind the prefixes into `results`.

    It must be launched right behind `attend_to_prefixes`, and the next launch must be `merge`. The
    arguments are those of `shared_prefix_decode`.
    """
    num_seqs, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    _suffix_kernel[(kv_heads, config.num_splits, num_seqs)](
        q,
        k_cache,
        v_cache,
        results.values,
        results.lse,
        prefixes.suffix_lens,
        prefixes.prefix_lens,
        block_tables,
        q.stride(0),
        block_tables.stride(0),
        block_tables.stride(1),
        prefixes.max_parts,
        results.num_slots,
        scale * math.log2(math.e),
        None if softcap is None else softcap * math.log2(math.e),
        v_scale,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_G=max(16, next_power_of_2(group)),
        BLOCK_D=max(16, next_power_of_2(head_dim)),
        BLOCK_N=config.block_n,
        DOT_DTYPE=dot_dtype(q, k_cache),
        NATIVE=unpacks_natively(q),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.max_registers,
        **pdl_options(),
    )


def merge(
    prefixes: SharedPrefixes, results: PartialResults, like: Tensor, config: DecodeConfig
) -> Tensor:
    """Add up the partial results: a tensor like `like`, `[n, heads, head_dim]`, contiguous."""
    num_seqs, heads, head_dim = like.shape
    out = padded_empty(num_seqs, heads * head_dim, like).view(like.shape)
    _merge_kernel[(num_seqs, triton.cdiv(heads, MERGED_HEADS))](
        results.values,
        results.lse,
        out,
        prefixes.suffix_lens,
        prefixes.num_parts,
        prefixes.max_parts,
        results.num_slots,
        config.num_splits,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_H=MERGED_HEADS,
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_N=config.block_n,
        num_warps=1,
        **pdl_options(),
    )
    return out
