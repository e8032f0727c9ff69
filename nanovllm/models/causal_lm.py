"""What the language models of all families share: everything but their decoder layers.

A decoder-only transformer is an embedding, a stack of decoder layers and an LM head. Families
differ in the layers, so each has a file of its own for them, with a class derived from `CausalLM`
that names its layer. Tensors have no batch dimension: the tokens of all sequences of a step lie one
after the other, `[num_tokens, ...]`, and only attention knows where one sequence ends and the next
begins. The residual stream is explained in layers/residual.py.
"""

from typing import ClassVar, Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import RowParallelLinear, check_sharding
from nanovllm.layers.residual import Normed, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.rope import rope_frequencies
from nanovllm.utils.checks import Range, check_value

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
LAYER_TYPES = ("full_attention", "sliding_attention")
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' names, and ours


def head_size(config: PretrainedConfig) -> int:
    """Return the size of a head; many configurations do not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_types(config: PretrainedConfig) -> list[str]:
    """Return "full_attention" or "sliding_attention" for each layer."""
    types = getattr(config, "layer_types", None)
    if types:
        return list(types)[: config.num_hidden_layers]  # a model cut short may name more
    has_window = getattr(config, "sliding_window", None) is not None
    if not has_window or not getattr(config, "use_sliding_window", True):
        return ["full_attention"] * config.num_hidden_layers
    # Families with a window in every layer say no more. The others did not name the types before
    # transformers 4.53: in Qwen the first ones see everything, in Gemma one of so many does.
    first = getattr(config, "max_window_layers", 0)
    pattern = getattr(config, "sliding_window_pattern", None)
    if config.model_type == "gemma2":
        pattern = 2
    types = ["sliding_attention"] * config.num_hidden_layers
    for index in range(config.num_hidden_layers):
        if index < first or (pattern is not None and (index + 1) % pattern == 0):
            types[index] = "full_attention"
    return types


def windows(config: PretrainedConfig) -> list[int | None]:
    """Return how many tokens a token sees in each layer, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    return [window if kind == "sliding_attention" else None for kind in layer_types(config)]


def rotary_embeddings(
    config: PretrainedConfig, max_position: int
) -> dict[str, RotaryEmbedding | None]:
    """Make the rotary embedding of each type of layer that the model has.

    Types that rotate alike share one: its tables are large where sequences are long.

    Raises:
        ValueError: the RoPE is of no kind that is known, or one of its numbers is wrong.
    """
    shared: dict[tuple[float, ...], RotaryEmbedding] = {}
    found: dict[str, RotaryEmbedding | None] = {}
    for kind in dict.fromkeys(layer_types(config)):
        rope = rope_frequencies(config, head_size(config), max_position, kind)
        key = (rope.factor, *rope.frequencies.tolist())
        if key not in shared:
            shared[key] = RotaryEmbedding(rope.frequencies, max_position, rope.factor)
        found[kind] = shared[key]
    return found


def check_option(config: PretrainedConfig, name: str, *supported: object) -> None:
    """Raise a ValueError unless an option of the configuration is absent or one of `supported`."""
    value = getattr(config, name, supported[0])
    if value not in supported:
        allowed = ", ".join(repr(choice) for choice in supported)
        raise ValueError(
            f"{name} {value!r} is not supported for {config.model_type}; supported: {allowed}"
        )


def activation(config: PretrainedConfig) -> str:
    """Return the activation of the MLPs, as `GateUpLinear` calls it.

    Raises:
        ValueError: it is none of those that there are kernels for.
    """
    option = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    check_option(config, option, *ACTIVATIONS)
    return ACTIVATIONS[getattr(config, option)]


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; the residual stream calls the two layers."""

    gate_up_class: ClassVar[type[GateUpLinear]] = GateUpLinear

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.gate_up_proj = self.gate_up_class(
            config.hidden_size, config.intermediate_size, activation(config)
        )
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size)


class DecoderLayer(Protocol):
    """A family's decoder layer: an `nn.Module` that `DecoderModel` makes and calls."""

    def __init__(
        self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding | None
    ) -> None:
        """Make layer number `index`."""

    def __call__(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""


class DecoderModel(nn.Module):
    """Embedding, decoder layers, norm."""

    def __init__(
        self, config: PretrainedConfig, max_position: int, layer_class: type[DecoderLayer]
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        rotary = rotary_embeddings(config, max_position)
        self.layers = nn.ModuleList(
            layer_class(config, index, rotary[kind])  # type: ignore[misc]  # it is a module, too
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
    layer_class: ClassVar[type[DecoderLayer]]
    model_class: ClassVar[type[DecoderModel]] = DecoderModel

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__()
        self.model = self.model_class(config, max_position, self.layer_class)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        if config.model_type not in cls.model_types:
            names = ", ".join(config.architectures or [cls.__name__])
            raise ValueError(
                f"config.json names the architecture {names}, and the model_type "
                f"{config.model_type!r}, which is another model's; it must be "
                f"{' or '.join(cls.model_types)}"
            )
        for name in SIZES:
            check_value(name, getattr(config, name), int, Range(1))
        activation(config)
        types = layer_types(config)
        if len(types) < config.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(types)} layers, and num_hidden_layers is "
                f"{config.num_hidden_layers}; name the type of each layer"
            )
        if "sliding_attention" in types and getattr(config, "sliding_window", None) is None:
            raise ValueError("layer_types names sliding_attention, and there is no sliding_window")
        for kind in dict.fromkeys(types):
            if kind not in LAYER_TYPES:
                allowed = ", ".join(LAYER_TYPES)
                raise ValueError(f"layers of type {kind!r} are not supported; supported: {allowed}")
            rope_frequencies(config, head_size(config), config.max_position_embeddings, kind)
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "quantised checkpoints are not supported; use a bf16, fp16 or fp32 one"
            )
        check_sharding(config, tp_size)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Normed:
        """Compute hidden states `[n, hidden_size]`, normalised, of `[num_tokens]` int64 inputs."""
        return self.model(input_ids, positions)

    def compute_logits(self, normed: Normed) -> Tensor:
        """Compute this rank's logits `[n, vocab / tp]` of what `forward` returns."""
        return self.lm_head(normed)
