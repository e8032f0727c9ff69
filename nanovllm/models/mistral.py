"""Mistral and Ministral (Jiang et al., Mistral 7B, 2023): Llama with a sliding window.

Mistral has the window in all layers or, as most of its later models, in none; Ministral in those
that `layer_types` names.
"""

from transformers import PretrainedConfig

from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.llama import LlamaAttention, LlamaDecoderLayer
from nanovllm.models.options import check_option, head_size, windows


class MistralAttention(LlamaAttention):
    """Grouped-query attention, in a window where the layer has one."""

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        options = AttentionOptions(scale=head_size(config) ** -0.5, window=windows(config)[index])
        super().__init__(config, index, rotary_emb, options)


class MistralDecoderLayer(LlamaDecoderLayer):
    """Llama's, with a window."""

    attention_class = MistralAttention


class MistralForCausalLM(CausalLM):
    """Mistral and Ministral, dense."""

    model_types = ("mistral", "ministral")
    layer_class = MistralDecoderLayer

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        super().check_config(config, tp_size)
        check_option(config, "attention_bias", False, None)
        if config.model_type == "mistral":
            # Its window is in all layers, whatever else is said; `windows` would go by this.
            check_option(config, "layer_types", None)
