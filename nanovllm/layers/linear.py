"""Linear layers whose weight is split over the tensor-parallel ranks.

Column-parallel layers split the outputs, row-parallel ones the inputs and sum the results: one after the other they
cost one all-reduce (Shoeybi et al., Megatron-LM, 2019). A parameter's `weight_loader(param, loaded, shard_id)` copies
this rank's part of a checkpoint tensor: of a safetensors slice (or a tensor), only what is indexed is read.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.rms_norm import add_rms_norm
from nanovllm.kernels.split_gemm import num_splits, split_gemm
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.context import get_context
from nanovllm.utils.loader import check_shape
from nanovllm.utils.tensor_parallel import get_tensor_parallel


def divide(what: str, num: int, parts: int) -> int:
    """`num / parts`, or a ValueError that names both."""
    if num % parts:
        raise ValueError(
            f"{what} ({num}) cannot be split over tensor_parallel_size {parts}; use a divisor of it"
        )
    return num // parts


def takes_gemv(x: Tensor) -> bool:
    return x.is_cuda and x.shape[0] == 1


def parts_of(x: Tensor, weight: Tensor) -> int:
    """In how many parts `split_gemm` is to compute `x W^T`; 0: cuBLAS is to. A launch takes the host 26 us more than
    cuBLAS's, which counts in a prefill, where one kernel is launched after the other, and not in a graph."""
    return 0 if get_context().is_prefill else num_splits(x, weight)


def normed_linear(
    x: Tensor,
    norm: RMSNorm | None,
    weight: Tensor,
    bias: Tensor | None = None,
    in_parts: bool = False,
) -> Tensor:
    """`norm(x) W^T + b`, for one token in one kernel; with `in_parts`, where that is faster, `[parts, n, out]` whose
    sum it is, for a kernel that adds them up as it reads them."""
    if takes_gemv(x):
        return gemv(x, weight, bias, *((norm.weight, norm.eps) if norm is not None else ()))
    x = x if norm is None else norm(x)
    num_parts = parts_of(x, weight)
    if num_parts == 1 or (num_parts > 1 and in_parts):
        return split_gemm(x, weight, bias, num_parts).squeeze(0)  # one part is the sum
    return F.linear(x, weight, bias)


