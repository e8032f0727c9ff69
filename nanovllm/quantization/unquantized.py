"""The format of an ordinary checkpoint: the weight as it is, in 16 or 32 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.kernels.gate_up_gemm import can_fuse_gate, gate_up_gemm
from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.split_gemm import num_splits, split_gemm
from nanovllm.quantization.weight_format import (
    Epilogue,
    Norm,
    PartialSums,
    Shard,
    WeightFormat,
    uses_gemv,
)
from nanovllm.utils.context import get_context
from nanovllm.utils.loader import DTYPES, check_shape, set_weight_loader


class MatmulKernel(Enum):
    """The kernels that can compute `x W^T`."""

    GEMV = auto()  # one token: reading the weight is all the time it takes
    SPLIT_K = auto()  # few tokens: the inner dimension is split until the whole card has work
    CUBLAS = auto()  # PyTorch's own; on a CPU too


@dataclass(frozen=True, slots=True)
class MatmulChoice:
    """A kernel, and how it is to be used."""

    kernel: MatmulKernel
    splits: int = 1  # of the inner dimension, for SPLIT_K


GEMV = MatmulChoice(MatmulKernel.GEMV)
CUBLAS = MatmulChoice(MatmulKernel.CUBLAS)


def choose_matmul(x: Tensor, weight: Tensor, reader_sums: bool) -> MatmulChoice:
    """Choose the fastest kernel for `x W^T`. This is decided here and nowhere else.

    reader_sums: whether the kernel that reads the product adds up the partial sums of split-K.
        Where it does not, an addition of its own would cost what splitting gains.
    """
    if uses_gemv(x):
        return GEMV
    step = get_context()
    if step.is_prefill and not step.in_graph:
        # A large prefill is launched kernel by kernel, and launching split_gemm takes the host
        # 26 us more than launching cuBLAS. A CUDA graph hides that.
        return CUBLAS
    splits = num_splits(x, weight)
    if splits == 1 or (splits > 1 and reader_sums):
        return MatmulChoice(MatmulKernel.SPLIT_K, splits)
    return CUBLAS


class Unquantized(WeightFormat):
    """One parameter, `weight` `[out, in]`, of the model's dtype."""

    tensors = {"weight": DTYPES}

    def create(
        self, layer: Any, output_size: int, input_size: int, shards: Sequence[Shard] = ()
    ) -> None:
        """Register `weight`, uninitialised."""
        layer.weight = nn.Parameter(torch.empty(output_size, input_size), requires_grad=False)
        set_weight_loader(layer.weight, layer.load_weight)

    def load(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard; only its part of the file is read."""
        check_shape(loaded, shard.full_shape)
        layer.weight[shard.target_rows].copy_(loaded[shard.source_rows, shard.source_columns])

    def applies_activation(self, layer: Any, x: Tensor) -> bool:
        """The GEMV does, and the GEMM of a large prefill on Hopper."""
        if uses_gemv(x):
            return True
        return can_fuse_gate(x, layer.weight, get_context().in_graph)

    def matmul(
        self,
        layer: Any,
        x: Tensor,
        bias: Tensor | None,
        epilogue: Epilogue,
        norm: Norm | None,
    ) -> Tensor | PartialSums:
        """Multiply by the kernel that `choose_matmul` names; see `WeightFormat.matmul`."""
        return self.multiply_matrix(layer.weight, x, bias, epilogue, norm)

    @staticmethod
    def multiply_matrix(
        weight: Tensor, x: Tensor, bias: Tensor | None, epilogue: Epilogue, norm: Norm | None
    ) -> Tensor | PartialSums:
        """`matmul`, given the weight `[out, in]` itself."""
        residual = epilogue.add_to
        reader_sums = epilogue.reader_sums or residual is not None
        if epilogue.out is not None:  # some rows of a large prefill, for which cuBLAS is fastest
            torch.mm(x, weight.t(), out=epilogue.out)
            return epilogue.out if bias is None else epilogue.out.add_(bias)

        choice = choose_matmul(x, weight, reader_sums)
        if choice.kernel is MatmulKernel.GEMV:
            return gemv(
                x,
                weight,
                bias,
                norm_weight=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
                residual=residual,
                activation=epilogue.activation,
            )
        assert norm is None, "only the GEMV normalises its input"
        if epilogue.activation is not None:
            return gate_up_gemm(x, weight, epilogue.activation)
        if choice.kernel is MatmulKernel.SPLIT_K:
            # It is contiguous on a GPU. The activation on a CPU leaves a view of half a tensor, and
            # there the tests run this kernel in Triton's interpreter.
            sums = PartialSums(split_gemm(x.contiguous(), weight, bias, choice.splits))
            return sums if reader_sums else sums.sum()  # of one split: nothing is added
        if residual is not None:
            residual.addmm_(x, weight.t())  # the GEMM adds as it writes
            return residual if bias is None else residual.add_(bias)
        return F.linear(x, weight, bias)


UNQUANTIZED = Unquantized()
