"""From a checkpoint's `quantization_config` to the format of its INT4 weights."""

from __future__ import annotations

from typing import Any

from nanovllm.kernels.int4_layout import STRIPE
from nanovllm.quantization.awq import AWQ
from nanovllm.quantization.config_options import ALL_LAYERS, Options, check, refusal
from nanovllm.quantization.gptq import GPTQ
from nanovllm.quantization.int4 import WHOLE_ROW
from nanovllm.quantization.pack_quantized import PackQuantized
from nanovllm.quantization.scheme import REGULAR_EXPRESSION, ModuleNames, Rule, Scheme, as_names


def group_size_of(value: object) -> int:
    """Check a group size; a ValueError for one that is not supported."""
    if type(value) is int and (value == WHOLE_ROW or (value > 0 and value % STRIPE == 0)):
        return value
    raise refusal("group_size", value, f"a multiple of {STRIPE}, or -1 for whole rows")


def flag(options: Options, name: str, default: bool) -> bool:
    """Check an option that is true or false."""
    return bool(check(options, name, default, not default))


# --- quant_method awq -----------------------------------------------------------------------------


def read_awq(options: Options) -> Scheme:
    """Checkpoints of AutoAWQ."""
    check(options, "bits", 4)
    if str(options.get("version", "gemm")).lower() != "gemm":
        raise refusal("version", options["version"], "'gemm'")
    weight_format = AWQ(
        group_size=group_size_of(options.get("group_size", 128)),
        is_symmetric=not flag(options, "zero_point", True),
    )
    ignored = as_names(options.get("modules_to_not_convert"))
    return Scheme("awq", (Rule(ALL_LAYERS, weight_format),), ignored)


# --- quant_method gptq ----------------------------------------------------------------------------

SKIPPED = "-:"  # what a regular expression of `dynamic` begins with whose modules are not quantised


def read_gptq(options: Options) -> Scheme:
    """Checkpoints of AutoGPTQ, GPTQModel and transformers."""
    check(options, "bits", 4)
    check(options, "lm_head", False, None)
    check(options, "is_marlin_format", False, None)
    check(options, "pack_dtype", "int32", None)
    layout = check(options, "checkpoint_format", "gptq", "gptq_v2", None, "")
    weight_format = GPTQ(
        group_size=group_size_of(options.get("group_size", 128)),
        is_symmetric=flag(options, "sym", True),
        has_group_index=flag(options, "desc_act", False),
        zeros_are_less_one=layout != "gptq_v2",
    )
    targets = ALL_LAYERS
    quantized = options.get("modules_in_block_to_quantize")  # lists, of modules quantised together
    if quantized:
        targets = ModuleNames(
            tuple(name for names in quantized for name in as_names(names).entries)
        )
    ignored = as_names(options.get("modules_to_not_convert")).entries + skipped_modules(options)
    return Scheme("gptq", (Rule(targets, weight_format),), ModuleNames(ignored))


def skipped_modules(options: Options) -> tuple[str, ...]:
    """The regular expressions of modules that GPTQModel was told to skip.

    Raises:
        ValueError: others are quantised in a way of their own.
    """
    rules = options.get("dynamic") or {}
    if not isinstance(rules, dict):
        raise refusal("dynamic", rules, "regular expressions of modules that are not quantised")
    for expression in rules:
        if not expression.startswith(SKIPPED):
            raise refusal(
                "dynamic", expression, f"modules that are not quantised, marked {SKIPPED!r}"
            )
    return tuple(REGULAR_EXPRESSION + rule.removeprefix(SKIPPED) for rule in rules)


# --- compressed-tensors ---------------------------------------------------------------------------

# Orders of the columns while they were quantised, after which their groups are neighbours, or not.
ORDERS_WITHOUT_INDEX = (None, False, "weight", "static")
ORDERS_WITH_INDEX = (True, "group", "dynamic")


def read_pack_quantized(group: Options, weights: Options) -> PackQuantized:
    """The INT4 weights of a config group; activations must not be quantised."""
    inputs: Any = group.get("input_activations")
    if inputs is not None:
        raise refusal("input_activations", inputs, "none, with INT4 weights")
    check(weights, "dynamic", False)
    strategy = check(weights, "strategy", "group", "channel")
    group_size = WHOLE_ROW
    if strategy == "group":
        group_size = group_size_of(weights.get("group_size"))
    order = check(weights, "actorder", *ORDERS_WITHOUT_INDEX, *ORDERS_WITH_INDEX)
    return PackQuantized(
        group_size=group_size,
        is_symmetric=flag(weights, "symmetric", True),
        has_group_index=order in ORDERS_WITH_INDEX,
    )
