"""Make an INT4 checkpoint of a checkpoint in 16 bits, by rounding to the nearest.

    python scripts/int4_checkpoint.py MODEL DIRECTORY --group-size 64

The layout is "pack-quantized" of compressed-tensors, which other engines read too. AWQ and GPTQ
look at a sample of texts to choose better numbers than the nearest ones; who wants to serve a model
in INT4 should look for a checkpoint made by one of them, or by llm-compressor.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.checkpoints.hub import resolve_model

# Linear layers in all architectures here. Embedding, LM head, router and norms have other names.
LINEAR_LAYER = re.compile(r"(.*_proj)\.weight")
LARGEST = 7  # of -8 to 7, so that both signs reach equally far
SMALLEST_SCALE = 2.0**-20  # of groups of zeros, whose scale could be anything but 0


def round_to_int4(weight: Tensor, group_size: int) -> dict[str, Tensor]:
    """Round a weight `[out, in]`; return its tensors by the last part of their names.

    A last group may be smaller than the others.
    """
    numbers = []
    scales = []
    for group in weight.float().split(group_size, dim=1):
        largest = group.abs().amax(1, keepdim=True)
        scale = (largest / LARGEST).clamp(min=SMALLEST_SCALE).to(torch.float16)
        numbers.append((group / scale.float()).round().clamp(-LARGEST, LARGEST))
        scales.append(scale)
    return {
        "weight_packed": pack(torch.cat(numbers, dim=1)),
        "weight_scale": torch.cat(scales, dim=1),
        "weight_shape": torch.tensor(weight.shape),
    }


def pack(numbers: Tensor) -> Tensor:
    """Pack numbers `[out, in]` from -8 to 7 into int32 `[out, in / 8]`, the first in the lowest
    bits; 8 is added to each.
    """
    words = torch.zeros(len(numbers), numbers.shape[1] // 8, dtype=torch.int64)
    for place in range(8):
        words |= (numbers[:, place::8].long() + 8) << 4 * place
    return words.to(torch.int32)


def quantization_config(group_size: int) -> dict[str, object]:
    """What config.json is to say of such weights."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


def write_int4(model: str, directory: Path, group_size: int) -> Path:
    """Write the checkpoint, file by file, and return its directory.

    Args:
        model: a directory or a hub id.
        directory: where it is to be; made if it is not there.
        group_size: how many columns share a scale, a multiple of 32.

    Raises:
        ValueError: the checkpoint is quantised already, or has columns that cannot be packed.
    """
    source = Path(resolve_model(model, needs_weights=True))
    config = json.loads((source / "config.json").read_text())
    if config.get("quantization_config"):
        raise ValueError(f"{model} is quantised already; pass the checkpoint in 16 bits")
    directory.mkdir(parents=True, exist_ok=True)
    config["quantization_config"] = quantization_config(group_size)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for file in source.glob("*.json*"):
        # An index would name tensors that are not there any more; an engine does without.
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copy(file, directory)
    for file in source.glob("*.jinja"):
        shutil.copy(file, directory)
    for file in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            layer = LINEAR_LAYER.fullmatch(name)
            if layer is None:
                tensors[name] = tensor
                continue
            if tensor.dim() != 2 or tensor.shape[1] % 8:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)}; 8 must divide its columns"
                )
            rounded = round_to_int4(tensor, group_size)
            tensors |= {f"{layer[1]}.{kind}": part for kind, part in rounded.items()}
        save_file(tensors, directory / file.name, metadata={"format": "pt"})
    return directory


def main() -> None:
    """Write what the command line asks for."""
    parser = argparse.ArgumentParser(description="Round a checkpoint to INT4.")
    parser.add_argument("model", help="local directory or hub id of a checkpoint in 16 bits")
    parser.add_argument("directory", type=Path, help="where the new one is to be")
    parser.add_argument("--group-size", type=int, default=128, help="default: 128")
    args = parser.parse_args()
    print(write_int4(args.model, args.directory, args.group_size))


if __name__ == "__main__":
    main()
