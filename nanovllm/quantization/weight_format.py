"""The interface between a linear layer, which knows its sharding, and the format of its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn


def uses_gemv(x: Tensor) -> bool:
    """Whether x `[n, in]` is multiplied by a GEMV: a single token on a GPU.

    Every format has one, and it takes in the norm before it: see `WeightFormat.matmul`.
    """
    return x.is_cuda and x.shape[0] == 1


class Norm(Protocol):
    """An RMSNorm, as far as a matmul has to know it."""

    eps: float

    @property
    def weight(self) -> Tensor:
        """The factors `[in]`."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise x `[n, in]`."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a checkpoint's matrix `[rows, columns]` goes where in this rank's weight.

    All numbers count elements of the matrix. A format that stores several elements in one number,
    or one scale for several of them, converts.
    """

    full_shape: tuple[int, int]  # of the matrix in the checkpoint
    source_rows: slice  # of the matrix in the checkpoint
    source_columns: slice
    target_rows: slice  # of this rank's weight, which may hold several matrices one below the other


class PartialSums(NamedTuple):
    """A product that split-K has left in several parts; whoever reads it adds them up."""

    values: Tensor  # [splits, n, out]; the product is their sum

    def sum(self) -> Tensor:
        """The product `[n, out]`."""
        if len(self.values) == 1:
            return self.values[0]
        return self.values.sum(0)


class Epilogue(NamedTuple):
    """What becomes of a product `x W^T + b` on its way to memory. At most one field is set.

    A NamedTuple, as some are made in every layer of a step: a frozen dataclass takes the host twice
    as long.
    """

    add_to: Tensor | None = None  # [n, out]: add the product to this, unless it is in partial sums
    reader_sums: bool = False  # whoever reads the product adds up partial sums, if there are any
    # W is a gate above an up projection: `act(gate) * up`. Only where `applies_activation` says so.
    activation: str | None = None
    out: Tensor | None = None  # [n, out]: where the product is to be written


PLAIN = Epilogue()
READER_SUMS = Epilogue(reader_sums=True)


class WeightFormat(ABC):
    """How the weights of a linear layer are stored, loaded and multiplied. It has no state."""

    @abstractmethod
    def create(self, layer: nn.Module, output_size: int, input_size: int) -> None:
        """Register this format's parameters on `layer`, for a matrix `[output_size, input_size]`.

        The sizes are those of this rank.
        """

    @abstractmethod
    def load(self, param: nn.Parameter, loaded: Any, shard: Shard) -> None:
        """Copy this rank's part of a checkpoint tensor to one of the parameters.

        `loaded` is a tensor or a safetensors slice, of which only what is indexed is read. A tensor
        of the wrong shape is a ValueError.
        """

    def applies_activation(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether `matmul` of this x `[n, in]` can apply an activation as it writes the product."""
        return uses_gemv(x)

    @abstractmethod
    def matmul(
        self,
        layer: nn.Module,
        x: Tensor,
        bias: Tensor | None,
        epilogue: Epilogue,
        norm: Norm | None,
    ) -> Tensor | PartialSums:
        """Multiply x `[n, in]` with the weight of `layer`: `x W^T + bias`.

        norm: x is to be normalised first. Given only where `uses_gemv(x)`.
        epilogue: with `add_to`, a result that is a tensor is that tensor, with the product added;
            PartialSums have not been added yet: that is left to the caller. With `reader_sums` the
            result may be PartialSums. Otherwise it is a tensor `[n, out]`.
        """
