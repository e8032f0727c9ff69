"""FP8 weights (e4m3: 1 sign, 4 exponent and 3 mantissa bits; 448 is the largest number), with a
scale for each row of the matrix: `weight = scale * fp8`.

Micikevicius et al., FP8 Formats for Deep Learning, 2022. A row is an output channel, so a kernel
can multiply with the scale after the sum. A checkpoint may have one scale for a whole tensor; it is
kept for each row all the same, for the q, k and v projections that make one matrix here have three
of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.quantization.quantized import (
    ALL_ROWS,
    SCALE_DTYPES,
    QuantizedFormat,
    forget_dequantized,
    read_scales,
    register,
)
from nanovllm.quantization.weight_format import Shard
from nanovllm.utils.loader import DTYPES, check_shape

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
SMALLEST_SCALE = 2.0**-100  # of rows of zeros, whose scale could be anything but 0


def to_e4m3(values: Tensor) -> Tensor:
    """Round to FP8. What lies beyond the largest number would become NaN without the clamp."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


def scale_of(largest: Tensor) -> Tensor:
    """The scale with which the largest absolute value of a row or block becomes FP8's largest."""
    return largest.float().clamp(min=SMALLEST_SCALE * LARGEST) / LARGEST


def load_e4m3(layer: Any, loaded: Any, shard: Shard) -> None:
    """Copy a shard of a matrix that is in FP8."""
    check_shape(loaded, shard.full_shape)
    layer.weight[shard.target_rows].copy_(loaded[shard.source_rows, shard.source_columns])


def check_input_scale(loaded: Any) -> None:
    """Check the scale that a checkpoint has for a layer's input; nothing here uses it."""
    if list(shape_of(loaded)) not in ([], [1]):
        raise ValueError(f"has shape {list(shape_of(loaded))}, and must be one number")
    read_scales(loaded)


def shape_of(loaded: Any) -> Sequence[int]:
    """The shape of a tensor, or of a safetensors slice."""
    return loaded.get_shape() if hasattr(loaded, "get_shape") else loaded.shape


@dataclass(frozen=True)
class FP8Rows(QuantizedFormat):
    """`weight` `[out, in]` e4m3 and `weight_scale` `[out]` float32.

    Its scales in a checkpoint are one for a tensor, `[]` or `[1]`, or one a row, `[out, 1]` or
    `[out]`.
    """

    has_row_scales: bool  # in the checkpoint; otherwise one for a tensor

    tensors = {"weight": ("F8_E4M3",), "weight_scale": SCALE_DTYPES}
    optional_tensors = {"input_scale": SCALE_DTYPES}

    def create(
        self, layer: Any, output_size: int, input_size: int, shards: Sequence[Shard] = ()
    ) -> None:
        """Register both, uninitialised."""
        register(layer, "weight", torch.empty(output_size, input_size, dtype=E4M3))
        register(layer, "weight_scale", torch.empty(output_size, dtype=torch.float32))

    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard of a weight, or its rows' scales."""
        forget_dequantized(layer)
        if kind == "weight":
            load_e4m3(layer, loaded, shard)
        elif kind == "weight_scale":
            layer.weight_scale[shard.target_rows] = self.read_row_scales(loaded, shard)
        else:
            check_input_scale(loaded)

    def read_row_scales(self, loaded: Any, shard: Shard) -> Tensor:
        """Read the scale of each of the shard's rows, or the one of them all."""
        num_rows = shard.full_shape[0]
        allowed = [[num_rows, 1], [num_rows]] if self.has_row_scales else [[], [1]]
        shape = list(shape_of(loaded))
        if shape not in allowed:
            raise ValueError(
                f"has shape {shape}, and the quantization_config asks for {allowed[0]}"
            )
        if not self.has_row_scales:
            return read_scales(loaded).flatten()
        return read_scales(loaded, shard.source_rows).flatten()

    def dequantize(self, layer: Any, dtype: torch.dtype, rows: slice = ALL_ROWS) -> Tensor:
        """Every e4m3 number is one of `dtype`, too, so only the product is rounded."""
        weight = layer.weight[rows].to(dtype)
        return torch.mul(weight, layer.weight_scale[rows, None], out=torch.empty_like(weight))

    def quantize(self, layer: Any, weight: Tensor, shard: Shard) -> None:
        """Scale each row by its largest absolute value, in all columns of the matrix."""
        forget_dequantized(layer)
        scale = scale_of(weight.abs().amax(1))
        local = weight[:, shard.source_columns].float()
        layer.weight[shard.target_rows] = to_e4m3(local / scale[:, None])
        layer.weight_scale[shard.target_rows] = scale


class FP8Online(FP8Rows):
    """The same, made from a checkpoint that is not quantised, while it is loaded."""

    tensors = {"weight": DTYPES}
    optional_tensors = {}

    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Quantise the shard; of a matrix that is split by columns all columns are read."""
        check_shape(loaded, shard.full_shape)
        self.quantize(layer, loaded[shard.source_rows].to(layer.weight.device), shard)
