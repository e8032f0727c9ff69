"""Everything between the QKV projection and attention in one kernel: q-norm, k-norm, rotary embedding and the write
of K and V into the paged cache touch the same few kilobytes of a token, so one program reads them once."""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
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
    PARTS: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    # Backwards: of a long prefill the L2 cache still holds what was written last.
    token = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[
        :, None
    ]  # q heads, then k heads, then v heads
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    half = tl.arange(0, BLOCK)[None, :]
    HALF: tl.constexpr = HEAD_DIM // 2
    in_half = half < HALF
    mask = (head < HEADS + 2 * KV_HEADS) & in_half
    angle = tl.load(positions_ptr + token) * HALF + half
    cos, sin = (
        tl.load(cos_ptr + angle, mask=in_half, other=0.0),
        tl.load(sin_ptr + angle, mask=in_half, other=0.0),
    )
    if q_weight_ptr is not None:
        q_first = tl.load(q_weight_ptr + half, mask=in_half, other=0.0)
        k_first = tl.load(k_weight_ptr + half, mask=in_half, other=0.0)
        q_second = tl.load(q_weight_ptr + HALF + half, mask=in_half, other=0.0)
        k_second = tl.load(k_weight_ptr + HALF + half, mask=in_half, other=0.0)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + token).to(tl.int64)
    wait_for_previous(PDL)  # the projection writes qkv; the rest is older
    offsets = (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + half
    first, second = tl.zeros(mask.shape, tl.float32), tl.zeros(mask.shape, tl.float32)
    for part in tl.static_range(PARTS):
        part_ptr = (
            qkv_ptr + offsets + part * (tl.num_programs(0) * (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        )
        first += tl.load(part_ptr, mask=mask, other=0.0).to(tl.float32)
        second += tl.load(part_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    first_in, second_in = first.to(dtype), second.to(dtype)
    if q_weight_ptr is not None:
        scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / HEAD_DIM + eps)[
            :, None
        ]
        first *= scale * tl.where(is_query, q_first, k_first).to(tl.float32)
        second *= scale * tl.where(is_query, q_second, k_second).to(tl.float32)
    first_out = tl.where(is_value, first_in, (first * cos - second * sin).to(dtype))
    second_out = tl.where(is_value, second_in, (second * cos + first * sin).to(dtype))
    changed = mask & ((head < HEADS + KV_HEADS) | (PARTS > 1))
    tl.store(out_ptr + offsets, first_out, mask=changed)
    tl.store(out_ptr + offsets + HALF, second_out, mask=changed)
    if slots_ptr is not None:
        if slot >= 0:
            is_key = mask & (head >= HEADS) & (head < HEADS + KV_HEADS)
            k_ptr = k_cache_ptr + (slot * KV_HEADS + head - HEADS) * HEAD_DIM + half
            v_ptr = v_cache_ptr + (slot * KV_HEADS + head - HEADS - KV_HEADS) * HEAD_DIM + half
            tl.store(k_ptr, first_out, mask=is_key)
            tl.store(k_ptr + HALF, second_out, mask=is_key)
            tl.store(v_ptr, first_out, mask=mask & is_value)
            tl.store(v_ptr + HALF, second_out, mask=mask & is_value)


def norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor | None,
    num_heads: int,
) -> Tensor:
    """Normalise and rotate q and k, store k and v in the cache, and return all three; in place of qkv, but for parts.

    qkv: `[n, num_heads + 2 * kv_heads, head_dim]`, contiguous: the projection's output; or `[parts, n, ...]`, whose
        sum that is.
    positions, cos, sin: `[n]` int64; the tables, `[max_position, head_dim / 2]` float32.
    q_weight, k_weight: `[head_dim]` of the norms on q and k; None for a model without them.
    k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous.
    slot_mapping: `[n]` int32, -1 writes nowhere; None: nothing is stored.
    """
    num_tokens, total_heads, head_dim = qkv.shape[-3:]
    assert qkv.is_contiguous() and head_dim % 2 == 0
    num_parts = len(qkv) if qkv.dim() == 4 else 1
    out = qkv.view(qkv.shape[-3:]) if num_parts == 1 else torch.empty_like(qkv[0])
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
        PARTS=num_parts,
        HEADS=num_heads,
        KV_HEADS=(total_heads - num_heads) // 2,
        HEAD_DIM=head_dim,
        BLOCK_H=HEADS_PER_PROGRAM,
        BLOCK=next_power_of_2(head_dim // 2),
        num_warps=8 if num_tokens <= 1024 else 2,
        **pdl_options(),
    )
    return out


def norm_rope_store_torch(
    qkv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor | None,
    num_heads: int,
) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    qkv = qkv if qkv.dim() == 3 else qkv.sum(0)
    num_kv_heads = (qkv.shape[1] - num_heads) // 2
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    cos, sin = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = x.float() if weight is None else rms_norm_torch(x.float(), weight, eps)
        first, second = normed.chunk(2, dim=-1)
        x.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    if slot_mapping is None:
        return qkv
    # A CUDA graph can record this: the number of rows to store stays unknown to the host. A row that goes nowhere
    # repeats the first one that is stored; when there is none at all, slot 0 is overwritten with what it holds.
    stored = slot_mapping >= 0
    rows = torch.where(
        stored, torch.arange(len(stored), device=stored.device), stored.int().argmax()
    )
    slots = slot_mapping[rows].clamp(min=0).long()
    for x, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.view(-1, *cache.shape[2:])
        flat[slots] = torch.where(stored.any(), x[rows], flat[slots])
    return qkv
