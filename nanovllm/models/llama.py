"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), and the many models of its shape.

Pre-norm blocks of grouped-query attention and a SwiGLU MLP. The RoPE of Llama 3.1 and later is
scaled, which is a matter of its frequencies alone.
"""

from typing import ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Attended, Normed, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, GatedMLP
from nanovllm.models.options import head_size


class LlamaAttention(nn.Module):
    """Grouped-query attention."""

    qkv_class: ClassVar[type[QKVParallelLinear]] = QKVParallelLinear  # Phi's reads another tensor

    def __init__(
        self,
        config: PretrainedConfig,
        index: int,
        rotary_emb: RotaryEmbedding | None,
        options: AttentionOptions | None = None,
    ) -> None:
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        head_dim = head_size(config)
        bias = bool(getattr(config, "attention_bias", False))
        self.qkv_proj = self.qkv_class(config.hidden_size, head_dim, heads, kv_heads, bias)
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb, options
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(self, positions: Tensor, x: Normed) -> Attended:
        """Attend; `o_proj` is left to the residual stream, which adds on the way."""
        return self.attn(positions, self.qkv_proj(x))


class LlamaDecoderLayer(nn.Module):
    """`h += attention(norm(h))`, then `h += mlp(norm(h))`.

    Families that differ in one of the two derive from this class, and name their own.
    """

    attention_class: ClassVar[type[LlamaAttention]] = LlamaAttention
    mlp_class: ClassVar[type[GatedMLP]] = GatedMLP

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self.attention_class(config, index, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = self.mlp_class(config)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        x = stream.normed(self.input_layernorm, self.self_attn.qkv_proj)
        stream.add(self.self_attn.o_proj, self.self_attn(positions, x))
        x = stream.normed(self.post_attention_layernorm, self.mlp.gate_up_proj)
        stream.add(self.mlp.down_proj, x, before=self.mlp.gate_up_proj)


class LlamaForCausalLM(CausalLM):
    """Llama, dense."""

    model_types = ("llama",)
    layer_class = LlamaDecoderLayer
