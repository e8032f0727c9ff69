"""The frequencies of all kinds of RoPE, as a model's configuration describes them.

Position p turns pair i of a head by the angle `p * frequencies[i]`: the first pairs spin fast and
tell neighbours apart, the last ones turn once in many thousand tokens. A model that was trained on
short texts has never seen the larger angles of its slow pairs. The kinds below differ in how they
slow the pairs down, so that the angles of a long text are those of a short one.

transformers 4 keeps the theta in `rope_theta` and the kind in `rope_scaling`; transformers 5 keeps
both in `rope_parameters`, for some families by the layers' types. Both are read here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig


def default_frequencies(rotary_size: int, theta: float) -> Tensor:
    """Angles by which one position turns each pair, `theta^(-2 i / rotary_size)` of pair i.

    `[rotary_size / 2]` float32, on the CPU whatever the model's device: everywhere the same.
    """
    exponents = torch.arange(0, rotary_size, 2, dtype=torch.float32, device="cpu") / rotary_size
    return 1.0 / theta**exponents


class Rope(NamedTuple):
    """What a `RotaryEmbedding` is made of."""

    frequencies: Tensor  # [rotary_size / 2] float32, on the CPU
    factor: float = 1.0  # of the cosines and sines


@dataclass(frozen=True, slots=True)
class RopeOptions:
    """What a configuration says about the RoPE of one type of layers."""

    kind: str
    values: dict[str, Any]  # the options of this kind
    theta: float
    rotary_size: int  # how many elements of a head are rotated
    max_position: int  # tokens of the longest sequence that the engine takes
    model_positions: int  # max_position_embeddings
    original_positions: float  # tokens of the longest texts that the unscaled frequencies are for

    def unscaled(self) -> Tensor:
        """The frequencies before they are changed, `[rotary_size / 2]`."""
        return default_frequencies(self.rotary_size, self.theta)

    def periods(self) -> Tensor:
        """The inverse of `unscaled`."""
        indices = torch.arange(0, self.rotary_size, 2, dtype=torch.float32, device="cpu")
        return self.theta ** (indices / self.rotary_size)

    def number(self, name: str, default: float | None = None) -> float:
        """Read a positive number; a ValueError if it is something else, or missing."""
        value = self.values.get(name)
        return positive(
            f"{name} for RoPE of type {self.kind!r}", default if value is None else value
        )

    def factors(self, name: str) -> Tensor:
        """Read one positive number for each pair."""
        values = self.values.get(name)
        num_pairs = self.rotary_size // 2
        if not isinstance(values, (list, tuple)) or len(values) != num_pairs:
            raise ValueError(
                f"the model's config.json must give a list of {num_pairs} numbers as {name} for "
                f"RoPE of type {self.kind!r}, not {values!r}"
            )
        numbers = [positive(f"numbers in {name}", value) for value in values]
        return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def rope_frequencies(
    config: PretrainedConfig, head_dim: int, max_position: int, layer_type: str | None = None
) -> Rope:
    """Work out the RoPE of a model's layers.

    max_position: tokens of the longest sequence. In transformers the kinds "dynamic" and "longrope"
        choose by the length of the longest sequence so far, so that the keys in a cache may be of
        another choice than the query. Here the choice is made once, for sequences of max_position.
    layer_type: "full_attention" or "sliding_attention", which have a RoPE of their own each in some
        families (Gemma 3, OLMo 3); None where all layers must have the same.

    Raises:
        ValueError: the kind is unknown, or one of its numbers is missing or wrong.
    """
    options = read_options(config, head_dim, max_position, layer_type)
    if options.kind not in KINDS:
        raise ValueError(
            f"RoPE of type {options.kind!r} is not supported; supported: {', '.join(KINDS)}"
        )
    try:
        return KINDS[options.kind](options)
    except ArithmeticError as error:  # YaRN's logarithm of a theta of 1 is 0, for one
        raise ValueError(
            f"RoPE of type {options.kind!r} cannot be computed ({error}) with theta "
            f"{options.theta} and {options.values}; check them in the model's config.json"
        ) from error


def read_options(
    config: PretrainedConfig, head_dim: int, max_position: int, layer_type: str | None
) -> RopeOptions:
    """Read what a configuration says, and check what all kinds have in common."""
    values = rope_parameters(config, layer_type)
    share = values.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None))
    share = 1.0 if share is None else positive("partial_rotary_factor", share)
    rotary_size = int(head_dim * share)
    if not 2 <= rotary_size <= head_dim or rotary_size % 2:
        raise ValueError(
            f"partial_rotary_factor {share} has RoPE rotate {rotary_size} of the {head_dim} "
            f"numbers of a head; it must be an even number from 2 to {head_dim}"
        )
    # Phi-3 has it beside the other options, and then that one counts.
    original = getattr(config, "original_max_position_embeddings", None)
    if original is None:
        original = values.get("original_max_position_embeddings")
    if original is None:
        original = config.max_position_embeddings
    return RopeOptions(
        kind=str(values.get("rope_type", values.get("type", "default"))),
        values=values,
        theta=positive("rope_theta", values.get("rope_theta")),
        rotary_size=rotary_size,
        max_position=max_position,
        model_positions=config.max_position_embeddings,
        original_positions=positive("original_max_position_embeddings", original),
    )


def rope_parameters(config: PretrainedConfig, layer_type: str | None) -> dict[str, Any]:
    """Return the options of one type of layers, as transformers 5 spells them."""
    is_local = layer_type == "sliding_attention"
    theta = getattr(config, "rope_theta", None)
    if is_local:
        theta = getattr(config, "rope_local_base_freq", theta)  # Gemma 3
    own = getattr(config, "rope_parameters", None)
    if not own:  # transformers 4
        own = getattr(config, "rope_scaling", None) or {}
        if is_local and config.model_type in ("gemma3_text", "olmo3"):
            own = {}  # these families scale the RoPE of the other layers only
    elif any(isinstance(value, dict) for value in own.values()):
        own = parameters_of_type(own, layer_type, config.model_type)
    return {"rope_theta": theta, **own}


def parameters_of_type(
    by_type: dict[str, Any], layer_type: str | None, model_type: str
) -> dict[str, Any]:
    """Return one type's options of those that a configuration gives by the types of layers."""
    if layer_type is None:
        raise ValueError(
            f"rope_parameters by types of layers ({', '.join(by_type)}) are not supported for "
            f"{model_type}"
        )
    parameters = by_type.get(layer_type)
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters in the model's config.json lack {layer_type!r}")
    return parameters


