"""From the option `quantization` and a checkpoint's `quantization_config` to a `Scheme`.

Whatever is not run exactly as it asks is refused by name, before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanovllm.kernels._triton import triton_version
from nanovllm.quantization.config_options import ALL_LAYERS, Options, check, refusal
from nanovllm.quantization.fp8 import FP8Online, FP8Rows
from nanovllm.quantization.fp8_blocks import FP8Blocks
from nanovllm.quantization.read_int4 import read_awq, read_gptq, read_pack_quantized
from nanovllm.quantization.scheme import Rule, Scheme, as_names
from nanovllm.quantization.weight_format import WeightFormat

SUPPORTED = (
    "fp8 (e4m3 weights, in blocks or with one scale a tensor), awq and gptq of 4 bits, and "
    "compressed-tensors with float-quantized weights (e4m3, one scale a tensor, a channel or a "
    "block) or pack-quantized ones of 4 bits"
)
# vLLM's names of kernels for a format.
ALIASES = {"awq_marlin": "awq", "gptq_marlin": "gptq"}
NOT_QUANTISED = (None, "auto")  # of the option: what the checkpoint says
OLDEST_TRITON = (3, 5)  # it compiles tuples with named fields, which `packed_gemv` is written with


def check_device(device: str) -> None:
    """Raise a ValueError if the kernels of quantised weights cannot be compiled for "cuda"."""
    version = triton_version()
    if device == "cuda" and version < OLDEST_TRITON:
        raise ValueError(
            f"quantised weights on a GPU need Triton {'.'.join(map(str, OLDEST_TRITON))}, which "
            f"PyTorch 2.9 brings, or a later one, and this is {'.'.join(map(str, version))}; "
            "upgrade PyTorch, or pass device='cpu'"
        )


def read_scheme(hf_config: Any, option: str | None) -> Scheme | None:
    """Say how the weights of a model are quantised; None if they are not.

    Args:
        hf_config: the model's configuration, a transformers one.
        option: None or "auto", as the checkpoint says; "fp8" quantises one that is not; any other
            name must be the checkpoint's own.

    Raises:
        TypeError: the option is no string.
        ValueError: the checkpoint's format is not supported, or not what the option names.
    """
    if option is not None and not isinstance(option, str):
        raise TypeError(f"quantization must be a string or None, not {option!r}")
    options = config_of(hf_config)
    if options is None:
        if option in NOT_QUANTISED:
            return None
        if option == "fp8":
            # has_row_scales is of checkpoints; here each row has its own.
            online = FP8Online(has_row_scales=True, quantizes_input=True)
            return Scheme("fp8", (Rule(ALL_LAYERS, online),))
        raise ValueError(
            f"quantization={option!r}, and the checkpoint is not quantised: its config.json has no "
            "quantization_config; pass quantization='fp8' to quantise it, or None"
        )
    method = str(options.get("quant_method", "")).lower()
    if not method and "config_groups" in options:
        method = "compressed-tensors"
    if option not in NOT_QUANTISED and ALIASES.get(option, option) != method:
        raise ValueError(
            f"quantization={option!r}, and the checkpoint's quant_method is {method!r}; pass None, "
            "which takes what the checkpoint says"
        )
    if method not in READERS:
        raise ValueError(f"quant_method {method!r} is not supported; supported: {SUPPORTED}")
    return READERS[method](options)


def config_of(hf_config: Any) -> Options | None:
    """The quantization_config as a dict; None if there is none.

    Raises:
        ValueError: it is something else.
    """
    # Checkpoints of 2024 have the second name.
    for name in ("quantization_config", "compression_config"):
        found: Any = getattr(hf_config, name, None)
        if hasattr(found, "to_dict"):
            found = found.to_dict()
        if not found:
            continue
        if not isinstance(found, dict):
            raise ValueError(f"{name} must be a dict, not {found!r}")
        return found
    return None


def block_of(value: object) -> tuple[int, int]:
    """The rows and columns of a block; a ValueError for what is none."""
    if isinstance(value, (list, tuple)) and len(value) == 2:
        rows, columns = value
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return rows, columns
    raise refusal("a block of", value, "two sizes above 0, as [128, 128]")


# --- quant_method fp8 -----------------------------------------------------------------------------


def read_fp8(options: Options) -> Scheme:
    """Qwen's and DeepSeek's checkpoints, in blocks; AutoFP8's, with a scale for each tensor."""
    check(options, "fmt", "e4m3", "float8_e4m3fn", None)
    activations = check(options, "activation_scheme", "dynamic", "static", None)
    quantizes_input = activations is not None
    block = options.get("weight_block_size")
    weight_format: WeightFormat = FP8Rows(False, quantizes_input)
    if block is not None:
        weight_format = FP8Blocks(block_of(block), "weight_scale_inv", quantizes_input)
    # transformers' name of the list, and AutoFP8's.
    ignored = options.get("modules_to_not_convert") or options.get("ignored_layers")
    return Scheme("fp8", (Rule(ALL_LAYERS, weight_format),), as_names(ignored))


