"""Small checkpoints of the library compressed-tensors, for tests.

What imports this file needs the library, which the `test` extra has from Python 3.11 on.
"""

import json
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from int4_checkpoints import round_to_int4, seed_of
from quantized import Quantize, Quantized, blocks_of
from torch import Tensor

# --- FP8 ------------------------------------------------------------------------------------------


def compressed(args: QuantizationArgs, layout: str) -> Quantize:
    """Quantise as compressed-tensors does."""
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(layout)

    def quantize(name: str, weight: Tensor) -> Quantized:
        weight = weight.float()
        low, high = extremes(weight, args)
        scale, _ = calculate_qparams(low, high, args)
        tensors = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        restored = compressor.decompress(tensors, scheme)
        return Quantized(tensors, restored["weight"].float())

    return quantize


def extremes(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The least and the largest weight that share a scale."""
    if args.strategy == "tensor":
        return weight.min(), weight.max()
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    assert args.strategy == "block" and args.block_structure is not None
    blocks = blocks_of(weight, args.block_structure)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def compressed_config(args: QuantizationArgs, layout: str, **changes: Any) -> dict[str, Any]:
    """The quantization_config of such a checkpoint."""
    group: dict[str, Any] = {
        "targets": ["Linear"],
        "weights": json.loads(args.model_dump_json()),
        "input_activations": None,
        "output_activations": None,
    }
    for name in list(changes):
        if name in group:
            group[name] = changes.pop(name)
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None,
        **changes,
    }


# --- INT4 -----------------------------------------------------------------------------------------


def packed_args(group_size: int, symmetric: bool = True) -> QuantizationArgs:
    options: dict[str, Any] = {"strategy": "channel"}
    if group_size != -1:
        options = {"strategy": "group", "group_size": group_size}
    return QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, **options)


def pack_quantized(group_size: int, symmetric: bool = True, act_order: bool = False) -> Quantize:
    """What compressed-tensors makes of a weight, of which scales and zero points are ours."""
    scheme = QuantizationScheme(targets=["Linear"], weights=packed_args(group_size, symmetric))
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def quantize(name: str, weight: Tensor) -> Quantized:
        rounded = round_to_int4(weight, group_size, symmetric, seed_of(name) if act_order else None)
        if act_order:  # which it does not write any more
            tensors = {
                "weight_packed": pack_to_int32((rounded.numbers - 8).to(torch.int8), 4),
                "weight_scale": rounded.scales,
                "weight_shape": torch.tensor(weight.shape),
                "weight_g_idx": rounded.group_index.to(torch.int32),
            }
            return Quantized(tensors, rounded.dequantized())
        module = {"weight": rounded.dequantized(), "weight_scale": rounded.scales}
        if not symmetric:
            module["weight_zero_point"] = (rounded.zero_points - 8).to(torch.int8)
        tensors = compressor.compress(module, scheme)
        restored = compressor.decompress(
            {**tensors, "weight_scale": rounded.scales.float()}, scheme
        )
        return Quantized(tensors, restored["weight"].float())

    return quantize


def pack_quantized_config(
    group_size: int, symmetric: bool = True, **changes: Any
) -> dict[str, Any]:
    weights = json.loads(packed_args(group_size, symmetric).model_dump_json())
    weights.update(changes)
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }
