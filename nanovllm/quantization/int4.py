"""INT4 weights, of which a group of columns shares a scale: `weight = scale * (n - zero point)`.

Checkpoints have them in three layouts (awq.py, gptq.py, pack_quantized.py). All become one of our
own while they are loaded, see kernels/int4_layout.py; a layout's file only says how its tensors are
read. Activations stay in 16 bits: for few tokens it is the bytes of the weights that take the time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels.gate_up_gemm import can_fuse_gate
from nanovllm.kernels.hopper_gemm import can_apply_activation, can_use_hopper_gemm
from nanovllm.kernels.int4_layout import (
    STRIPE,
    SYMMETRIC_ZERO,
    Int4Weight,
    dequantize_int4,
    pack_int4,
    packed_width,
    unpack_int4,
)
from nanovllm.quantization.int4_matmul import (
    Int4Kernel,
    choose_int4_kernel,
    dequantize_on_gpu,
    multiply_int4,
)
from nanovllm.quantization.quantized import (
    ALL_ROWS,
    QuantizedFormat,
    forget_dequantized,
    grain,
    read_scales,
    register,
)
from nanovllm.quantization.weight_format import Epilogue, Norm, PartialSums, Shard
from nanovllm.utils.context import get_context

SCALE_TENSORS = ("F16", "BF16", "F32")
WHOLE_ROW = -1  # as a group size: one group a row
ROWS_AT_A_TIME = (
    4096  # of a matrix that is sorted in place: what is unpacked takes eight bytes a number
)


@dataclass(frozen=True)
class Int4(QuantizedFormat):
    """`packed` `[out, in / 4]` int16, `scales` `[out, groups]` and `zero_points` `[out, groups]`
    uint8, which a symmetric weight does not have: they would all be 8.

    `layer.group_size` is the checkpoint's, unless a rank's part begins or ends inside a group: then
    it is the largest number of columns that divides both, and a group's scale is kept several
    times.

    Where a checkpoint was quantised in the order of the columns' importance, a group is no run of
    neighbours but what its `group_index` names. Then the columns are sorted by group here, once
    they are all loaded, and `layer.column_order` `[in]` int32 says which column of the input each
    is multiplied with.
    """

    group_size: int  # columns of a group in the checkpoint, or WHOLE_ROW
    is_symmetric: bool
    has_group_index: bool = False  # the checkpoint says of each column which group it is in

    def create(
        self, layer: Any, output_size: int, input_size: int, shards: Sequence[Shard] = ()
    ) -> None:
        """Register them, uninitialised.

        Raises:
            ValueError: the borders of a rank's part leave groups that are too small.
        """
        layer.group_size = input_size
        if self.group_size != WHOLE_ROW:
            layer.group_size = grain(
                self.group_size, input_size, [shard.source_columns for shard in shards]
            )
            if layer.group_size % STRIPE and layer.group_size != input_size:
                raise ValueError(
                    f"groups of {self.group_size} columns do not divide the {input_size} columns "
                    f"of a rank's part into groups of a multiple of {STRIPE}; use another "
                    "tensor_parallel_size"
                )
        # fp16 keeps a checkpoint's 16-bit scales as they are, those in bf16 from 2^-17 on; smaller
        # ones are of weights next to 0.
        exact = torch.get_default_dtype() == torch.float32
        groups = (output_size, input_size // layer.group_size)
        register(
            layer, "packed", torch.empty(output_size, packed_width(input_size), dtype=torch.int16)
        )
        register(
            layer, "scales", torch.empty(groups, dtype=torch.float32 if exact else torch.float16)
        )
        layer.register_parameter("zero_points", None)
        if not self.is_symmetric:
            register(layer, "zero_points", torch.empty(groups, dtype=torch.uint8))
        layer.register_parameter("column_order", None)
        if self.has_group_index:
            register(layer, "column_order", torch.empty(input_size, dtype=torch.int32))
        layer.input_columns = input_size
        layer.group_indices = []  # of the matrices loaded so far, until `finish`
        layer.is_finished = False
        layer.is_sorted = False  # whether `column_order` is not just 0, 1, 2, ...

    # --- loading ---

    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard's part of a tensor, in this module's layout."""
        if layer.is_finished and self.has_group_index:
            raise ValueError(
                "is of a matrix with columns in an order of its own (desc_act or actorder)"
                ", which cannot be loaded again"
            )
        forget_dequantized(layer)
        self.load_tensor(layer, kind, loaded, shard)

    @abstractmethod
    def load_tensor(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """`load` in the layout of the checkpoint, by means of the `put_` methods below."""

    def put_values(self, layer: Any, values: Tensor, shard: Shard) -> None:
        """Pack the n `[rows, columns]` of the shard, 0 to 15."""
        layer.packed[shard.target_rows] = pack_int4(values)

    def put_scales(self, layer: Any, scales: Tensor, shard: Shard) -> None:
        """Keep `[rows, the checkpoint's groups]` scales of the shard's rows, float32."""
        columns = self.groups_of(layer, shard)
        layer.scales[shard.target_rows] = scales[:, columns].to(layer.scales)

    def put_zero_points(self, layer: Any, zero_points: Tensor, shard: Shard) -> None:
        """Keep `[rows, the checkpoint's groups]` zero points of the shard's rows.

        Raises:
            ValueError: they are not what makes symmetric weights, and the weights are to be.
        """
        if layer.zero_points is not None:
            columns = self.groups_of(layer, shard)
            layer.zero_points[shard.target_rows] = zero_points[:, columns].to(layer.zero_points)
        elif (zero_points != SYMMETRIC_ZERO).any():
            found = zero_points.unique().tolist()
            raise ValueError(
                f"holds the zero points {found}, and quantization_config says that the weights are "
                f"symmetric: all must be {SYMMETRIC_ZERO}. One less or more is what the other "
                "checkpoint_format of GPTQ has (gptq or gptq_v2)"
            )

    def put_group_index(self, layer: Any, group_index: Tensor, shard: Shard) -> None:
        """Note which group each column `[columns of the whole matrix]` is in, for `finish`.

        Raises:
            ValueError: these are no groups of `group_size`, or not in order where they must be.
        """
        num_columns = shard.full_shape[1]
        group_size = self.columns_of_group(num_columns)
        in_order = torch.arange(num_columns) // group_size
        group_index = group_index.long().cpu()
        if not torch.equal(group_index.sort().values, in_order):
            raise ValueError(f"does not give each group of {group_size} columns so many of them")
        is_in_order = torch.equal(group_index, in_order)
        if not self.has_group_index:
            if not is_in_order:
                raise ValueError("has the groups out of order, though desc_act (actorder) is off")
            return
        if not is_in_order and shard.source_columns != slice(0, num_columns):
            raise ValueError(
                "has the groups out of order, so that columns of one group are on different ranks; "
                "such a checkpoint (desc_act, actorder) needs tensor_parallel_size 1"
            )
        layer.group_indices.append(group_index[shard.source_columns])

    def groups_of(self, layer: Any, shard: Shard) -> Tensor:
        """The checkpoint's group of each of the layer's groups."""
        first_column = shard.source_columns.start
        columns = torch.arange(first_column, shard.source_columns.stop, layer.group_size)
        return columns.to(layer.packed.device) // self.columns_of_group(shard.full_shape[1])

    def num_groups(self, shard: Shard) -> int:
        """The groups that a row of the checkpoint's matrix has."""
        num_columns = shard.full_shape[1]
        return -(-num_columns // self.columns_of_group(num_columns))

    def columns_of_group(self, num_columns: int) -> int:
        """How many columns of a checkpoint's matrix share a scale."""
        return num_columns if self.group_size == WHOLE_ROW else self.group_size

    def finish(self, layer: Any) -> None:
        """Sort the columns by group, if they are not.

        Raises:
            ValueError: the matrices that are one here have different groups.
        """
        group_indices = layer.group_indices
        layer.group_indices = []
        layer.is_finished = True
        if not group_indices:
            return
        for group_index in group_indices:
            if not torch.equal(group_index, group_indices[0]):
                raise ValueError(
                    "they are multiplied as one matrix here, and have different groups of columns "
                    "(g_idx); quantise them with one order, or without desc_act"
                )
        order = group_indices[0].argsort(stable=True)
        layer.column_order.copy_(order)
        layer.is_sorted = not torch.equal(order, torch.arange(len(order)))
        if not layer.is_sorted:
            return
        for packed in layer.packed.split(ROWS_AT_A_TIME):
            values = unpack_int4(packed, layer.input_columns)
            packed.copy_(pack_int4(values[:, layer.column_order.long()]))

    # --- the weight ---

    def weight_of(self, layer: Any, rows: slice = ALL_ROWS) -> Int4Weight:
        """The matrix as the kernels take it, or some rows of it."""
        zero_points = layer.zero_points
        return Int4Weight(
            packed=layer.packed[rows],
            scales=layer.scales[rows],
            zero_points=None if zero_points is None else zero_points[rows],
            in_size=layer.input_columns,
            group_size=layer.group_size,
            column_order=layer.column_order if layer.is_sorted else None,
        )

    def dequantize(self, layer: Any, dtype: torch.dtype, rows: slice = ALL_ROWS) -> Tensor:
        """The columns are those of the input."""
        weight = self.weight_of(layer, rows)
        if weight.packed.is_cuda:
            return dequantize_on_gpu(weight, dtype)
        return dequantize_int4(weight, dtype)

    def expert_weights(self, layer: Any, dtype: torch.dtype, num_experts: int) -> Any:
        """All experts' matrices, one below the other, as they are."""
        return self.weight_of(layer)

    def applies_activation(self, layer: Any, x: Tensor) -> bool:
        """The GEMV does. On Hopper `hopper_gemm` does, and so does the GEMM of a large prefill, of
        the dequantised weight.
        """
        kernel = choose_int4_kernel(x)
        if kernel is Int4Kernel.GEMV:
            return True
        if kernel is Int4Kernel.GEMM:
            return can_use_hopper_gemm(x) and can_apply_activation(self.weight_of(layer))
        return can_fuse_gate(x, layer.packed, get_context().in_graph)

    def matmul(
        self, layer: Any, x: Tensor, bias: Tensor | None, epilogue: Epilogue, norm: Norm | None
    ) -> Tensor | PartialSums:
        """Multiply by the kernel that `choose_int4_kernel` names; see `WeightFormat.matmul`."""
        if not x.is_cuda:
            return super().matmul(layer, x, bias, epilogue, norm)
        return multiply_int4(self.weight_of(layer), x, bias, epilogue, norm)

    def quantize(self, layer: Any, weight: Tensor, shard: Shard) -> None:
        """Round to the nearest, with the scale that the largest weight of a group asks for."""
        forget_dequantized(layer)
        num_rows, num_columns = weight.shape
        size = self.columns_of_group(num_columns)
        # A rank's part of random weights may end inside a group.
        groups = F.pad(weight.float(), (0, -num_columns % size)).view(num_rows, -1, size)
        if self.is_symmetric:
            scales = groups.abs().amax(2) / 7
            zero_points = torch.full_like(scales, SYMMETRIC_ZERO)
        else:
            low = groups.amin(2).clamp(max=0.0)
            scales = (groups.amax(2).clamp(min=0.0) - low) / 15
            zero_points = (-low / scales.clamp(min=1e-12)).round()
        scales = scales.clamp(min=2.0**-20)  # of groups of zeros
        self.put_scales(layer, scales, shard)
        self.put_zero_points(layer, zero_points, shard)
        scales = scales.to(layer.scales.dtype).float()
        values = (groups / scales[..., None]).round() + zero_points[..., None]
        values = values.clamp(0, 15).view(num_rows, -1)
        self.put_values(layer, values[:, shard.source_columns], shard)
        if self.has_group_index:
            layer.group_indices.append(torch.arange(num_columns)[shard.source_columns] // size)


def read_group_scales(loaded: Any, index: Any, layer: Any) -> Tensor:
    """Read scales of a checkpoint, on the layer's device."""
    return read_scales(loaded, index, may_be_negative=True).to(layer.packed.device)


def nibbles(words: Tensor, order: Sequence[int]) -> Tensor:
    """Take numbers of four bits out of int32 words `[..., n]`: uint8 `[..., 8 n]`.

    order: `order[i]` is the place, among the eight of a word, of the number in its bits 4 i to
        4 i + 3.
    """
    shifts = torch.empty(8, dtype=torch.int32, device=words.device)
    shifts[list(order)] = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return (words[..., None] >> shifts & 15).to(torch.uint8).flatten(-2)


def words_of(numbers: slice) -> slice:
    """The words that hold some numbers, of which a word has eight."""
    return slice(numbers.start // 8, -(-numbers.stop // 8))


def check_packable(shard: Shard, dimension: int) -> None:
    """Raise a ValueError for a matrix that words of eight numbers do not divide."""
    size = shard.full_shape[dimension]
    if size % 8:
        what = ("rows", "columns")[dimension]
        raise ValueError(f"is of a matrix of {size} {what}, which must be a multiple of 8")


def from_words(words: slice, numbers: slice) -> slice:
    """Where the numbers are among all of the words that hold them."""
    first = words.start * 8
    return slice(numbers.start - first, numbers.stop - first)
