"""Attention over the paged KV cache."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm.checkpoints.kv_scales import KVScales
from nanovllm.kernels.attention_backend import TORCH, AttentionBackend
from nanovllm.kernels.attention_plan import AttentionOptions, PrefillPlan, TiledPlan
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.residual import Attended
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.quantization.weight_format import PartialSums
from nanovllm.utils.context import get_context


class Attention(nn.Module):
    """RoPE and causal grouped-query attention of this rank's heads.

    After loading, the model runner sets the backend and this layer's part of the KV cache,
    `[num_blocks, block_size, kv_heads, head_dim]` each for K and V. In the last layer it also sets
    `only_last_tokens`: nobody reads a prefill's other tokens, unless the step `keeps_all_rows`.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary_emb: RotaryEmbedding | None,
        options: AttentionOptions | None = None,
    ) -> None:
        """Make the attention of this rank's heads.

        rotary_emb: None for a layer that does not rotate q and k.
        options: None for all keys and the usual scale.
        """
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rotary_emb = rotary_emb
        self.options = options or AttentionOptions(scale=head_dim**-0.5)
        self.backend: AttentionBackend = TORCH
        self.only_last_tokens = False
        self.kv_scales = KVScales()  # the checkpoint's, which an FP8 cache makes use of
        self.k_cache = torch.empty(0)
        self.v_cache = torch.empty(0)

    def forward(
        self,
        positions: Tensor,
        qkv: Tensor | PartialSums,
        q_norm: RMSNorm | None = None,
        k_norm: RMSNorm | None = None,
    ) -> Attended:
        """Attend with the running step's tokens, and store their K and V in the cache.

        positions: `[n]` int64. qkv: `[n, (heads + 2 * kv_heads) * head_dim]`, overwritten.
        q_norm, k_norm: of each head's q and k, before RoPE.
        """
        step = get_context()
        projected = qkv.values if isinstance(qkv, PartialSums) else qkv
        rotary = self.rotary_emb
        # K and V go to the cache before anything is read from it: a sequence may share blocks that
        # another one fills in this very step.
        heads = self.backend.store(
            step.attention,
            qkv=projected.unflatten(-1, (-1, self.head_dim)),
            positions=positions,
            cos=None if rotary is None else rotary.cos,
            sin=None if rotary is None else rotary.sin,
            q_weight=None if q_norm is None else q_norm.weight,
            k_weight=None if k_norm is None else k_norm.weight,
            eps=0.0 if q_norm is None else q_norm.eps,
            k_cache=self.k_cache,
            v_cache=self.v_cache,
            slot_mapping=step.slot_mapping,
            num_heads=self.num_heads,
            interleaved=rotary is not None and rotary.interleaved,
            scales=self.options.kv_scales,
        )
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        plan = step.attention
        rows = None
        drops_others = self.only_last_tokens and not step.keeps_all_rows
        if drops_others and isinstance(plan, (PrefillPlan, TiledPlan)):
            rows = step.last_token_rows
            q = q[rows]
            plan = self.backend.last_tokens_plan(plan)
        out = self.backend.attend(q, k, v, self.k_cache, self.v_cache, plan, self.options)
        return Attended(out.flatten(-2), rows)
