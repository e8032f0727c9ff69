"""The format in which a layer is made, before anybody knows its name.

A checkpoint's scheme says by name which layers are quantised, and a layer has no name yet when it
is made. In 16 bits first and then anew, a large model would not fit. So a model with a scheme is
made with layers that hold nothing, and each is given its format once the model is whole: see
`choose_formats` in models/weight_formats.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import (
    Epilogue,
    Norm,
    PartialSums,
    Shard,
    WeightFormat,
)


class Postponed(WeightFormat):
    """Nothing: the layer's format is chosen later."""

    tensors = {}

    def create(
        self, layer: Any, output_size: int, input_size: int, shards: Sequence[Shard] = ()
    ) -> None:
        """Register nothing."""

    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """There is nothing to load into."""
        raise AssertionError("the format of this layer was never chosen")

    def matmul(
        self, layer: Any, x: Tensor, bias: Tensor | None, epilogue: Epilogue, norm: Norm | None
    ) -> Tensor | PartialSums:
        """There is nothing to multiply with."""
        raise AssertionError("the format of this layer was never chosen")


POSTPONED = Postponed()
_initial: WeightFormat = UNQUANTIZED


def initial_format() -> WeightFormat:
    """The format of layers that are made now."""
    return _initial


@contextmanager
def formats_postponed() -> Iterator[None]:
    """Have the layers that are made inside the `with` hold no weights yet."""
    global _initial
    previous = _initial
    _initial = POSTPONED
    try:
        yield
    finally:
        _initial = previous
