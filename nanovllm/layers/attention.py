"""Attention over the paged KV cache, by one of three interchangeable backends."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nanovllm.kernels import flash_attention, paged_decode, varlen_prefill
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.utils.context import get_context


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """How to rotate and store, and how to attend in the two kinds of step. All backends give the same results."""

    name: str
    norm_rope_store: Callable[..., None]
    prefill: Callable[..., torch.Tensor]
    decode: Callable[..., torch.Tensor]


TORCH = AttentionBackend(
    "torch", norm_rope_store_torch, varlen_prefill.varlen_prefill_torch, paged_decode.paged_decode_torch
)
TRITON = AttentionBackend("triton", norm_rope_store, varlen_prefill.varlen_prefill, paged_decode.paged_decode)
FLASH_ATTN = AttentionBackend(
    "flash_attn", norm_rope_store, flash_attention.flash_prefill, flash_attention.flash_decode
)


def select_backend(name: str, device: str, block_size: int, head_dim: int, dtype: torch.dtype) -> AttentionBackend:
    """The backend that `name` asks for; "auto" takes the fastest that is there.

    Raises:
        ValueError: when it cannot serve this device, block size, head size or dtype.
    """
    if device == "cpu":
        if name not in ("auto", "torch"):
            raise ValueError(f"attention_backend {name!r} needs a GPU and the device is 'cpu'; use 'torch' or 'auto'")
        return TORCH
    if not HAS_TRITON:
        raise ValueError("device 'cuda' needs Triton, which is not installed: pip install triton, or device='cpu'")
    if name == "torch":
        return TORCH
    if name in ("auto", "triton"):
        return TRITON
    flash_attention.check_flash_attention(block_size, head_dim, dtype)
    return FLASH_ATTN


class Attention(nn.Module):
    """RoPE and causal grouped-query attention of this rank's heads.

    The model runner binds the backend and this layer's part of the cache, `[num_blocks, block_size, kv_heads,
    head_dim]` each for K and V, once the weights are loaded. Before that (warmup) nothing is stored.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rotary_emb = rotary_emb
        self.scale = head_dim**-0.5
        self.backend = TORCH
        self.k_cache = self.v_cache = torch.empty(0)

    def forward(
        self, positions: torch.Tensor, qkv: torch.Tensor, q_norm: RMSNorm | None, k_norm: RMSNorm | None
    ) -> torch.Tensor:
        """positions `[n]`, qkv `[n, (heads + 2 * kv_heads) * head_dim]` (overwritten) -> `[n, heads * head_dim]`."""
        context = get_context()
        qkv = qkv.unflatten(-1, (-1, self.head_dim))
        # K and V go to the cache before anything is read: a sequence may share blocks that another one fills in
        # this very step.
        self.backend.norm_rope_store(
            qkv, positions, self.rotary_emb.cos, self.rotary_emb.sin,
            q_norm.weight if q_norm is not None else None, k_norm.weight if k_norm is not None else None,
            q_norm.eps if q_norm is not None else 0.0,
            self.k_cache, self.v_cache, context.slot_mapping, self.num_heads,
        )  # fmt: skip
        q, k, v = qkv.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if context.is_prefill:
            out = self.backend.prefill(
                q, k, v, self.k_cache, self.v_cache, context.cu_seqlens_q, context.cu_seqlens_k,
                context.max_seqlen_q, context.max_seqlen_k, self.scale, context.block_tables,
            )  # fmt: skip
        else:
            out = self.backend.decode(
                q, self.k_cache, self.v_cache, context.context_lens, context.block_tables, self.scale
            )
        return out.flatten(-2)
