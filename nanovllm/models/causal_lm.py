"""What the language models of all families share: everything but their decoder layers.

A decoder-only transformer is an embedding, a stack of decoder layers and an LM head. Families
differ in the layers, so each has a file of its own for them, with a class derived from `CausalLM`
that names its layer. Tensors have no batch dimension: the tokens of all sequences of a step lie one
after the other, `[num_tokens, ...]`, and only attention knows where one sequence ends and the next
begins. The residual stream is explained in layers/residual.py.
"""

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.residual import Normed, ResidualStream
from nanovllm.models.options import activation, check_shared_options, layer_types, rotary_embeddings


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; the residual stream calls the two layers."""

    gate_up_class: ClassVar[type[GateUpLinear]] = GateUpLinear

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.gate_up_proj = self.gate_up_class(
            config.hidden_size, config.intermediate_size, activation(config)
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size)


class DecoderModel(nn.Module):
    """Embedding, decoder layers, norm."""

    def __init__(
        self, config: PretrainedConfig, max_position: int, layer_class: type[nn.Module]
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        rotary = rotary_embeddings(config, max_position)
        self.layers = nn.ModuleList(
            layer_class(config, index, rotary[kind])
            for index, kind in enumerate(layer_types(config))
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Normed:
        """`[num_tokens]` int64 each: the normalised hidden states `[n, hidden_size]`."""
        stream = ResidualStream(self.embed(input_ids))
        for layer in self.layers:
            layer(positions, stream)
        return stream.normed(self.norm)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Look up the embeddings: `[num_tokens, hidden_size]`."""
        return self.embed_tokens(input_ids)


class CausalLM(nn.Module):
    """A language model, for positions below `max_position`."""

    model_types: ClassVar[tuple[str, ...]]  # of the configurations whose options it reads
    # A family's decoder layer: made with the configuration, its number and its rotary embedding;
    # called with the positions and the stream, in which it updates the hidden states.
    layer_class: ClassVar[type[nn.Module]]
    model_class: ClassVar[type[DecoderModel]] = DecoderModel
    # What training/ keeps of it, once a trainer uses the engine.
    tensor_names: Any = None
    memory: Any = None

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__()
        self.model = self.model_class(config, max_position, self.layer_class)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        check_shared_options(config, cls.model_types, tp_size)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Normed:
        """Compute hidden states `[n, hidden_size]`, normalised, of `[num_tokens]` int64 inputs."""
        return self.model(input_ids, positions)

    def compute_logits(self, normed: Normed) -> Tensor:
        """Compute this rank's logits `[n, vocab / tp]` of what `forward` returns."""
        return self.lm_head(normed)
