"""Attention over the paged KV cache, by interchangeable backends."""

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.flash_attention import (
    check_flash_attention,
    flash_attention_version,
    flash_decode,
    flash_prefill,
)
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill, varlen_prefill_torch
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import get_context


class AttentionBackend(NamedTuple):
    """How to rotate and store, and how to attend in the two kinds of step. All backends give the same results."""

    name: str
    norm_rope_store: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    decode: Callable[..., Tensor]


TORCH = AttentionBackend("torch", norm_rope_store_torch, varlen_prefill_torch, paged_decode_torch)
TRITON = AttentionBackend("triton", norm_rope_store, varlen_prefill, paged_decode)
FLASH_ATTN = AttentionBackend("flash_attn", norm_rope_store, flash_prefill, flash_decode)
FLASH_PREFILL = AttentionBackend("flash_attn+triton", norm_rope_store, flash_prefill, paged_decode)


def select_backend(
    name: str, device: str, block_size: int, head_dim: int, dtype: torch.dtype
) -> AttentionBackend:
    """The backend that `name` asks for ("auto": the fastest that is there); ValueError if it cannot serve these."""
    if device == "cpu" and name not in ("auto", "torch"):
        raise ValueError(
            f"attention_backend {name!r} needs a GPU and the device is 'cpu'; use 'torch' or 'auto'"
        )
    if device == "cuda" and not HAS_TRITON:
        raise ValueError(
            "device 'cuda' needs Triton, which is not installed: pip install triton, or device='cpu'"
        )
    if name.startswith("flash_attn"):
        check_flash_attention(block_size, head_dim, dtype)
        return FLASH_ATTN if name == "flash_attn" else FLASH_PREFILL
    has_flash_4 = name == "auto" and device == "cuda" and flash_attention_version() == "4"
    if (
        has_flash_4 and torch.cuda.get_device_capability()[0] == 9
    ):  # as measured: faster than ours for prefill only
        with suppress(ValueError):
            check_flash_attention(block_size, head_dim, dtype)
            return FLASH_PREFILL
    return TORCH if name == "torch" or device == "cpu" else TRITON


class Attention(nn.Module):
    """RoPE and causal grouped-query attention of this rank's heads. After loading, the model runner binds the backend
    and this layer's part of the cache, `[num_blocks, block_size, kv_heads, head_dim]` each for K and V."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, rotary_emb: RotaryEmbedding
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rotary_emb, self.scale, self.backend = rotary_emb, head_dim**-0.5, TORCH
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(
        self,
        positions: Tensor,
        qkv: Tensor,
        q_norm: RMSNorm | None,
        k_norm: RMSNorm | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """positions `[n]`, qkv `[n, (heads + 2 * kv_heads) * head_dim]`, overwritten, or `[parts, n, ...]` whose sum
        it is -> `[n, heads * head_dim]`; or of a prefill only the `wanted` tokens, given the index of each sequence's
        last one."""
        context, qkv = get_context(), qkv.unflatten(-1, (-1, self.head_dim))
        rope, cache = (self.rotary_emb.cos, self.rotary_emb.sin), (self.k_cache, self.v_cache)
        norms = (
            (q_norm.weight, k_norm.weight, q_norm.eps) if q_norm is not None else (None, None, 0.0)
        )
        # K and V go to the cache before anything is read: sequences may share blocks filled in this very step.
        slots, store = context.slot_mapping, self.backend.norm_rope_store
        qkv = store(qkv, positions, *rope, *norms, *cache, slots, self.num_heads)
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if context.is_prefill:
            bounds_q, max_q = context.cu_seqlens_q, context.max_seqlen_q
            if wanted is not None:
                q, bounds_q, max_q = (
                    q[wanted],
                    torch.arange(len(wanted) + 1, dtype=torch.int32, device=q.device),
                    1,
                )
            bounds = (bounds_q, context.cu_seqlens_k, max_q, context.max_seqlen_k)
            out = self.backend.prefill(q, k, v, *cache, *bounds, self.scale, context.block_tables)
        else:
            out = self.backend.decode(
                q, *cache, context.context_lens, context.block_tables, self.scale
            )
        return out.flatten(-2)
