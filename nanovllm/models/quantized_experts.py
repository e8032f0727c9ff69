"""The experts of a mixture in a quantised format.

To a weight format, the matrices of all experts are one: they lie one below the other, as q, k and v
do in an attention layer. So a format serves experts as it serves linear layers.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

from torch import Tensor, nn

from nanovllm.kernels.cpu_memory import in_huge_pages
from nanovllm.layers.linear import divide
from nanovllm.quantization.quantized import QuantizedFormat
from nanovllm.quantization.tensor_loader import LoadTensor, tensor_loaders
from nanovllm.quantization.weight_format import Shard
from nanovllm.utils.loader import check_shape
from nanovllm.utils.tensor_parallel import get_tensor_parallel


class ExpertMatrices(nn.Module):
    """One matrix of every expert, or two: this rank's parts, one below the other."""

    def __init__(
        self, weight_format: QuantizedFormat, num_experts: int, shards: dict[str, Shard]
    ) -> None:
        """shards: of each matrix, by its name among the experts ("7.up_proj"), in the order
        in which they lie.
        """
        super().__init__()
        self.weight_format = weight_format
        self.num_experts = num_experts
        self.shards = shards
        last = list(shards.values())[-1]
        columns = last.source_columns
        self.dequantized: dict[int, Tensor] | None = None  # of a CPU: by expert, once it is used
        num_rows = last.target_rows.stop
        self.rows_per_expert = num_rows // num_experts
        num_columns = columns.stop - columns.start
        weight_format.create(self, num_rows, num_columns, list(shards.values()))

    def checkpoint_tensors(self, prefix: str, names: Collection[str]) -> dict[str, LoadTensor]:
        """Name the checkpoint's tensors, and how each is loaded; see `Experts`.

        One tensor for all experts is read where the format is made of 16-bit weights.
        """
        merged = prefix in names and list(self.weight_format.tensors) == ["weight"]
        if merged:
            return {prefix: self.load_merged}
        parent, _, _ = prefix.rpartition(".")
        tensors: dict[str, LoadTensor] = {}
        for name, shard in self.shards.items():
            load = partial(self.load, shard=shard)
            tensors.update(tensor_loaders(self.weight_format, f"{parent}.{name}", names, load))
        return tensors

    def load(self, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy this rank's part of a tensor of one expert."""
        self.weight_format.load(self, kind, loaded, shard)

    def load_merged(self, loaded: Any) -> None:
        """Copy this rank's part of a tensor with the 16-bit weights of all experts."""
        shards = list(self.shards.values())
        rows, columns = shards[0].full_shape
        per_expert = len(shards) // self.num_experts
        check_shape(loaded, (self.num_experts, per_expert * rows, columns))
        for index, shard in enumerate(shards):
            expert, part = divmod(index, per_expert)
            self.load("weight", ExpertPart(loaded, expert, part * rows, shard.full_shape), shard)

    def weights_for(self, x: Tensor) -> Any:
        """The weights to multiply x with, as a format's kernels take them, or dequantised: a tensor
        `[experts, rows, in]`, or on a CPU something that has those of expert e at index e.
        """
        if not x.is_cuda:
            return DequantizedExperts(self, x)
        return self.weight_format.expert_weights(self, x.dtype, self.num_experts)


class ExpertPart:
    """One expert's matrix in a tensor `[experts, rows, columns]` of a checkpoint; nothing is read
    until it is indexed.
    """

    def __init__(self, loaded: Any, expert: int, first_row: int, shape: tuple[int, int]) -> None:
        self.loaded = loaded
        self.expert = expert
        self.first_row = first_row
        self.shape = shape

    def __getitem__(self, rows: slice) -> Tensor:
        first = self.first_row
        return self.loaded[self.expert, first + rows.start : first + rows.stop]


class DequantizedExperts:
    """The experts' weights on a CPU. An expert is dequantised when a token first chooses it."""

    def __init__(self, matrices: ExpertMatrices, x: Tensor) -> None:
        self.matrices = matrices
        self.dtype = x.dtype

    def __getitem__(self, expert: int) -> Tensor:
        matrices = self.matrices
        if matrices.dequantized is None:
            matrices.dequantized = {}
        known = matrices.dequantized
        if expert not in known:
            first = expert * matrices.rows_per_expert
            rows = slice(first, first + matrices.rows_per_expert)
            weight = matrices.weight_format.dequantize(matrices, self.dtype, rows)
            known[expert] = in_huge_pages(weight)
        return known[expert]


class QuantizedExperts(nn.Module):
    """This rank's share of all experts' weights, as `Experts` has it of 16-bit ones."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        weight_format: QuantizedFormat,
    ) -> None:
        super().__init__()
        tp = get_tensor_parallel()
        local_size = divide("moe_intermediate_size", intermediate_size, tp.size)
        local = slice(tp.rank * local_size, (tp.rank + 1) * local_size)
        gate_up: dict[str, Shard] = {}
        down: dict[str, Shard] = {}
        for expert in range(num_experts):
            for half, name in enumerate(("gate_proj", "up_proj")):
                first = (2 * expert + half) * local_size
                gate_up[f"{expert}.{name}"] = Shard(
                    full_shape=(intermediate_size, hidden_size),
                    source_rows=local,
                    source_columns=slice(0, hidden_size),
                    target_rows=slice(first, first + local_size),
                )
            down[f"{expert}.down_proj"] = Shard(
                full_shape=(hidden_size, intermediate_size),
                source_rows=slice(0, hidden_size),
                source_columns=local,
                target_rows=slice(expert * hidden_size, (expert + 1) * hidden_size),
            )
        self.gate_up_proj = ExpertMatrices(weight_format, num_experts, gate_up)
        self.down_proj = ExpertMatrices(weight_format, num_experts, down)
