"""FP8 numbers (e4m3: 1 sign, 4 exponent and 3 mantissa bits) and their scales, in linear layers.

The kernels of FP8 weights are in the other files fp8_*.py, but for those of the KV cache. Each is
compared with the reference here: `dequantize_fp8`, and a product in 16 or 32 bits.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
SMALLEST_SCALE = 2.0**-100  # of rows of zeros, whose scale could be anything but 0


class FP8Weight(NamedTuple):
    """A matrix `[out, in]`, or several one below the other, in grains that have a scale each:
    `weight = scale * value`.
    """

    values: Tensor  # [out, in] or [matrices, out, in] e4m3, contiguous
    scales: Tensor  # float32, contiguous: for each row of grains that of each column of them
    row_grain: int  # rows of a grain
    column_grain: int  # columns of a grain

    @property
    def out_size(self) -> int:
        """Rows of the matrix."""
        return self.values.shape[-2]

    @property
    def in_size(self) -> int:
        """Columns of the matrix."""
        return self.values.shape[-1]

    @property
    def has_whole_rows(self) -> bool:
        """Whether a row has a single scale, with which its finished sum can be multiplied."""
        return self.column_grain == self.in_size


class Rounding(NamedTuple):
    """How the input of a linear layer is to be rounded to FP8: see `FP8Input`."""

    group_size: int  # columns that share a scale: a power of two, or all of them
    num_rows: int  # at least the tokens, for a kernel that wants more


class FP8Input(NamedTuple):
    """Some tokens' input of a linear layer, in groups of columns that have a scale each."""

    values: Tensor  # [num_rows, in] e4m3, contiguous; rows from the last token on are not defined
    scales: Tensor  # [groups, num_rows] float32: neighbouring tokens' are read together
    num_tokens: int
    dtype: torch.dtype  # of the numbers that were rounded, and of the product


def values_of(weight: Tensor | FP8Weight) -> Tensor:
    """The numbers of a weight that may be in FP8."""
    return weight.values if isinstance(weight, FP8Weight) else weight


def scale_arguments(weight: Tensor | FP8Weight) -> dict[str, Any]:
    """The arguments by which a kernel knows the scales of a weight that may be in FP8."""
    if isinstance(weight, FP8Weight):
        grains = {"ROW_GRAIN": weight.row_grain, "COLUMN_GRAIN": weight.column_grain}
        return {"scales_ptr": weight.scales, **grains}
    return {"scales_ptr": None, "ROW_GRAIN": 1, "COLUMN_GRAIN": weight.shape[-1]}


def to_e4m3(values: Tensor) -> Tensor:
    """Round to FP8. What lies beyond the largest number would become NaN without the clamp."""
    return values.clamp(-LARGEST, LARGEST).to(E4M3)


def scale_of(largest: Tensor) -> Tensor:
    """The scale with which the largest absolute value of a row or block becomes FP8's largest."""
    largest = largest.float().clamp(min=SMALLEST_SCALE * LARGEST)
    # On a GPU, PyTorch divides by a Python number by multiplying with its inverse. Then a scale may
    # be off by its last bit, which rounds numbers halfway between two of FP8 the other way.
    return largest / torch.full_like(largest, LARGEST)


def dequantize_fp8(weight: FP8Weight, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]`, computed in float32: what the kernels multiply with.

    Every e4m3 number is one of `dtype`, too, so only the product with the scale is rounded.
    """
    values = weight.values.to(dtype)
    out = torch.empty_like(values)
    grains = (-1, weight.row_grain, weight.in_size // weight.column_grain, weight.column_grain)
    scales = weight.scales.view(-1, 1, grains[2], 1)
    torch.mul(values.view(grains), scales, out=out.view(grains))
    return out


def quantize_input_torch(x: Tensor, group_size: int) -> FP8Input:
    """`quantize_input` in PyTorch: the reference."""
    grouped = x.float().unflatten(1, (-1, group_size))
    scales = scale_of(grouped.abs().amax(2))
    values = to_e4m3(grouped * (1.0 / scales)[:, :, None])
    return FP8Input(values.flatten(1), scales.t().contiguous(), len(x), x.dtype)


def dequantize_input(x: FP8Input) -> Tensor:
    """Return `[n, in]` float32."""
    groups = len(x.scales)
    return (x.values.float().unflatten(1, (groups, -1)) * x.scales.t()[:, :, None]).flatten(1)
