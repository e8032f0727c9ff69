"""Everything between the QKV projection and attention in one kernel.

The norms on q and k, the rotary embedding (RoPE; Su et al., RoFormer, 2021) and the writing of k
and v into the paged cache all touch the same few kilobytes of a token, which are read once here.
If the cache is FP8, so is their rounding to what it can hold: see fp8_cache.py.
"""

import torch
from torch import Tensor

from nanovllm.checkpoints.kv_scales import KVScales
from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_cache import as_bytes, round_to_cache
from nanovllm.kernels.rms_norm import rms_norm_torch

HEADS_PER_PROGRAM = 8  # enough programs at batch 1, not too many in a prefill of 16k tokens


@triton.jit
def _norm_rope_store_kernel(
    qkv_ptr,
    out_ptr,
    positions_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    eps,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_inverse,
    v_inverse,
    SPLITS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK_H heads of one token.

    RoPE rotates pairs of elements of a head, so a head is taken in pairs. The first elements of all
    pairs are one tile, `[BLOCK_H, BLOCK]`, and the second ones, `distance` further on, another.
    The first ROTATED pairs are rotated. If INTERLEAVED, all pairs are neighbours; else the elements
    that are not rotated are paired as those that are, the first half of them with the second.
    `k_inverse` and `v_inverse` are the scales' inverses if the cache is FP8, and else None.
    """
    launch_next(PDL)
    # The last token first: of a long prefill the L2 cache still holds the rows written last.
    token = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    # The heads of q come first in a row, then those of k, then those of v.
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS
    column = tl.arange(0, BLOCK)[None, :]
    HALF: tl.constexpr = HEAD_DIM // 2
    in_half = column < HALF
    mask = (head < HEADS + 2 * KV_HEADS) & in_half
    if INTERLEAVED:
        element = 2 * column
        distance = 1
    elif ROTATED == HALF or ROTATED == 0:
        element = column
        distance = HALF
    else:
        element = tl.where(column < ROTATED, column, column + ROTATED)
        distance = tl.where(column < ROTATED, ROTATED, HALF - ROTATED)
    if ROTATED > 0:
        is_rotated = column < ROTATED
        angle = tl.load(positions_ptr + token) * ROTATED + column
        cos = tl.load(cos_ptr + angle, mask=is_rotated, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=is_rotated, other=0.0)
        if ROTATED < HALF:
            cos = tl.where(is_rotated, cos, 1.0)  # the other pairs are turned by no angle
    if q_weight_ptr is not None:
        q_first = tl.load(q_weight_ptr + element, mask=in_half, other=0.0)
        k_first = tl.load(k_weight_ptr + element, mask=in_half, other=0.0)
        q_second = tl.load(q_weight_ptr + distance + element, mask=in_half, other=0.0)
        k_second = tl.load(k_weight_ptr + distance + element, mask=in_half, other=0.0)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + token).to(tl.int64)
    wait_for_previous(PDL)  # the projection before writes qkv; all that was loaded above is older
    offsets = (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + element
    first = tl.zeros(mask.shape, tl.float32)
    second = tl.zeros(mask.shape, tl.float32)
    for split in tl.static_range(SPLITS):  # the split-K partial sums of the projection
        split_size = tl.num_programs(0) * (HEADS + 2 * KV_HEADS) * HEAD_DIM
        split_ptr = qkv_ptr + offsets + split * split_size
        first += tl.load(split_ptr, mask=mask, other=0.0).to(tl.float32)
        second += tl.load(split_ptr + distance, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    first_in = first.to(dtype)
    second_in = second.to(dtype)
    if q_weight_ptr is not None:  # RMSNorm over a head
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first *= scale * tl.where(is_query, q_first, k_first).to(tl.float32)
        second *= scale * tl.where(is_query, q_second, k_second).to(tl.float32)
    if ROTATED > 0:
        rotated_first = first * cos - second * sin
        second = second * cos + first * sin
        first = rotated_first
    first_out = tl.where(is_value, first_in, first.to(dtype))
    second_out = tl.where(is_value, second_in, second.to(dtype))
    # In place, v is in `out` already; as a sum of splits it is not.
    changed = mask & ((head < HEADS + KV_HEADS) | (SPLITS > 1))
    first_stored = first_out
    second_stored = second_out
    if k_inverse is not None:
        # Rounded once, from what is not in 16 bits yet. The conversion saturates.
        inverse = tl.where(is_value, v_inverse, k_inverse)
        first_stored = tl.where(is_value, first_in.to(tl.float32), first) * inverse
        second_stored = tl.where(is_value, second_in.to(tl.float32), second) * inverse
        first_stored = first_stored.to(tl.float8e4nv)
        second_stored = second_stored.to(tl.float8e4nv)
        first_out = tl.where(is_query, first_out, first_stored.to(dtype))
        second_out = tl.where(is_query, second_out, second_stored.to(dtype))
        changed = mask
    tl.store(out_ptr + offsets, first_out, mask=changed)
    tl.store(out_ptr + offsets + distance, second_out, mask=changed)
    if slots_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if slot >= 0:
            is_key = mask & (head >= HEADS) & (head < HEADS + KV_HEADS)
            k_ptr = k_cache_ptr + (slot * KV_HEADS + head - HEADS) * HEAD_DIM + element
            v_ptr = v_cache_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM + element
            tl.store(k_ptr, first_stored, mask=is_key)
            tl.store(k_ptr + distance, second_stored, mask=is_key)
            tl.store(v_ptr, first_stored, mask=mask & is_value)
            tl.store(v_ptr + distance, second_stored, mask=mask & is_value)


def norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor | None,
    num_heads: int,
    interleaved: bool = False,
    scales: KVScales | None = None,
) -> Tensor:
    """Normalise and rotate q and k, store k and v in the cache, and return all three.

    The result, `[n, num_heads + 2 * kv_heads, head_dim]`, is in place of qkv, or a new tensor where
    qkv consists of partial sums. All is computed in float32. With `scales`, k and v of the result
    are what is stored.

    qkv: `[n, num_heads + 2 * kv_heads, head_dim]`, contiguous: the output of the projection, for
        each token the heads of q, of k, of v. Or `[splits, n, ...]`, the partial sums of it.
    positions: `[n]` int64, of the tokens.
    cos, sin: `[max_position, rotary_size / 2]` float32, the tables of the rotary embedding, which
        turns the first rotary_size elements of a head; None: nothing is rotated.
    q_weight, k_weight: `[head_dim]`, of the norms on q and k; None for a model without them.
    k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous.
    slot_mapping: `[n]` int32, where in the cache each token's k and v go; -1: nowhere. None:
        nothing is stored.
    num_heads: the query heads.
    interleaved: pair i is elements 2 i and 2 i + 1, not i and i + rotary_size / 2.
    scales: of k and v if the cache is FP8; None for a cache of qkv's dtype.
    """
    num_tokens, total_heads, head_dim = qkv.shape[-3:]
    pairs = 0 if cos is None else cos.shape[1]  # that are rotated
    assert qkv.is_contiguous() and head_dim % 2 == 0 and 2 * pairs <= head_dim
    splits = len(qkv) if qkv.dim() == 4 else 1
    out = qkv.view(qkv.shape[-3:]) if splits == 1 else torch.empty_like(qkv[0])
    _norm_rope_store_kernel[(num_tokens, triton.cdiv(total_heads, HEADS_PER_PROGRAM))](
        qkv,
        out,
        positions,
        cos,
        sin,
        q_weight,
        k_weight,
        eps,
        k_cache,
        v_cache,
        slot_mapping,
        None if scales is None else 1.0 / scales.k,
        None if scales is None else 1.0 / scales.v,
        SPLITS=splits,
        HEADS=num_heads,
        KV_HEADS=(total_heads - num_heads) // 2,
        HEAD_DIM=head_dim,
        ROTATED=pairs,
        INTERLEAVED=interleaved,
        BLOCK_H=HEADS_PER_PROGRAM,
        BLOCK=next_power_of_2(head_dim // 2),
        num_warps=8 if num_tokens <= 1024 else 2,
        **pdl_options(),
    )
    return out


def rotate(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first rotary_size elements of each of heads `[n, heads, head_dim]`.

    cos, sin: `[n, rotary_size / 2]`, of each token. The result is new, of the dtype of all.
    """
    cos = cos.unsqueeze(1)
    sin = sin.unsqueeze(1)
    rotary_size = 2 * cos.shape[-1]
    turning = heads[..., :rotary_size]
    if interleaved:
        first = turning[..., ::2]
        second = turning[..., 1::2]
    else:
        first, second = turning.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, heads[..., rotary_size:]), dim=-1)


