"""Decode attention: one new query token a sequence, keys and values read from the paged cache.

Nearly all the time goes into reading K and V. Therefore each is read once, for all query heads that
share a KV head, in tiles; the next tiles are loaded while one is computed, with the online softmax
of Milakov & Gimelshein (2018). The first tiles are loaded even before the previous kernel has
ended. Where there are too few sequences to occupy the GPU, several programs share each, and a
second kernel combines their results ("Flash-Decoding", Dao et al. 2023).
"""

import math

import torch
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
from nanovllm.kernels.decode_config import DecodeConfig, decode_config
from nanovllm.kernels.fp8_cache import (
    as_bytes,
    as_operand,
    dot_dtype,
    unpack_pairs,
    unpacks_natively,
)
from nanovllm.kernels.torch_attention import masked_attention


@triton.jit
def _first_seen_tile(context_len, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """The first tile of a sequence that its query sees."""
    if WINDOW:
        first = tl.maximum(context_len - WINDOW, 0) // BLOCK_N
    else:
        first = 0
    return first


@triton.jit
def _divide_tiles(num_tiles, num_splits):
    """How many tiles a split takes, and how many splits then have any: at least 1."""
    tiles_per_split = tl.maximum(tl.cdiv(num_tiles, num_splits), 1)
    used_splits = tl.maximum(tl.cdiv(num_tiles, tiles_per_split), 1)
    return tiles_per_split, used_splits


@triton.jit(
    do_not_specialize=["context_lens_ptr", "block_tables_ptr", "table_stride", "column_stride"]
)
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
    column_stride,
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
    WINDOW: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    NATIVE: tl.constexpr,
    STAGES: tl.constexpr,
    READ_AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one split of one sequence, for the GROUP query heads of one KV head.

    The query sees the last WINDOW tokens; 0: all. `softcap_log2` is None without a cap, `v_scale`
    unless the cache is FP8; for DOT_DTYPE, NATIVE, and V in pairs see fp8_cache.py.
    """
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    num_splits = tl.num_programs(1)
    # A CUDA graph fixes the number of splits, but not the context length. So the tiles that there
    # are in this step are divided among the splits, and a split without any ends here.
    context_len = tl.load(context_lens_ptr + seq)
    first_seen = _first_seen_tile(context_len, BLOCK_N, WINDOW)
    num_tiles = tl.cdiv(context_len, BLOCK_N)
    tiles_per_split, used_splits = _divide_tiles(num_tiles - first_seen, num_splits)
    if split >= used_splits:
        return
    # At least 16 rows, as tl.dot needs them; those from GROUP on are padding.
    group = tl.arange(0, BLOCK_G)
    heads = kv_head * GROUP + group
    dims = tl.arange(0, BLOCK_D)
    q_mask = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    q_offsets = seq.to(tl.int64) * q_stride + heads[:, None] * HEAD_DIM + dims[None, :]
    table_ptr = block_tables_ptr + seq * table_stride
    first_tile = first_seen + split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)  # exclusive
    # A decode step writes K and V of the newest tokens only, each in its sequence's last tile. The
    # other tiles are from earlier steps. As each step begins with copies or plain kernels, they can
    # be read before `wait_for_previous`. For a prefill see `AttentionBackend.last_tokens_plan`.
    if READ_AHEAD:
        # The wait stands in the loop's first round. Triton pipelines the loop: it moves the loads
        # of the first STAGES - 1 tiles in front of the loop, and so in front of the wait. If the
        # last tile may be one of these, the wait must come here. q is loaded after the wait.
        q = tl.zeros([BLOCK_G, BLOCK_D], DOT_DTYPE)
        if num_tiles - first_tile <= STAGES:
            wait_for_previous(PDL)
    else:
        wait_for_previous(PDL)
        q = as_operand(tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0), DOT_DTYPE)
    columns = (kv_head * HEAD_DIM + dims)[None, :]
    if BLOCK_SIZE % BLOCK_N == 0:
        # A tile lies in one block. The block's number is loaded one round ahead, so that the loads
        # of K and V need not wait for it.
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
        if READ_AHEAD:  # noqa: SIM102 (this is decided when the kernel is compiled)
            if tile == first_tile:
                wait_for_previous(PDL)
                q = as_operand(tl.load(q_ptr + q_offsets, mask=q_mask, other=0.0), DOT_DTYPE)
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = tokens < context_len
        if WINDOW:
            valid = valid & (tokens >= context_len - WINDOW)
        # The offsets have 64 bits, as a cache has more than 2^31 elements.
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
        k = tl.load(k_cache_ptr + offsets, mask=kv_mask, other=0.0).to(DOT_DTYPE)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        if softcap_log2 is not None:
            scores = soft_capped(scores, softcap_log2)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        # Online softmax, to the base 2: whenever the maximum grows, what was summed is scaled down.
        # The maximum is finite, since each tile has at least one valid token.
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        p = tl.exp2(scores - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        p = p.to(DOT_DTYPE)
        if v_scale is None:
            v = tl.load(v_cache_ptr + offsets, mask=kv_mask, other=0.0)
            acc = tl.dot(p, v, acc * alpha[:, None], input_precision="ieee")
        else:
            pair_offsets = slots[:, None] * (KV_HEADS * HEAD_DIM // 2) + pair_columns
            pair_mask = valid[:, None] & (pairs < HEAD_DIM // 2)[None, :]
            v_pairs = tl.load(v_pairs_ptr + pair_offsets, mask=pair_mask, other=0)
            even, odd = unpack_pairs(v_pairs, DOT_DTYPE, NATIVE)
            acc = tl.dot(p, even, acc * alpha[:, None], input_precision="ieee")
            odd_acc = tl.dot(p, odd, odd_acc * alpha[:, None], input_precision="ieee")
    launch_next(PDL)
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # of a padding row, whose context is 0: zeros
    if v_scale is not None:
        acc = tl.interleave(acc, odd_acc) * v_scale
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
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program combines the splits of one sequence and query head.

    Each split's output is weighted by its part of the sum of exponentials, which follows from its
    log-sum-exp (to the base 2).
    """
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    context_len = tl.load(context_lens_ptr + row // HEADS)
    first_seen = _first_seen_tile(context_len, BLOCK_N, WINDOW)
    _, used_splits = _divide_tiles(tl.cdiv(context_len, BLOCK_N) - first_seen, num_splits)
    wait_for_previous(PDL)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_D)
    is_used = splits < used_splits
    lse = tl.load(lse_ptr + row * num_splits + splits, mask=is_used, other=float("-inf"))
    largest = tl.max(lse, 0)
    # A padding row, whose context is 0, has no largest; its weights shall be 0 and not NaN.
    weights = tl.exp2(lse - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(weights, 0)
    offsets = (row * num_splits + splits)[:, None] * HEAD_DIM + dims[None, :]
    partial = tl.load(
        partial_ptr + offsets, mask=is_used[:, None] & (dims < HEAD_DIM)[None, :], other=0.0
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
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: float | None = None,
    config: DecodeConfig | None = None,
) -> Tensor:
    """Return the attention of one query token a sequence over its cached tokens: a tensor like q.

    The launch does not depend on the contents of `context_lens` and `block_tables`, so that a CUDA
    graph can record it.

    q: `[num_seqs, heads, head_dim]`, fp16, bf16 or fp32; heads is a multiple of kv_heads. The rows
        may have any stride, as slices of the QKV output have.
    k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, of q's dtype or
        FP8 (e4m3).
    context_lens: `[num_seqs]` int32, each sequence's tokens in the cache, with the new one. 0 is a
        padding row, whose result is zeros.
    block_tables: `[num_seqs, max_blocks]` int32, any strides; entries past the context are unused.
    scale: of the scores, usually head_dim ** -0.5; times the scale of K in an FP8 cache.
    window: the query sees the last `window` tokens, its own included; None: all. The others are not
        read.
    softcap: a scaled score s becomes softcap * tanh(s / softcap), or stays s with None.
    v_scale: the scale of V in an FP8 cache; None for any other cache.
    config: overrides `decode_config`, for tests and tuning.
    """
    num_seqs, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    assert heads % kv_heads == 0 and q.stride(2) == 1 and q.stride(1) == head_dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    config = config or decode_config(
        num_seqs, kv_heads, head_dim, q.dtype, q.device, block_size, window, k_cache.dtype
    )
    splits = config.num_splits
    group = heads // kv_heads
    block_d = max(16, next_power_of_2(head_dim))
    out = padded_empty(num_seqs, heads * head_dim, q).view(q.shape)
    partial = out  # without splits, the only split's result is the result
    lse = None
    if splits > 1:
        shape = (num_seqs, heads, splits)
        partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(shape, dtype=torch.float32, device=q.device)
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
        block_tables.stride(1),
        scale * math.log2(math.e),
        None if softcap is None else softcap * math.log2(math.e),
        v_scale,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_G=max(16, next_power_of_2(group)),
        BLOCK_D=block_d,
        BLOCK_N=config.block_n,
        WINDOW=window or 0,
        DOT_DTYPE=dot_dtype(q, k_cache),
        NATIVE=unpacks_natively(q),
        STAGES=config.num_stages,
        # In float32 the q that the loop carries would not stay in registers.
        READ_AHEAD=q.itemsize == 2,
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
            WINDOW=window or 0,
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
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: float | None = None,
) -> Tensor:
    """`paged_decode` in PyTorch: the reference, and the CPU's path.

    On a GPU the host does not wait for the device, so that a CUDA graph can record it.
    """
    block_size, kv_heads = k_cache.shape[1:3]
    if q.device.type == "cpu":
        max_len = max(1, int(context_lens.max()))
    else:  # asking for the longest context would wait for the device: take what the tables can hold
        max_len = block_tables.shape[1] * block_size
    tokens = torch.arange(max_len, device=q.device)
    lens = context_lens.long()[:, None]
    # Positions past a sequence's end read its last token again, padding rows slot 0: both exist.
    positions = tokens.minimum(lens - 1).clamp(min=0)
    blocks = block_tables.long().gather(1, positions // block_size)
    slots = torch.where(lens > 0, blocks * block_size + positions % block_size, 0)

    def gathered(cache: Tensor) -> Tensor:  # [num_seqs, kv_heads, max_len, head_dim]
        rows = as_bytes(cache).flatten(0, 1).index_select(0, slots.flatten())  # beats indexing
        return rows.view(cache.dtype).to(q.dtype).unflatten(0, slots.shape).transpose(1, 2)

    # The query heads that share a KV head take the place of query positions: K and V are not
    # repeated.
    grouped = q.unflatten(1, (kv_heads, -1))
    mask = tokens < lens
    if window is not None:
        mask &= tokens >= lens - window
    out = masked_attention(
        grouped, gathered(k_cache), gathered(v_cache), mask[:, None, None, :], scale, softcap
    )
    if v_scale is not None:
        out = out * v_scale
    return torch.where(lens[:, :, None] > 0, out.flatten(1, 2), 0)
