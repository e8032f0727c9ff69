"""Small checkpoints in quantised formats, and the same with their weights dequantised, for tests.

The weights are quantised by others than nanovllm: here by a few lines that follow a published
layout, in compressed_checkpoints.py by the library compressed-tensors.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import Checkpoint, make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

E4M3 = torch.float8_e4m3fn
WEIGHTS = "model.safetensors"
QWEN3_MOE: dict[str, Any] = dict(
    architecture="Qwen3MoeForCausalLM",
    head_dim=16,
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=3,
)


@dataclass
class Quantized:
    """What becomes of one weight."""

    tensors: dict[str, Tensor]  # by the last part of their names
    dequantized: Tensor  # float32


Quantize = Callable[
    [str, Tensor], Quantized | None
]  # of a module's name and weight; None: it stays


def is_layer(name: str) -> bool:
    """Whether a module is one of those that checkpoints have quantised."""
    return name.endswith("_proj")


def quantize_checkpoint(
    path: Path, quantize: Quantize, quantization_config: dict[str, Any], **options: Any
) -> Checkpoint:
    """Write a quantised checkpoint; its model is transformers' with the dequantised weights.

    There are also the checkpoints "original", not quantised yet, and "dequantized".

    options: of `make_checkpoint`.
    """
    source = path / "original"
    make_checkpoint(source, **options)
    stored: dict[str, Tensor] = {}
    dequantized: dict[str, Tensor] = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        module, _, kind = name.rpartition(".")
        quantized = None
        if kind == "weight" and is_layer(module):
            quantized = quantize(module, tensor)
        if quantized is None:
            stored[name] = dequantized[name] = tensor
            continue
        dequantized[name] = quantized.dequantized.contiguous()
        for kind, part in quantized.tensors.items():
            stored[f"{module}.{kind}"] = part.contiguous()
    config = json.loads((source / "config.json").read_text())
    save_file(stored, path / WEIGHTS, metadata={"format": "pt"})
    config["quantization_config"] = quantization_config
    (path / "config.json").write_text(json.dumps(config))
    target = path / "dequantized"
    target.mkdir()
    save_file(dequantized, target / WEIGHTS, metadata={"format": "pt"})
    shutil.copy(source / "config.json", target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    return Checkpoint(str(path), model.eval().requires_grad_(False))


# --- FP8 in blocks, as DeepSeek-V3 and Qwen publish it --------------------------------------------


def blocks_of(weight: Tensor, block: list[int] | tuple[int, ...]) -> Tensor:
    """`[row blocks, rows, column blocks, columns]`; what is missing of the last blocks is 0."""
    rows, columns = weight.shape
    padded = torch.zeros(
        -(-rows // block[0]) * block[0], -(-columns // block[1]) * block[1], dtype=weight.dtype
    )
    padded[:rows, :columns] = weight
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))


def block_fp8(block: tuple[int, int] = (128, 128), has_exponents: bool = False) -> Quantize:
    """weight `[N, K]` e4m3, weight_scale_inv `[ceil(N / 128), ceil(K / 128)]`; their product.

    has_exponents: scales are powers of 2, of which only the exponents are stored (UE8M0).
    """

    def quantize(name: str, weight: Tensor) -> Quantized:
        blocks = blocks_of(weight.float(), block)
        scale = blocks.abs().amax((1, 3)) / 448
        if has_exponents:
            scale = scale.log2().ceil().exp2()
        rounded = (blocks / scale[:, None, :, None]).to(E4M3)
        rows, columns = weight.shape
        whole = rounded.flatten(2, 3).flatten(0, 1)[:rows, :columns]
        dequantized = (rounded.float() * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
        stored = scale.to(torch.float8_e8m0fnu) if has_exponents else scale
        tensors = {"weight": whole, "weight_scale_inv": stored}
        return Quantized(tensors, dequantized[:rows, :columns])

    return quantize


def block_config(block: tuple[int, int] = (128, 128), **changes: Any) -> dict[str, Any]:
    """The quantization_config of such a checkpoint."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
        **changes,
    }


def tensor_fp8(name: str, weight: Tensor) -> Quantized:
    """AutoFP8's layout: one scale `[]` for a tensor, and one for a layer's input."""
    scale = weight.abs().max().float() / 448
    rounded = (weight.float() / scale).to(E4M3)
    tensors = {"weight": rounded, "weight_scale": scale, "input_scale": torch.tensor(0.02)}
    return Quantized(tensors, rounded.float() * scale)
