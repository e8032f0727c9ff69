"""What all quantised formats share: their reference, which multiplies with a dequantised weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.cpu_memory import in_huge_pages
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import (
    Epilogue,
    Norm,
    PartialSums,
    Shard,
    WeightFormat,
)

ALL_ROWS = slice(None)
# Of scales in a checkpoint. The last are powers of two, stored as their exponents (UE8M0).
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


class QuantizedFormat(WeightFormat):
    """A format whose weight takes scales to multiply with.

    The reference is to dequantise to float32, round to the dtype of x, and multiply. A CPU does
    just that, and any GPU that has no kernel for the format. Only weights are quantised in it:
    where a checkpoint asks for quantised activations, they keep the dtype that they have.
    """

    @abstractmethod
    def dequantize(self, layer: Any, dtype: torch.dtype, rows: slice = ALL_ROWS) -> Tensor:
        """The weight of `layer` in `dtype`, `[rows, in]`, computed in float32.

        rows: whole shards of the layer's matrix, such as those of one expert.
        """

    @abstractmethod
    def quantize(self, layer: Any, weight: Tensor, shard: Shard) -> None:
        """Make the shard's part of the layer's weight out of one in 16 bits or more.

        weight: `[rows of the shard, columns of the whole matrix]`. Scales may depend on columns
            that other ranks have, so that the values do not depend on the number of ranks.
        """

    def finish(self, layer: Any) -> None:
        """Do what takes all of a layer's tensors. Called once they are loaded, at start-up and
        after each `load_weights`, which keeps the addresses of parameters.

        Raises:
            ValueError: the tensors do not fit each other.
        """

    def matmul(
        self, layer: Any, x: Tensor, bias: Tensor | None, epilogue: Epilogue, norm: Norm | None
    ) -> Tensor | PartialSums:
        """Multiply with the dequantised weight; see `WeightFormat.matmul`."""
        return UNQUANTIZED.multiply_matrix(self.weight_for(layer, x), x, bias, epilogue, norm)

    def expert_weights(self, layer: Any, dtype: torch.dtype, num_experts: int) -> Any:
        """The experts' weights `[experts, rows, in]` for the kernels of a mixture on a GPU, in
        `dtype`. A format that these kernels know can return its own instead: all experts of a layer
        are dequantised here, also those without tokens.
        """
        return self.dequantize(layer, dtype).unflatten(0, (num_experts, -1))

    def weight_for(self, layer: Any, x: Tensor) -> Tensor:
        """The dequantised weight to multiply x with.

        On a CPU it is computed once and kept, beside the weight that it is made of: to dequantise
        takes some 5 ns an element there, and to read it in a matrix-vector product 0.15 ns. So a
        quantised model takes a CPU as long as any other, and a little more memory.
        """
        if x.is_cuda:
            return self.dequantize(layer, x.dtype)
        if layer.dequantized is None:
            layer.dequantized = in_huge_pages(self.dequantize(layer, x.dtype))
        return layer.dequantized


def register(layer: Any, name: str, tensor: Tensor) -> None:
    """Make `tensor` a parameter of a quantised weight, which a format knows how to fill."""
    param = nn.Parameter(tensor, requires_grad=False)
    param.is_quantized_weight = True  # type: ignore[attr-defined]
    layer.register_parameter(name, param)
    layer.dequantized = None


def forget_dequantized(layer: Any) -> None:
    """Drop what a CPU has computed of a weight that changes."""
    layer.dequantized = None


def read_scales(loaded: Any, index: Any = ..., may_be_negative: bool = False) -> Tensor:
    """Read scales of a checkpoint, or those at `index`, in float32.

    may_be_negative: as AutoRound has them in INT4, to use -8 where the largest weight is positive.

    Raises:
        ValueError: they cannot be scales. All of them zero is what a checkpoint has whose scales
            were never computed; single zeros are of blocks without weights.
    """
    scales = loaded[index].to(torch.float32)
    if not torch.isfinite(scales).all():
        raise ValueError("holds a scale that is NaN or infinite; the checkpoint is damaged")
    is_negative = not may_be_negative and bool((scales < 0).any())
    if scales.numel() and (is_negative or not scales.any()):
        raise ValueError(
            f"holds scales from {scales.min().item():g} to {scales.max().item():g}, which must be "
            "positive; the checkpoint is damaged"
        )
    return scales


def grain(block: int, size: int, slices: Iterable[slice]) -> int:
    """The largest divisor of a block's size of which all borders of the slices are multiples."""
    borders = [border for part in slices for border in (part.start, part.stop)]
    return gcd(block, size, *borders)
