"""FP8 weights (e4m3: 1 sign, 4 exponent and 3 mantissa bits; 448 is the largest number), with a
scale for each row of the matrix: `weight = scale * fp8`.

Micikevicius et al., FP8 Formats for Deep Learning, 2022. A row is an output channel, so a kernel
can multiply with the scale after the sum. A checkpoint may have one scale for a whole tensor; it is
kept for each row all the same, for the q, k and v projections that make one matrix here have three
of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels.fp8_weight import (
    E4M3,
    FP8Input,
    FP8Weight,
    Rounding,
    dequantize_fp8,
    scale_of,
    to_e4m3,
)
from nanovllm.kernels.gate_up_gemm import can_fuse_gate
from nanovllm.kernels.hopper_gemm import can_apply_activation
from nanovllm.quantization.fp8_matmul import (
    FP8Kernel,
    can_read_experts,
    choose_fp8_kernel,
    choose_rounding,
    dequantize_on_gpu,
    multiply_fp8,
    uses_hopper_gemm,
)
from nanovllm.quantization.quantized import (
    ALL_ROWS,
    SCALE_DTYPES,
    QuantizedFormat,
    forget_dequantized,
    read_scales,
    register,
)
from nanovllm.quantization.weight_format import Epilogue, Norm, PartialSums, Shard, uses_gemv
from nanovllm.utils.context import get_context
from nanovllm.utils.loader import DTYPES, check_shape


def load_e4m3(layer: Any, loaded: Any, shard: Shard) -> None:
    """Copy a shard of a matrix that is in FP8."""
    check_shape(loaded, shard.full_shape)
    layer.weight[shard.target_rows].copy_(loaded[shard.source_rows, shard.source_columns])


def check_input_scale(loaded: Any) -> None:
    """Check the shape of the scale that a checkpoint has for a layer's input.

    Nothing here uses the number, which may be anything: an expert that no token of the calibration
    reached has none that is right.
    """
    if list(shape_of(loaded)) not in ([], [1]):
        raise ValueError(f"has shape {list(shape_of(loaded))}, and must be one number")


def shape_of(loaded: Any) -> Sequence[int]:
    """The shape of a tensor, or of a safetensors slice."""
    return loaded.get_shape() if hasattr(loaded, "get_shape") else loaded.shape


class FP8(QuantizedFormat):
    """What the two formats of FP8 weights share: how they are multiplied."""

    quantizes_input: bool  # the input of a wide step on a GPU is rounded to FP8, too

    @abstractmethod
    def weight_of(self, layer: Any, rows: slice = ALL_ROWS) -> FP8Weight:
        """The matrix as the kernels take it, or some rows of it."""

    def dequantize(self, layer: Any, dtype: torch.dtype, rows: slice = ALL_ROWS) -> Tensor:
        """See `dequantize_fp8`."""
        weight = self.weight_of(layer, rows)
        if weight.values.is_cuda:
            return dequantize_on_gpu(weight, dtype)
        return dequantize_fp8(weight, dtype)

    def expert_weights(self, layer: Any, dtype: torch.dtype, num_experts: int) -> Any:
        """As they are, where the kernels can read them."""
        weight = self.weight_of(layer)
        if not can_read_experts(weight):
            return super().expert_weights(layer, dtype, num_experts)
        return weight._replace(values=weight.values.unflatten(0, (num_experts, -1)))

    def applies_activation(self, layer: Any, x: Tensor) -> bool:
        """The GEMV does. On Hopper `hopper_gemm` does, and so does the GEMM of a large prefill, of
        the dequantised weight.
        """
        if uses_gemv(x):
            return True
        weight = self.weight_of(layer)
        kernel = choose_fp8_kernel(x, weight, self.quantizes_input)
        if kernel is FP8Kernel.GEMM:
            return uses_hopper_gemm(x, weight) and can_apply_activation(weight)
        if kernel is FP8Kernel.DEQUANTIZE:
            return can_fuse_gate(x, layer.weight, get_context().in_graph)
        return False

    def rounding(self, layer: Any, x: Tensor) -> Rounding | None:
        """See `choose_rounding`; a CPU multiplies in 16 or 32 bits."""
        if not (self.quantizes_input and x.is_cuda):
            return None
        return choose_rounding(self.weight_of(layer), x, self.quantizes_input)

    def matmul(
        self,
        layer: Any,
        x: Tensor | FP8Input,
        bias: Tensor | None,
        epilogue: Epilogue,
        norm: Norm | None,
    ) -> Tensor | PartialSums:
        """Multiply by the kernel that `choose_fp8_kernel` names; see `WeightFormat.matmul`."""
        if isinstance(x, Tensor) and not x.is_cuda:
            return super().matmul(layer, x, bias, epilogue, norm)
        weight = self.weight_of(layer)
        return multiply_fp8(weight, x, bias, epilogue, norm, self.quantizes_input)


@dataclass(frozen=True)
class FP8Rows(FP8):
    """`weight` `[out, in]` e4m3 and `weight_scale` `[out]` float32.

    Its scales in a checkpoint are one for a tensor, `[]` or `[1]`, or one a row, `[out, 1]` or
    `[out]`.
    """

    has_row_scales: bool  # in the checkpoint; otherwise one for a tensor
    quantizes_input: bool = False

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

    def weight_of(self, layer: Any, rows: slice = ALL_ROWS) -> FP8Weight:
        """The matrix as the kernels take it, or some rows of it."""
        return FP8Weight(
            values=layer.weight[rows],
            scales=layer.weight_scale[rows],
            row_grain=1,
            column_grain=layer.weight.shape[1],
        )

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