class LinearBase(nn.Module):
    """A weight `[output_size, input_size]` and maybe a bias, as this rank holds them."""

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.tp = get_tensor_parallel()
        self.weight = nn.Parameter(torch.empty(output_size, input_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(output_size), requires_grad=False) if bias else None
        for param in self.parameters():
            param.weight_loader = self.weight_loader

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """x `[n, in]` -> `norm(x) W^T + b`, this rank's outputs."""
        return normed_linear(x, norm, self.weight, self.bias)


class MergedColumnParallelLinear(LinearBase):
    """Several column-parallel matrices that read the same input, stacked to one GEMM.

    `output_sizes` are those of each matrix, over all ranks; a rank's output is `[its part of the first, ...]`, of
    sizes `parts`: by default equal shares. Where they are larger, several ranks hold the same.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: list[int],
        bias: bool = False,
        parts: list[int] | None = None,
    ) -> None:
        tp_size = get_tensor_parallel().size
        self.output_sizes = output_sizes
        self.parts = parts or [divide("an output size", size, tp_size) for size in output_sizes]
        super().__init__(input_size, sum(self.parts), bias)

    def weight_loader(self, param: nn.Parameter, loaded, shard_id: int = 0) -> None:
        size, part = self.output_sizes[shard_id], self.parts[shard_id]
        check_shape(loaded, (size, *param.shape[1:]))
        offset, first = (
            sum(self.parts[:shard_id]),
            self.tp.rank * size // self.tp.size // part * part,
        )
        param[offset : offset + part].copy_(loaded[first : first + part])


class ColumnParallelLinear(MergedColumnParallelLinear):
    """One matrix `[output_size / tp, input_size]`; the output stays split."""

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__(input_size, [output_size], bias)


class QKVParallelLinear(MergedColumnParallelLinear):
    """The query, key and value projections as one GEMM, split by heads: `[q heads, k heads, v heads] x head_dim`.

    `num_heads` and `num_kv_heads` are this rank's. With fewer KV heads than ranks, several ranks hold each.
    """

    def __init__(
        self, hidden_size: int, head_dim: int, total_heads: int, total_kv_heads: int, bias: bool
    ) -> None:
        tp_size = get_tensor_parallel().size
        self.num_heads = divide("num_attention_heads", total_heads, tp_size)
        copies = (
            divide("tensor_parallel_size", tp_size, total_kv_heads)
            if total_kv_heads < tp_size
            else 1
        )
        self.num_kv_heads = divide("num_key_value_heads", total_kv_heads * copies, tp_size)
        sizes = [heads * head_dim for heads in (total_heads, total_kv_heads, total_kv_heads)]
        parts = [
            heads * head_dim for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        ]
        super().__init__(hidden_size, sizes, bias, parts)

    def weight_loader(self, param: nn.Parameter, loaded, shard_id: str = "q") -> None:
        super().weight_loader(param, loaded, "qkv".index(shard_id))

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """As above, or in parts; in a prefill on several GPUs the last piece of x may arrive while the others are
        multiplied."""
        if norm is not None or not self.tp.sums_in_pieces(len(x)):
            return normed_linear(x, norm, self.weight, self.bias, in_parts=True)
        out = x.new_empty(len(x), len(self.weight))
        for rows in self.tp.arriving(len(x)):
            torch.mm(x[rows], self.weight.t(), out=out[rows])
        return out if self.bias is None else out.add_(self.bias)


class RowParallelLinear(LinearBase):
    """One matrix `[output_size, input_size / tp]` on an input that is split; the results are summed."""

    def __init__(self, input_size: int, output_size: int, bias: bool = False) -> None:
        self.input_size = input_size
        super().__init__(
            divide("an input size", input_size, get_tensor_parallel().size), output_size, bias
        )

    def weight_loader(self, param: nn.Parameter, loaded, shard_id: None = None) -> None:
        is_bias, part = param.dim() == 1, param.shape[-1]
        check_shape(loaded, param.shape if is_bias else (param.shape[0], self.input_size))
        param.copy_(
            loaded[:] if is_bias else loaded[:, self.tp.rank * part : (self.tp.rank + 1) * part]
        )

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        next_norm: RMSNorm | None = None,
        before: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[Tensor, Tensor | None]:
        """x `[n, in / tp]` -> `residual + x W^T + b`, in place of `residual` `[n, out]`; and its `next_norm`, where
        the kernel that adds computes it on the way, else None.

        x is what `before` makes of its argument row by row: so it can be made, and summed, piece by piece. What such
        a sum leaves is said at `TensorParallel.all_reduce_in_pieces`."""
        bias = self.bias if self.tp.rank == 0 else None  # added once, not once a rank
        if self.tp.sums_in_pieces(len(x)):
            compute = lambda rows: F.linear(before(x[rows]), self.weight, bias)  # noqa: E731
            return self.tp.all_reduce_in_pieces(compute, residual, next_norm)
        x = before(x)
        if self.tp.size > 1:
            next_norm = None if takes_gemv(x) else next_norm  # a GEMV norms its input itself
            product = normed_linear(x, None, self.weight, bias, in_parts=True)
            return self.tp.all_reduce(product, residual, next_norm)
        if takes_gemv(x):
            gemv(x, self.weight, bias, residual=residual)
        elif num_parts := parts_of(x, self.weight):
            norm = (next_norm.weight, next_norm.eps) if next_norm is not None else (None, 0.0)
            return residual, add_rms_norm(
                residual, split_gemm(x, self.weight, bias, num_parts), *norm
            )
        else:
            residual.addmm_(x, self.weight.t())  # the GEMM adds as it writes
            if bias is not None:
                residual.add_(bias)
        return residual, None
