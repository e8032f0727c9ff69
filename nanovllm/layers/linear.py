"""Linear layers whose weight is split over the tensor-parallel ranks.

A column-parallel layer splits the outputs: each rank computes some of them from the whole input. A
row-parallel layer splits the inputs: each rank computes a part of every sum, and an all-reduce adds
the parts up. One after the other they cost a single all-reduce (Shoeybi et al., Megatron-LM, 2019).

A layer here is sharding times weight format: the classes below say which part of a checkpoint's
matrix a rank holds, and a `WeightFormat` says how that is stored, loaded and multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.fp8_weight import Rounding
from nanovllm.layers.residual import Normed
from nanovllm.quantization.construction import initial_format
from nanovllm.quantization.weight_format import (
    PLAIN,
    READER_SUMS,
    Epilogue,
    Norm,
    PartialSums,
    Shard,
    WeightFormat,
)
from nanovllm.utils.loader import check_shape, set_weight_loader
from nanovllm.utils.tensor_parallel import get_tensor_parallel


def divide(what: str, num: int, parts: int) -> int:
    """Return `num / parts`, or raise a ValueError that names both."""
    if num % parts:
        raise ValueError(
            f"{what} ({num}) cannot be split over tensor_parallel_size {parts}; use a divisor of it"
        )
    return num // parts


class LinearBase(nn.Module):
    """This rank's part of a matrix `[output_size, input_size]` and maybe of a bias.

    The sizes are those of this rank. A parameter that is not quantised carries a `weight_loader(
    param, loaded, shard_id)`, which copies this rank's part of a checkpoint tensor; where the
    parameter merges several tensors, shard_id says which one `loaded` is.
    """

    epilogue: Epilogue = PLAIN  # what becomes of the product

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.tp = get_tensor_parallel()
        self.input_size = input_size
        self.output_size = output_size
        self.use_format(initial_format())
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False)
            set_weight_loader(self.bias, self.load_bias)

    def use_format(self, weight_format: WeightFormat, shards: Sequence[Shard] = ()) -> None:
        """Have a weight of this format, uninitialised; see `WeightFormat.create`."""
        self.weight_format = weight_format
        weight_format.create(self, self.output_size, self.input_size, shards)

    def shard(self, shard_id: Any = None) -> Shard:
        """Say which part of checkpoint matrix `shard_id` this rank holds, and where."""
        raise NotImplementedError

    def shards(self, shard_id: Any = None) -> list[Shard]:
        """The same as a list, for a checkpoint may have several of the matrices in one tensor."""
        return [self.shard(shard_id)]

    def load_weight(self, param: nn.Parameter, loaded: Any, shard_id: Any = None) -> None:
        """Copy this rank's part of a weight that is not quantised."""
        self.load("weight", loaded, shard_id)

    def load(self, kind: str, loaded: Any, shard_id: Any = None) -> None:
        """Copy this rank's part of a tensor of a weight; see `WeightFormat.load`."""
        for shard in self.shards(shard_id):
            self.weight_format.load(self, kind, loaded, shard)

    def load_bias(self, param: nn.Parameter, loaded: Any, shard_id: Any = None) -> None:
        """Copy this rank's part of a bias."""
        shard = self.shard(shard_id)
        check_shape(loaded, shard.full_shape[:1])
        param[shard.target_rows].copy_(loaded[shard.source_rows])

    def rounding(self, x: Tensor) -> Rounding | None:
        """How its input should come; see `WeightFormat.rounding`."""
        return self.weight_format.rounding(self, x)

    def matmul(self, x: Any, epilogue: Epilogue, norm: Norm | None = None) -> Tensor | PartialSums:
        """Compute this rank's `x W^T + b`; see `WeightFormat.matmul`."""
        return self.weight_format.matmul(self, x, self.bias, epilogue, norm)

    def project(self, x: Tensor | Normed, epilogue: Epilogue) -> Any:
        """`matmul`, of an input that may still have to be normalised."""
        if isinstance(x, Normed):
            return x.project(self, epilogue)
        return self.matmul(x, epilogue)

    def forward(self, x: Tensor | Normed) -> Any:
        """Compute `x W^T + b` of x `[n, in]`, with what `epilogue` makes of it: `[n, out]`."""
        return self.project(x, self.epilogue)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel matrices that read the same input, stacked for one GEMM.

    A rank's output is `[its shard of the first, its shard of the second, ...]`.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = False,
        shard_sizes: list[int] | None = None,
    ) -> None:
        """Make a layer of matrices `[output_sizes[i], input_size]`, the sizes over all ranks.

        shard_sizes: how many rows of each a rank holds, by default equal shares. If they are more,
            several ranks hold the same rows.
        """
        if shard_sizes is None:
            tp_size = get_tensor_parallel().size
            shard_sizes = [divide("an output size", size, tp_size) for size in output_sizes]
        self.output_sizes = output_sizes
        self.shard_sizes = shard_sizes
        super().__init__(input_size, sum(shard_sizes), bias)

    def shard(self, shard_id: Any = 0) -> Shard:
        """Some rows of matrix number `shard_id`."""
        full_size = self.output_sizes[shard_id]  # in the checkpoint
        local_size = self.shard_sizes[shard_id]  # on this rank
        num_shards = full_size // local_size
        ranks_per_shard = self.tp.size // num_shards  # more than 1 where ranks share a KV head
        source = self.tp.rank // ranks_per_shard * local_size
        target = sum(self.shard_sizes[:shard_id])
        return Shard(
            full_shape=(full_size, self.input_size),
            source_rows=slice(source, source + local_size),
            source_columns=slice(0, self.input_size),
            target_rows=slice(target, target + local_size),
        )


