"""Qwen3 (Yang et al., Qwen3 Technical Report, 2025) and Qwen2: a decoder-only transformer.

Pre-norm blocks of grouped-query attention and a SwiGLU MLP. Tensors have no batch dimension: the
tokens of all sequences of a step lie one after the other, `[num_tokens, ...]`, and only attention
knows where one sequence ends and the next begins. The residual stream is explained in
layers/residual.py.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear, check_sharding
from nanovllm.layers.residual import Attended, Normed, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding, default_frequencies, rope_theta


def head_size(config: PretrainedConfig) -> int:
    """Return the size of a head; configurations of Qwen2 do not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Qwen3Attention(nn.Module):
    """Grouped-query attention.

    Qwen3 normalises the q and k of each head before RoPE; Qwen2 has a bias on q, k and v instead.
    """

    def __init__(self, config: PretrainedConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        head_dim = head_size(config)
        is_qwen3 = config.model_type == "qwen3"
        bias = is_qwen3 and bool(getattr(config, "attention_bias", False))
        qkv_bias = bias or not is_qwen3
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head_dim, heads, kv_heads, qkv_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if is_qwen3 else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if is_qwen3 else None
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(self, positions: Tensor, x: Normed) -> Attended:
        """Attend; `o_proj` is left to the residual stream, which adds on the way."""
        return self.attn(positions, self.qkv_proj(x), self.q_norm, self.k_norm)


class Qwen3MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`; the residual stream calls the two layers."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.gate_up_proj = GateUpLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size)


class Qwen3DecoderLayer(nn.Module):
    """`h += attention(norm(h))`, then `h += mlp(norm(h))`."""

    def __init__(self, config: PretrainedConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        attended = self.self_attn(positions, stream.normed(self.input_layernorm))
        stream.add(self.self_attn.o_proj, attended)
        x = stream.normed(self.post_attention_layernorm)
        stream.add(self.mlp.down_proj, x, before=self.mlp.gate_up_proj)


class Qwen3Model(nn.Module):
    """Embedding, decoder layers, norm."""

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__()
        frequencies = default_frequencies(head_size(config), rope_theta(config))
        rotary_emb = RotaryEmbedding(frequencies, max_position)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, rotary_emb) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Normed:
        """`[num_tokens]` int64 each: the normalised hidden states `[n, hidden_size]`."""
        stream = ResidualStream(self.embed_tokens(input_ids))
        for layer in self.layers:
            layer(positions, stream)
        return stream.normed(self.norm)


class Qwen3ForCausalLM(nn.Module):
    """The language model of a dense checkpoint, for positions below `max_position`."""

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__()
        self.model = Qwen3Model(config, max_position)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def check_config(config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        rope_theta(config)
        if config.hidden_act != "silu":
            raise ValueError(
                f"hidden_act {config.hidden_act!r} is not supported; supported: 'silu'"
            )
        layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if getattr(config, "use_sliding_window", False) or layer_types:
            raise ValueError(
                "sliding-window attention is not supported; set use_sliding_window to false"
            )
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "quantised checkpoints are not supported; use a bf16, fp16 or fp32 one"
            )
        check_sharding(config, tp_size)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Normed:
        """Compute hidden states `[n, hidden_size]`, normalised, of `[num_tokens]` int64 inputs."""
        return self.model(input_ids, positions)

    def compute_logits(self, normed: Normed) -> Tensor:
        """Compute logits of what `forward` returns."""
        return self.lm_head(normed)