def positive(name: str, value: Any) -> float:
    """Return a number that must be positive and finite, or raise a ValueError that names it."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ValueError(f"the model's config.json must give a positive {name}, not {value!r}")
    return float(value)


# --- the kinds ------------------------------------------------------------------------------------


def default(options: RopeOptions) -> Rope:
    """As in RoFormer (Su et al., 2021)."""
    return Rope(options.unscaled())


def linear(options: RopeOptions) -> Rope:
    """Position interpolation (Chen et al., 2023; kaiokendev, 2023): all pairs are slower."""
    return Rope(options.unscaled() / options.number("factor"))


def dynamic(options: RopeOptions) -> Rope:
    """NTK-aware interpolation (bloc97 and emozilla, 2023): a larger theta, for a longer text.

    The slowest pair is slowed down as much as the text is longer than `max_position_embeddings`,
    the fastest not at all. In an engine whose max_position is that or less, nothing changes.
    """
    factor = options.number("factor")
    length = max(options.max_position, options.model_positions) / options.model_positions
    size = options.rotary_size
    stretch = factor * length - (factor - 1)
    return Rope(default_frequencies(size, options.theta * stretch ** (size / (size - 2))))


def llama3(options: RopeOptions) -> Rope:
    """Llama 3.1 (Meta, 2024): pairs are slowed down that do not turn often in an original text.

    With at most `low_freq_factor` turns in a text of the original length a pair is divided by
    `factor`, with at least `high_freq_factor` turns it stays, in between it is interpolated.
    """
    frequencies = options.unscaled()
    factor = options.number("factor")
    low = options.number("low_freq_factor")
    high = options.number("high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor ({low}) must be less than high_freq_factor ({high})")
    turns = options.original_positions / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return Rope((1 - kept) * frequencies / factor + kept * frequencies)


def yarn(options: RopeOptions) -> Rope:
    """YaRN (Peng et al., 2023): as "llama3", but interpolated over the numbers of the pairs.

    Pairs up to the one that makes `beta_fast` turns in a text of the original length stay, those
    from the one with `beta_slow` turns on are divided by `factor`. As the scores of a longer text
    are spread over more keys, q and k are multiplied, too (section 3.4); DeepSeek's `mscale` and
    `mscale_all_dim` change by how much.
    """
    factor = options.number("factor")
    size = options.rotary_size

    def pair_with(turns: float) -> float:
        """The number of the pair, a fraction, that turns so often in a text of original length."""
        period = options.original_positions / (turns * 2 * math.pi)
        return size * math.log(period) / (2 * math.log(options.theta))

    first = pair_with(options.number("beta_fast", 32.0))
    last = pair_with(options.number("beta_slow", 1.0))
    if options.values.get("truncate", True):
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, size - 1)
    if first == last:
        last += 0.001  # a step at this pair; by zero one cannot divide
    pairs = torch.arange(size // 2, dtype=torch.float32, device="cpu")
    slowed = ((pairs - first) / (last - first)).clamp(0, 1)
    periods = options.periods()
    frequencies = 1.0 / (factor * periods) * slowed + 1.0 / periods * (1 - slowed)

    if options.values.get("attention_factor") is not None:
        return Rope(frequencies, options.number("attention_factor"))
    if options.values.get("mscale") and options.values.get("mscale_all_dim"):
        scale = yarn_scale(factor, options.number("mscale"))
        return Rope(frequencies, scale / yarn_scale(factor, options.number("mscale_all_dim")))
    return Rope(frequencies, yarn_scale(factor, 1.0))


def yarn_scale(factor: float, mscale: float) -> float:
    """The square root of YaRN's 1 / t, by which q and k of a text `factor` times as long grow."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def longrope(options: RopeOptions) -> Rope:
    """LongRoPE (Ding et al., 2024), as in Phi-3: each pair has a divisor of its own, from a search.

    There are two sets of them, `short_factor` for texts of the original length and `long_factor`.
    An engine uses one for all its sequences: the long ones if its max_position is larger than the
    original length. (transformers uses the short ones for the sequences that are short enough. An
    engine with max_position at most the original length gives the same tokens.)
    """
    is_long = options.max_position > options.original_positions
    divisors = options.factors("long_factor" if is_long else "short_factor")
    frequencies = 1.0 / (divisors * options.periods())
    if options.values.get("attention_factor") is not None:
        return Rope(frequencies, options.number("attention_factor"))
    factor = options.number("factor", options.model_positions / options.original_positions)
    if factor <= 1:
        return Rope(frequencies)
    growth = math.log(factor) / math.log(options.original_positions)
    return Rope(frequencies, math.sqrt(1 + growth))


KINDS: dict[str, Callable[[RopeOptions], Rope]] = {
    "default": default,
    "linear": linear,
    "dynamic": dynamic,
    "llama3": llama3,
    "yarn": yarn,
    "longrope": longrope,
    "su": longrope,  # as the first configurations of Phi-3 call it
}
