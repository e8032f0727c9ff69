"""Qwen3 (Yang et al., Qwen3 Technical Report, 2025) and Qwen2: a decoder-only transformer.

Pre-norm blocks of grouped-query attention and a SwiGLU MLP. What lies around the layers is in
causal_lm.py.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Attended, Normed, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, GatedMLP
from nanovllm.models.options import head_size, windows


class Qwen3Attention(nn.Module):
    """Grouped-query attention.

    Qwen3 normalises the q and k of each head before RoPE; Qwen2 has a bias on q, k and v instead.
    """

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        head_dim = head_size(config)
        is_qwen2 = config.model_type == "qwen2"
        bias = not is_qwen2 and bool(getattr(config, "attention_bias", False))
        qkv_bias = bias or is_qwen2
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head_dim, heads, kv_heads, qkv_bias)
        self.q_norm = None if is_qwen2 else RMSNorm(head_dim, config.rms_norm_eps)
        self.k_norm = None if is_qwen2 else RMSNorm(head_dim, config.rms_norm_eps)
        options = AttentionOptions(scale=head_dim**-0.5, window=windows(config)[index])
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb, options
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(self, positions: Tensor, x: Normed) -> Attended:
        """Attend; `o_proj` is left to the residual stream, which adds on the way."""
        return self.attn(positions, self.qkv_proj(x), self.q_norm, self.k_norm)


class Qwen3DecoderLayer(nn.Module):
    """`h += attention(norm(h))`, then `h += mlp(norm(h))`."""

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, index, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        x = stream.normed(self.input_layernorm, self.self_attn.qkv_proj)
        stream.add(self.self_attn.o_proj, self.self_attn(positions, x))
        x = stream.normed(self.post_attention_layernorm, self.mlp.gate_up_proj)
        stream.add(self.mlp.down_proj, x, before=self.mlp.gate_up_proj)


class Qwen3ForCausalLM(CausalLM):
    """Qwen3 and Qwen2, dense."""

    model_types = ("qwen3", "qwen2")
    layer_class = Qwen3DecoderLayer
