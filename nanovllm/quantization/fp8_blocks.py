"""FP8 weights (e4m3) with a scale for each block of the matrix, mostly of 128 x 128 numbers.

DeepSeek-AI, DeepSeek-V3 Technical Report, 2024. So are Qwen's own FP8 checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.fp8_weight import E4M3, FP8Weight, scale_of, to_e4m3
from nanovllm.quantization.fp8 import FP8, check_input_scale, load_e4m3
from nanovllm.quantization.quantized import (
    ALL_ROWS,
    SCALE_DTYPES,
    forget_dequantized,
    grain,
    read_scales,
    register,
)
from nanovllm.quantization.weight_format import Shard
from nanovllm.utils.loader import check_shape


@dataclass(frozen=True)
class FP8Blocks(FP8):
    """`weight` `[out, in]` e4m3 and `weight_scale` `[out / row_grain, in / column_grain]` float32.

    A grain is as large as a block of the checkpoint, unless a rank's or a merged matrix's part
    begins or ends inside a block: then it is the largest number of rows that divides both, and a
    block's scale is kept several times. So a rank may hold any part, and every grain is whole.
    `layer.row_grain` and `layer.column_grain` say how large they are: for kernels, nearly always
    128.
    """

    block: tuple[int, int]  # rows and columns
    scale_name: str  # in the checkpoint
    quantizes_input: bool = False

    optional_tensors = {"input_scale": SCALE_DTYPES}

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """The weight, and the scales by the name that this checkpoint gives them."""
        return {"weight": ("F8_E4M3",), self.scale_name: SCALE_DTYPES}

    def create(
        self, layer: Any, output_size: int, input_size: int, shards: Sequence[Shard] = ()
    ) -> None:
        """Register both, uninitialised, with grains that all shards are whole numbers of."""
        row_slices = [part for s in shards for part in (s.source_rows, s.target_rows)]
        column_slices = [shard.source_columns for shard in shards]
        layer.row_grain = grain(self.block[0], output_size, row_slices)
        layer.column_grain = grain(self.block[1], input_size, column_slices)
        shape = (output_size // layer.row_grain, input_size // layer.column_grain)
        register(layer, "weight", torch.empty(output_size, input_size, dtype=E4M3))
        register(layer, "weight_scale", torch.empty(shape, dtype=torch.float32))

    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard of a weight, or the scales of its grains."""
        forget_dequantized(layer)
        if kind == "weight":
            load_e4m3(layer, loaded, shard)
        elif kind == self.scale_name:
            self.load_scales(layer, loaded, shard)
        else:
            check_input_scale(loaded)

    def load_scales(self, layer: Any, loaded: Any, shard: Shard) -> None:
        """Copy to each grain the scale of the block that it is in."""
        blocks = [
            -(-size // block) for size, block in zip(shard.full_shape, self.block, strict=True)
        ]
        check_shape(loaded, blocks)
        rows = torch.arange(shard.source_rows.start, shard.source_rows.stop, layer.row_grain)
        columns = torch.arange(
            shard.source_columns.start, shard.source_columns.stop, layer.column_grain
        )
        scales = read_scales(loaded)[rows // self.block[0]][:, columns // self.block[1]]
        layer.weight_scale[self.grains(layer, shard.target_rows)] = scales

    @staticmethod
    def grains(layer: Any, rows: slice) -> slice:
        """The grains that some rows of the layer's weight are."""
        if rows == ALL_ROWS:
            return rows
        return slice(rows.start // layer.row_grain, rows.stop // layer.row_grain)

    @staticmethod
    def split(layer: Any, weight: Tensor) -> Tensor:
        """A view `[row grains, row_grain, column grains, column_grain]` of a weight's rows."""
        sizes = (-1, layer.row_grain, weight.shape[1] // layer.column_grain, layer.column_grain)
        return weight.view(sizes)

    def weight_of(self, layer: Any, rows: slice = ALL_ROWS) -> FP8Weight:
        """The matrix as the kernels take it, or some rows of it."""
        return FP8Weight(
            values=layer.weight[rows],
            scales=layer.weight_scale[self.grains(layer, rows)],
            row_grain=layer.row_grain,
            column_grain=layer.column_grain,
        )

    def quantize(self, layer: Any, weight: Tensor, shard: Shard) -> None:
        """Scale each grain by its largest absolute value."""
        forget_dequantized(layer)
        local = self.split(layer, weight[:, shard.source_columns].float().contiguous())
        scale = scale_of(local.abs().amax((1, 3)))
        rounded = to_e4m3(local / scale[:, None, :, None])
        layer.weight[shard.target_rows] = rounded.view(-1, layer.weight.shape[1])
        layer.weight_scale[self.grains(layer, shard.target_rows)] = scale
