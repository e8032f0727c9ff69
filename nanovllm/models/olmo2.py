"""OLMo 2 and 3 (OLMo team, 2 OLMo 2 Furious, 2024; Olmo 3, 2025).

The norms stand behind attention and MLP, not before them: `h += norm(attention(h))`. Queries and
keys are normalised over the whole projection, all heads together. OLMo 3 adds sliding windows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.kernels.projection_norm import (
    projection_norm,
    projection_norm_torch,
    sums_of_squares,
    sums_of_squares_torch,
)
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Attended, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, GatedMLP
from nanovllm.models.options import head_size, windows
from nanovllm.quantization.weight_format import PLAIN, Shard
from nanovllm.utils.loader import check_shape, set_weight_loader


class ProjectionNorm(nn.Module):
    """The weight of an RMSNorm over all heads of a projection; a rank has that of its heads."""

    def __init__(self, shard: Shard) -> None:
        """shard: which outputs of the projection are this rank's."""
        super().__init__()
        self.full_size = shard.full_shape[0]
        self.local = shard.source_rows
        local_size = self.local.stop - self.local.start
        self.weight = nn.Parameter(torch.empty(local_size), requires_grad=False)
        set_weight_loader(self.weight, self.load_weight)

    def load_weight(self, param: nn.Parameter, loaded: Any, shard_id: None = None) -> None:
        """Copy the weights of this rank's heads."""
        check_shape(loaded, (self.full_size,))
        param.copy_(loaded[self.local])


class Olmo2Attention(nn.Module):
    """Grouped-query attention, with q and k normalised over all heads together."""

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        head_dim = head_size(config)
        bias = bool(config.attention_bias)
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head_dim, heads, kv_heads, bias)
        self.qkv_proj.epilogue = PLAIN  # the norms below read one tensor, not partial sums
        self.q_norm = ProjectionNorm(self.qkv_proj.shard("q"))
        self.k_norm = ProjectionNorm(self.qkv_proj.shard("k"))
        self.eps = config.rms_norm_eps
        options = AttentionOptions(scale=head_dim**-0.5, window=windows(config)[index])
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb, options
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(self, positions: Tensor, x: Tensor) -> Attended:
        """Attend; `o_proj` is left to the residual stream, which adds on the way."""
        qkv = self.qkv_proj(x)
        self.normalise(qkv)
        return self.attn(positions, qkv)

    def normalise(self, qkv: Tensor) -> None:
        """Normalise q and k over the heads of all ranks, in place."""
        tp = self.qkv_proj.tp
        q_weight = self.q_norm.weight
        k_weight = self.k_norm.weight
        sums = None
        if tp.size > 1:
            add_up = sums_of_squares if qkv.is_cuda else sums_of_squares_torch
            sums = tp.all_reduce(add_up(qkv, len(q_weight), len(k_weight)))
        norm = projection_norm if qkv.is_cuda else projection_norm_torch
        norm(qkv, q_weight, k_weight, self.eps, sums, tp.size)


class Olmo2DecoderLayer(nn.Module):
    """`h += norm(attention(h))`, then `h += norm(mlp(h))`."""

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(config, index, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        attended = self.self_attn(positions, stream.values())
        stream.add(self.self_attn.o_proj, attended, post_norm=self.post_attention_layernorm)
        stream.add(
            self.mlp.down_proj,
            stream.values(),
            before=self.mlp.gate_up_proj,
            post_norm=self.post_feedforward_layernorm,
        )


class Olmo2ForCausalLM(CausalLM):
    """OLMo 2 and 3, dense."""

    model_types = ("olmo2", "olmo3")
    layer_class = Olmo2DecoderLayer
