"""SmolLM3 (Bakouch et al., SmolLM3: smol, multilingual, long-context reasoner, 2025).

Llama's layers, but every fourth does not rotate q and k (NoPE): it sees what is said and not where.
"""

from transformers import PretrainedConfig

from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.llama import LlamaDecoderLayer
from nanovllm.models.mistral import MistralAttention
from nanovllm.models.options import WINDOWED, check_option, layer_types


class SmolLM3Attention(MistralAttention):
    """Grouped-query attention, with or without RoPE, in a window where the layer has one."""

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        uses_rope = config.no_rope_layers[index]  # 1 or 0; the name of the option says the opposite
        super().__init__(config, index, rotary_emb if uses_rope else None)


class SmolLM3DecoderLayer(LlamaDecoderLayer):
    """Llama's, but for the attention."""

    attention_class = SmolLM3Attention


class SmolLM3ForCausalLM(CausalLM):
    """SmolLM3, dense."""

    model_types = ("smollm3",)
    layer_class = SmolLM3DecoderLayer

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        super().check_config(config, tp_size)
        if len(config.no_rope_layers) < config.num_hidden_layers:
            raise ValueError(
                f"no_rope_layers names {len(config.no_rope_layers)} layers, and num_hidden_layers "
                f"is {config.num_hidden_layers}; it must have a 1 or 0 for each layer"
            )
        if WINDOWED in layer_types(config):
            check_option(config, "use_sliding_window", True)
