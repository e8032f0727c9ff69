"""The interface between a linear layer, which knows its sharding, and the format of its weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from nanovllm.kernels.fp8_weight import Rounding


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


class Reader(Protocol):
    """A linear layer, as far as whoever computes its input has to know it."""

    def rounding(self, x: Tensor) -> Rounding | None:
        """How to round the input; see `WeightFormat.rounding`."""


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
    """How the weights of a linear layer are stored, loaded and multiplied.

    Two that are equal store alike, so formats with numbers of their own (a block's size, say) are
    frozen dataclasses. All state is on the layer.
    """

    optional_tensors: ClassVar[
        Mapping[str, tuple[str, ...]]
    ] = {}  # read where a checkpoint has them

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, tuple[str, ...]]:
        """The last part of the names that a matrix's tensors have in a checkpoint, and the dtypes
        of safetensors that each may have.
        """

    @abstractmethod
    def create(
        self, layer: Any, output_size: int, input_size: int, shards: Sequence[Shard] = ()
    ) -> None:
        """Register this format's parameters on `layer`, for a matrix `[output_size, input_size]`.

        The sizes are those of this rank. shards: the parts of checkpoint matrices that the matrix
        is put together from, for formats with a number for several rows or columns; where layers
        are made without a scheme, which are unquantised, they are left out.
        """

    @abstractmethod
    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy this rank's part of a checkpoint tensor into the parameters of `layer`.

        kind: one of `tensors` or `optional_tensors`.
        loaded: a tensor or a safetensors slice, of which only what is indexed is read. Its shape is
            checked before that, since what is checked alone (`training/weights.py`) has no values.

        Raises:
            ValueError: for a wrong shape or wrong values. The message follows the tensor's name.
        """

    def applies_activation(self, layer: Any, x: Tensor) -> bool:
        """Whether `matmul` of this x `[n, in]` can apply an activation as it writes the product."""
        return uses_gemv(x)

    def rounding(self, layer: Any, x: Tensor) -> Rounding | None:
        """How `matmul` would round its input before it multiplies, for whoever computes the input
        to do it on the way; None: it does not.

        x: `[n, ...]`, of the input's rows, dtype and device.
        """
        return None

    @abstractmethod
    def matmul(
        self,
        layer: Any,
        x: Any,
        bias: Tensor | None,
        epilogue: Epilogue,
        norm: Norm | None,
    ) -> Tensor | PartialSums:
        """Multiply x `[n, in]` with the weight of `layer`: `x W^T + bias`.

        x: a tensor, or an `FP8Input`, rounded as `rounding` says.
        norm: x is to be normalised first. Given only where `uses_gemv(x)`.
        epilogue: with `add_to`, a result that is a tensor is that tensor, with the product added;
            PartialSums have not been added yet: that is left to the caller. With `reader_sums` the
            result may be PartialSums. Otherwise it is a tensor `[n, out]`.
        """
