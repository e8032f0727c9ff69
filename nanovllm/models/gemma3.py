"""Gemma 3 (Gemma Team, 2025), the text model, and Gemma 2 (2024): norms before and after each part.

Most layers see a window of the newest tokens only. Gemma 3 rotates q and k in these with another
base than in the others, and normalises both; Gemma 2 caps the attention scores instead.
"""

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Attended, Normed, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, DecoderModel, GatedMLP
from nanovllm.models.options import check_option, head_size, windows
from nanovllm.models.rope import positive


def make_norm(config: PretrainedConfig, size: int) -> RMSNorm:
    """Make a norm of Gemma's: its checkpoints hold the weight minus 1."""
    return RMSNorm(size, config.rms_norm_eps, weight_offset=1.0)


class Gemma3Attention(nn.Module):
    """Grouped-query attention, in some layers of a window only."""

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        head_dim = head_size(config)
        bias = bool(config.attention_bias)
        is_gemma2 = config.model_type == "gemma2"
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head_dim, heads, kv_heads, bias)
        self.q_norm = None if is_gemma2 else make_norm(config, head_dim)
        self.k_norm = None if is_gemma2 else make_norm(config, head_dim)
        options = AttentionOptions(
            scale=config.query_pre_attn_scalar**-0.5,
            window=windows(config)[index],
            softcap=config.attn_logit_softcapping,
        )
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb, options
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(self, positions: Tensor, x: Normed) -> Attended:
        """Attend; `o_proj` is left to the residual stream, which adds on the way."""
        return self.attn(positions, self.qkv_proj(x), self.q_norm, self.k_norm)


class Gemma3DecoderLayer(nn.Module):
    """`h += norm(attention(norm(h)))`, then `h += norm(mlp(norm(h)))`: four norms of their own."""

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.input_layernorm = make_norm(config, config.hidden_size)
        self.self_attn = Gemma3Attention(config, index, rotary_emb)
        self.post_attention_layernorm = make_norm(config, config.hidden_size)
        self.pre_feedforward_layernorm = make_norm(config, config.hidden_size)
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = make_norm(config, config.hidden_size)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        x = stream.normed(self.input_layernorm, self.self_attn.qkv_proj)
        attended = self.self_attn(positions, x)
        stream.add(self.self_attn.o_proj, attended, post_norm=self.post_attention_layernorm)
        x = stream.normed(self.pre_feedforward_layernorm, self.mlp.gate_up_proj)
        stream.add(
            self.mlp.down_proj,
            x,
            before=self.mlp.gate_up_proj,
            post_norm=self.post_feedforward_layernorm,
        )


class Gemma3Model(DecoderModel):
    """Embedding times the square root of its size, decoder layers, norm."""

    def __init__(
        self, config: PretrainedConfig, max_position: int, layer_class: type[nn.Module]
    ) -> None:
        super().__init__(config, max_position, layer_class)
        self.norm = make_norm(config, config.hidden_size)
        # Gemma was trained with the factor rounded like a weight: 55.5 in bfloat16, not 55.43.
        factor = torch.tensor(config.hidden_size**0.5, device="cpu")
        self.embedding_factor = factor.to(self.embed_tokens.weight.dtype).item()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the embeddings: `[num_tokens, hidden_size]`."""
        return super().embed(input_ids).mul_(self.embedding_factor)


class Gemma3ForCausalLM(CausalLM):
    """Gemma 3 and 2, text only."""

    model_types = ("gemma3_text", "gemma2")
    layer_class = Gemma3DecoderLayer
    model_class = Gemma3Model

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__(config, max_position)
        self.logit_cap = config.final_logit_softcapping

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        super().check_config(config, tp_size)
        check_option(config, "use_bidirectional_attention", False, None)
        positive("query_pre_attn_scalar", config.query_pre_attn_scalar)
        if config.final_logit_softcapping is not None:
            positive("final_logit_softcapping", config.final_logit_softcapping)
        if config.model_type != "gemma2":
            # transformers has the option for Gemma 3, too, and does not apply it.
            check_option(config, "attn_logit_softcapping", None)

    def compute_logits(self, normed: Normed) -> Tensor:
        """Compute this rank's logits `[n, vocab / tp]` of what `forward` returns."""
        logits = super().compute_logits(normed)
        if self.logit_cap is None:
            return logits
        return logits.div_(self.logit_cap).tanh_().mul_(self.logit_cap)