def norm_rope_store_torch(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor | None,
    num_heads: int,
    interleaved: bool = False,
    scales: KVScales | None = None,
) -> Tensor:
    """`norm_rope_store` in PyTorch: the reference, and the CPU's path."""
    if qkv.dim() == 4:
        qkv = qkv.sum(0)
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    for x, weight in ((q, q_weight), (k, k_weight)):
        heads = x.float() if weight is None else rms_norm_torch(x.float(), weight, eps)
        if cos is not None and sin is not None:
            heads = rotate(heads, cos[positions], sin[positions], interleaved)
        x.copy_(heads)
    stored_k = k
    stored_v = v
    if scales is not None:
        stored_k, stored_v = round_to_cache(heads, v, scales)  # heads: those of k, in float32
        k.copy_(stored_k)
        v.copy_(stored_v)
    if slot_mapping is None:
        return qkv
    # Selecting the rows that are stored would tell the host their number, which a CUDA graph cannot
    # record. Instead a row that goes nowhere repeats the first one that is stored; when there is
    # none at all, slot 0 is overwritten with what it holds.
    stored = slot_mapping >= 0
    all_rows = torch.arange(len(stored), device=stored.device)
    rows = torch.where(stored, all_rows, stored.int().argmax())
    slots = slot_mapping[rows].clamp(min=0).long()
    for x, cache in ((stored_k, k_cache), (stored_v, v_cache)):
        flat = as_bytes(cache).flatten(0, 1)
        flat[slots] = torch.where(stored.any(), as_bytes(x)[rows], flat[slots])
    return qkv
