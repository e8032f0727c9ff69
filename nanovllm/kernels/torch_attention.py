"""Attention in plain PyTorch, as the references and the CPU's path compute it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels.fp8_cache import read_slots


def causal_mask(
    num_queries: int, num_keys: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Return which keys the last `num_queries` tokens see: `[num_queries, num_keys]` bool, or None.

    None: a single query sees all keys; of as many queries as keys the first sees one, the next two,
    and so on.
    """
    earlier = num_keys - num_queries
    is_windowed = window is not None and window < num_keys
    if not is_windowed and (num_queries == 1 or earlier == 0):
        return None
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(earlier)
    if window is None:
        return mask
    return mask.triu(earlier - window + 1)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Return attention: a tensor like q.

    q, k, v: `[batch, heads, queries or keys, head_dim]`.
    mask: bool, of a shape that broadcasts to `[batch, heads, queries, keys]`; True: may be seen.
    scale, softcap: as in `paged_decode`.
    is_causal: instead of a mask, for as many queries as keys.
    """
    if softcap is None:  # PyTorch's own is fused, so that the scores are never in memory
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q.float() @ k.float().transpose(2, 3)
    scores = softcap * torch.tanh(scores * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


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
    v_scale: float | None = None,
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
            keys = read_slots(k_cache, blocks, q.dtype).flatten(0, 1)[:k_len]
            values = read_slots(v_cache, blocks, q.dtype).flatten(0, 1)[:k_len]
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
    out = torch.cat(outs)
    return out if v_scale is None else out * v_scale
