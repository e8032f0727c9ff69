"""What a model's configuration says, in one form for all families.

transformers keeps one class of configuration for each family, and the same thing has several names
in them, or none where a family has no choice. Reading them is done here, and checked; how the
frequencies of RoPE follow from a configuration is in rope.py.
"""

from transformers import PretrainedConfig

from nanovllm.layers.linear import divide
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
FULL = "full_attention"  # transformers' names for the types of layers
WINDOWED = "sliding_attention"
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # transformers' names, and ours


def check_option(config: PretrainedConfig, name: str, *supported: object) -> None:
    """Raise a ValueError unless an option of the configuration is absent or one of `supported`."""
    value = getattr(config, name, supported[0])
    if value not in supported:
        allowed = ", ".join(repr(choice) for choice in supported)
        raise ValueError(
            f"{name} {value!r} is not supported for {config.model_type}; supported: {allowed}"
        )


def check_shared_options(
    config: PretrainedConfig, model_types: tuple[str, ...], tp_size: int
) -> None:
    """Raise a ValueError for what the code of no family runs, or could not be split.

    model_types: those of the configurations that the family reads.
    """
    if config.model_type not in model_types:
        raise ValueError(
            f"config.json names the architecture {', '.join(config.architectures or ())}, and the "
            f"model_type {config.model_type!r}, which is another model's; it must be "
            f"{' or '.join(model_types)}"
        )
    check_sizes(config)
    activation(config)
    check_layer_types(config)
    check_option(config, "mlp_bias", False, None)
    check_sharding(config, tp_size)


def check_sizes(config: PretrainedConfig) -> None:
    """Raise a TypeError or ValueError unless all sizes are positive integers."""
    for name in SIZES:
        check_value(name, getattr(config, name), int, Range(1))


def activation(config: PretrainedConfig) -> str:
    """Return the activation of the MLPs, as `GateUpLinear` calls it.

    Raises:
        ValueError: it is none of those that there are kernels for.
    """
    option = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    check_option(config, option, *ACTIVATIONS)
    return ACTIVATIONS[getattr(config, option)]


# --- heads ----------------------------------------------------------------------------------------


def head_size(config: PretrainedConfig) -> int:
    """Return the size of a head; many configurations do not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_sharding(config: PretrainedConfig, tp_size: int) -> None:
    """Raise a ValueError if heads or MLP of a model cannot be split over so many ranks."""
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    divide("num_attention_heads", heads, tp_size)
    divide("intermediate_size", config.intermediate_size, tp_size)
    # Either a rank has several KV heads, or several ranks share one.
    if kv_heads % tp_size and tp_size % kv_heads:
        raise ValueError(
            f"num_key_value_heads ({kv_heads}) and tensor_parallel_size {tp_size}: one must "
            "divide the other"
        )


# --- types of layers ------------------------------------------------------------------------------


def layer_types(config: PretrainedConfig) -> list[str]:
    """Return FULL or WINDOWED for each layer."""
    num_layers = config.num_hidden_layers
    named = getattr(config, "layer_types", None)
    if named:
        return list(named)[:num_layers]  # a model cut short may name more
    has_window = getattr(config, "sliding_window", None) is not None
    if not has_window or not getattr(config, "use_sliding_window", True):
        return [FULL] * num_layers
    # Mistral's and Phi's configurations say no more, and have the window in every layer. Qwen's and
    # Gemma's did not name the types before transformers 4.53. In Qwen the first `max_window_layers`
    # see everything (that is what the option means there), in Gemma one layer of every `period`.
    num_full_first = getattr(config, "max_window_layers", 0)
    period = getattr(config, "sliding_window_pattern", None)
    if config.model_type == "gemma2":
        period = 2
    types = []
    for index in range(num_layers):
        ends_period = period is not None and (index + 1) % period == 0
        types.append(FULL if index < num_full_first or ends_period else WINDOWED)
    return types


def check_layer_types(config: PretrainedConfig) -> None:
    """Raise a ValueError unless each layer is of a known type, and what it needs is there."""
    types = layer_types(config)
    if len(types) < config.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(types)} layers, and num_hidden_layers is "
            f"{config.num_hidden_layers}; name the type of each layer"
        )
    for kind in dict.fromkeys(types):
        if kind not in (FULL, WINDOWED):
            raise ValueError(
                f"layers of type {kind!r} are not supported; supported: {FULL}, {WINDOWED}"
            )
        rope_frequencies(config, head_size(config), config.max_position_embeddings, kind)
    if WINDOWED in types and getattr(config, "sliding_window", None) is None:
        raise ValueError(f"layer_types names {WINDOWED}, and there is no sliding_window")


def windows(config: PretrainedConfig) -> list[int | None]:
    """Return how many tokens a token sees in each layer, itself included; None: all before it."""
    window = getattr(config, "sliding_window", None)
    return [window if kind == WINDOWED else None for kind in layer_types(config)]


def rotary_embeddings(
    config: PretrainedConfig, max_position: int
) -> dict[str, RotaryEmbedding | None]:
    """Make the rotary embedding of each type of layer that the model has.

    Types that rotate alike share one: its tables are large where sequences are long.

    Raises:
        ValueError: the RoPE is of no kind that is known, or one of its numbers is wrong.
    """
    shared: dict[tuple[float, ...], RotaryEmbedding] = {}
    by_type: dict[str, RotaryEmbedding | None] = {}
    for kind in dict.fromkeys(layer_types(config)):
        rope = rope_frequencies(config, head_size(config), max_position, kind)
        key = (rope.factor, *rope.frequencies.tolist())
        if key not in shared:
            shared[key] = RotaryEmbedding(rope.frequencies, max_position, rope.factor)
        by_type[kind] = shared[key]
    return by_type
