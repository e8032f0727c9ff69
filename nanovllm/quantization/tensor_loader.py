"""How a checkpoint's tensors of a quantised matrix are loaded: one function for each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from nanovllm.quantization.weight_format import WeightFormat

LoadTensor = Callable[[Any], None]  # copies a tensor, or a safetensors slice, to parameters


@dataclass(frozen=True, slots=True)
class TensorLoader:
    """Copies a tensor, or a safetensors slice, to a quantised weight."""

    load: LoadTensor
    dtypes: tuple[str, ...]  # of safetensors, that the tensor may have

    def __call__(self, loaded: Any) -> None:
        """Copy it."""
        self.load(loaded)


def tensor_loaders(
    weight_format: WeightFormat, module: str, names: Collection[str], load: Callable[..., None]
) -> dict[str, LoadTensor]:
    """Name the tensors of one matrix, and say how each is loaded.

    Args:
        weight_format: of the matrix.
        module: its name in the checkpoint.
        names: those of all tensors in the checkpoint, to find the optional ones.
        load: called with the kind of a tensor (the last part of its name) and the tensor.
    """
    kinds = dict(weight_format.tensors)
    for kind, dtypes in weight_format.optional_tensors.items():
        if f"{module}.{kind}" in names:
            kinds[kind] = dtypes
    return {
        f"{module}.{kind}": TensorLoader(partial(load, kind), dtypes)
        for kind, dtypes in kinds.items()
    }