# --- quant_method compressed-tensors --------------------------------------------------------------


def read_compressed_tensors(options: Options) -> Scheme:
    """Checkpoints of llm-compressor."""
    for name in ("sparsity_config", "transform_config"):
        value = options.get(name)
        if value and not (isinstance(value, dict) and value.get("format") == "dense"):
            raise refusal(name, value, "none")
    groups = options.get("config_groups")
    if not groups and options.get("kv_cache_scheme"):  # nothing but the KV cache is quantised
        return Scheme("compressed-tensors", rules=())
    if not isinstance(groups, dict) or not groups:
        raise ValueError(f"quantization_config has the config_groups {groups!r}; it must name some")
    rules = []
    for group in groups.values():
        if not isinstance(group, dict):
            raise refusal("a config group", group, "a dict with targets and weights")
        layout = group.get("format") or options.get("format")
        rules.append(Rule(as_names(group.get("targets")), read_group(group, layout)))
    return Scheme("compressed-tensors", tuple(rules), as_names(options.get("ignore")))


def read_group(group: Options, layout: str | None) -> WeightFormat:
    """The format of a group of layers.

    layout: the group's or the checkpoint's "format".
    """
    weights = group.get("weights")
    if not isinstance(weights, dict):
        raise refusal("a config group with weights", weights, "those of FP8")
    check(group, "output_activations", None)
    if layout in ("float-quantized", "naive-quantized", None) and is_float8(weights):
        return read_float8(group, weights)
    kind = (weights.get("type"), weights.get("num_bits"))
    if layout == "pack-quantized" and kind == ("int", 4):
        return read_pack_quantized(group, weights)
    raise refusal("format", f"{layout} of {kind[1]}-bit {kind[0]}", SUPPORTED)


def is_float8(numbers: object) -> bool:
    """Whether weights or activations of a config group are in FP8."""
    if not isinstance(numbers, dict):
        return False
    return numbers.get("type") == "float" and numbers.get("num_bits") == 8


def read_float8(group: Options, weights: Options) -> WeightFormat:
    """FP8 weights. Activations that are to be in FP8 are so where that is faster."""
    check(weights, "symmetric", True)
    check(weights, "dynamic", False)
    inputs = group.get("input_activations")
    if inputs is not None and not is_float8(inputs):
        raise refusal("input_activations", inputs, "none, or float of 8 bits")
    strategy = check(weights, "strategy", "tensor", "channel", "block")
    if strategy == "block":
        block = block_of(weights.get("block_structure"))
        return FP8Blocks(block, "weight_scale", quantizes_input=inputs is not None)
    return FP8Rows(has_row_scales=strategy == "channel", quantizes_input=inputs is not None)


READERS: dict[str, Callable[[Options], Scheme]] = {
    "fp8": read_fp8,
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
}
