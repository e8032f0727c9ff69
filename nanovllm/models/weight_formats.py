"""Each layer of a model gets the weight format in which the checkpoint has it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from nanovllm.layers.linear import LinearBase
from nanovllm.models.quantized_experts import ExpertMatrices
from nanovllm.models.sparse_moe import SparseMoE
from nanovllm.quantization.quantized import QuantizedFormat
from nanovllm.quantization.scheme import Scheme
from nanovllm.quantization.tensor_loader import LoadTensor, tensor_loaders
from nanovllm.quantization.weight_format import Shard


def choose_formats(model: nn.Module, scheme: Scheme) -> None:
    """Give every linear layer, and the experts of every mixture, their weights, uninitialised.

    Embedding, LM head, routers and norms are never quantised: no such layer is a linear one here.

    Raises:
        ValueError: matrices of a checkpoint that are one here are quantised in different ways.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearBase):
            weight_format = scheme.choose(name, list(checkpoint_modules(module, name)))
            with naming(name):
                module.use_format(weight_format, shards_of(module))
            if isinstance(weight_format, QuantizedFormat):
                module.checkpoint_tensors = partial(  # type: ignore[assignment]
                    checkpoint_tensors, module
                )
        elif isinstance(module, SparseMoE):
            experts = [f"{name}.experts.{expert}" for expert in range(module.num_experts)]
            kinds = ("gate_proj", "up_proj", "down_proj")
            matrices = [f"{expert}.{kind}" for expert in experts for kind in kinds]
            weight_format = scheme.choose(f"{name}.experts", matrices)
            with naming(f"{name}.experts"):
                module.use_format(weight_format)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Have a ValueError say of which layer it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the quantised weights of {layer}: {error}") from error


def checkpoint_modules(layer: LinearBase, name: str) -> dict[str, Any]:
    """The modules of a checkpoint that a layer merges, and for each the shard id of its matrix."""
    packed = getattr(layer, "packed_modules_mapping", None)
    if packed is None:
        return {name: None}
    parent, _, _ = name.rpartition(".")
    return {f"{parent}.{source}": shard_id for source, shard_id in packed.items()}


def shards_of(layer: LinearBase | ExpertMatrices) -> list[Shard]:
    """The parts of checkpoint matrices that a layer's weight is put together from."""
    if isinstance(layer, ExpertMatrices):
        return list(layer.shards.values())
    shard_ids = checkpoint_modules(layer, "").values()
    return [shard for shard_id in shard_ids for shard in layer.shards(shard_id)]


def checkpoint_tensors(
    layer: LinearBase, prefix: str, names: Collection[str]
) -> dict[str, LoadTensor]:
    """Name the checkpoint's tensors of a quantised layer, and how each is loaded.

    prefix: the name of the layer. names: those of all tensors in the checkpoint.
    """
    tensors: dict[str, LoadTensor] = {}
    for module, shard_id in checkpoint_modules(layer, prefix).items():
        load = partial(layer.load, shard_id=shard_id)
        tensors.update(tensor_loaders(layer.weight_format, module, names, load))
        if layer.bias is not None:
            tensors[f"{module}.bias"] = partial(layer.load_bias, layer.bias, shard_id=shard_id)
    return tensors


@torch.no_grad()
def finish_loading(model: nn.Module) -> None:
    """Have each format do what takes all of a layer's tensors.

    Raises:
        ValueError: tensors of a layer do not fit each other; it names the layer.
    """
    for name, module in model.named_modules():
        weight_format = getattr(module, "weight_format", None)
        if isinstance(weight_format, QuantizedFormat):
            with naming(name):
                weight_format.finish(module)


@torch.no_grad()
def fill_quantized(model: nn.Module, std: float, seed: int) -> None:
    """Fill weights with normal numbers of deviation `std`, quantised; see `fill_dummy`."""
    for index, module in enumerate(model.modules()):
        weight_format = getattr(module, "weight_format", None)
        if not isinstance(weight_format, QuantizedFormat):
            continue
        assert isinstance(module, (LinearBase, ExpertMatrices))
        device = next(module.parameters()).device
        generator = torch.Generator(device).manual_seed(seed + index)
        for shard in shards_of(module):
            part = without_rest(shard)
            weight = torch.empty(part.full_shape, dtype=torch.float32, device=device)
            weight.normal_(0.0, std, generator=generator)
            weight_format.quantize(module, weight, part)


def without_rest(shard: Shard) -> Shard:
    """The same place in a layer's weight, of a matrix that is no larger than this rank's part."""
    rows = shard.target_rows.stop - shard.target_rows.start
    columns = shard.source_columns.stop - shard.source_columns.start
    return Shard(
        full_shape=(rows, columns),
        source_rows=slice(0, rows),
        source_columns=slice(0, columns),
        target_rows=shard.target_rows,
    )
