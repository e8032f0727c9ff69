"""Granite 3 (IBM Granite Team, Granite 3.0 Language Models, 2024).

Llama with four multipliers, of embeddings, attention scores, what a layer adds, and logits, which
make one learning rate right for models of all sizes (Yang et al., Tensor Programs V, 2022).
"""

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.layers.residual import Normed, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, DecoderModel
from nanovllm.models.llama import LlamaAttention, LlamaDecoderLayer
from nanovllm.models.rope import positive


class GraniteAttention(LlamaAttention):
    """Grouped-query attention, its scores scaled by a multiplier instead of `head_dim^-0.5`."""

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        options = AttentionOptions(scale=float(config.attention_multiplier))
        super().__init__(config, index, rotary_emb, options)


class GraniteDecoderLayer(LlamaDecoderLayer):
    """`h += m * attention(norm(h))`, then `h += m * mlp(norm(h))`."""

    attention_class = GraniteAttention

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        super().__init__(config, index, rotary_emb)
        self.multiplier = float(config.residual_multiplier)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        x = stream.normed(self.input_layernorm, self.self_attn.qkv_proj)
        attended = self.self_attn(positions, x)
        stream.add(self.self_attn.o_proj, attended, scale=self.multiplier)
        gate_up_proj = self.mlp.gate_up_proj
        x = stream.normed(self.post_attention_layernorm, gate_up_proj)
        stream.add(self.mlp.down_proj, x, before=gate_up_proj, scale=self.multiplier)


class GraniteModel(DecoderModel):
    """Embedding, multiplied; decoder layers, norm."""

    def __init__(
        self, config: PretrainedConfig, max_position: int, layer_class: type[nn.Module]
    ) -> None:
        super().__init__(config, max_position, layer_class)
        self.multiplier = float(config.embedding_multiplier)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the embeddings: `[num_tokens, hidden_size]`."""
        return super().embed(input_ids).mul_(self.multiplier)


class GraniteForCausalLM(CausalLM):
    """Granite, dense."""

    model_types = ("granite",)
    layer_class = GraniteDecoderLayer
    model_class = GraniteModel

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__(config, max_position)
        self.logits_scaling = float(config.logits_scaling)

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        super().check_config(config, tp_size)
        positive("attention_multiplier", config.attention_multiplier)
        positive("logits_scaling", config.logits_scaling)

    def compute_logits(self, normed: Normed) -> Tensor:
        """Compute this rank's logits `[n, vocab / tp]` of what `forward` returns."""
        return super().compute_logits(normed).div_(self.logits_scaling)