class QKVParallelLinear(MergedColumnParallelLinear):
    """The query, key and value projections as one GEMM, split by heads.

    A rank's output is `[its query heads, its key heads, its value heads] x head_dim`. If there are
    fewer KV heads than ranks, several ranks hold each. `num_heads` and `num_kv_heads` are those of
    this rank. The output may be left in partial sums, which the kernel that reads it adds up.
    """

    packed_modules_mapping = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
    epilogue = READER_SUMS

    def __init__(
        self, hidden_size: int, head_dim: int, total_heads: int, total_kv_heads: int, bias: bool
    ) -> None:
        tp_size = get_tensor_parallel().size
        copies = 1  # of each KV head
        if total_kv_heads < tp_size:
            copies = divide("tensor_parallel_size", tp_size, total_kv_heads)
        self.num_heads = divide("num_attention_heads", total_heads, tp_size)
        self.num_kv_heads = divide("num_key_value_heads", total_kv_heads * copies, tp_size)
        total = [total_heads, total_kv_heads, total_kv_heads]
        local = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        super().__init__(
            hidden_size,
            output_sizes=[heads * head_dim for heads in total],
            bias=bias,
            shard_sizes=[heads * head_dim for heads in local],
        )

    def shard(self, shard_id: Any = "q") -> Shard:
        """The heads of the projection "q", "k" or "v"."""
        return super().shard("qkv".index(shard_id))


class RowParallelLinear(LinearBase):
    """One matrix `[output_size, input_size / tp]` on an input that is split.

    Each rank has a part of every sum. `ResidualStream.add` sums them over the ranks and adds the
    result to the stream.
    """

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        self.full_input_size = input_size
        local_size = divide("an input size", input_size, get_tensor_parallel().size)
        super().__init__(local_size, output_size, bias)

    def shard(self, shard_id: Any = None) -> Shard:
        """Some columns of every row."""
        first = self.tp.rank * self.input_size
        return Shard(
            full_shape=(self.output_size, self.full_input_size),
            source_rows=slice(0, self.output_size),
            source_columns=slice(first, first + self.input_size),
            target_rows=slice(0, self.output_size),
        )

    def matmul(self, x: Any, epilogue: Epilogue, norm: Norm | None = None) -> Tensor | PartialSums:
        """Compute this rank's part of `x W^T + b`, x `[n, in / tp]`."""
        bias = self.bias if self.tp.rank == 0 else None  # it is added once, not once a rank
        return self.weight_format.matmul(self, x, bias, epilogue, norm)
