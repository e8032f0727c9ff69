"""Which kernel multiplies with an INT4 weight on a GPU."""

from __future__ import annotations

from enum import Enum, auto

import torch
from torch import Tensor

from nanovllm.kernels.hopper_config import MAX_HOPPER_TOKENS
from nanovllm.kernels.hopper_gemm import can_use_hopper_gemm, hopper_gemm
from nanovllm.kernels.int4_config import MAX_GEMM_TOKENS
from nanovllm.kernels.int4_dequantize import int4_dequantize
from nanovllm.kernels.int4_gemm import int4_gemm
from nanovllm.kernels.int4_gemv import int4_gemv
from nanovllm.kernels.int4_layout import Int4Weight
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import Epilogue, Norm, PartialSums, uses_gemv


class Int4Kernel(Enum):
    """The ways to compute `x W^T`."""

    GEMV = auto()  # one token: reading the weight is all the time it takes
    GEMM = auto()  # several tokens: the weight is dequantised in registers
    DEQUANTIZE = auto()  # many: it is dequantised to memory, and multiplied as any other


def choose_int4_kernel(x: Tensor) -> Int4Kernel:
    """Choose the fastest kernel for x `[n, in]`. This is decided here and nowhere else."""
    if uses_gemv(x):
        return Int4Kernel.GEMV
    # Exact products of float32 are not for tensor cores, which the GEMM is made for.
    max_gemm_tokens = MAX_HOPPER_TOKENS if can_use_hopper_gemm(x) else MAX_GEMM_TOKENS
    if len(x) <= max_gemm_tokens and x.dtype.itemsize == 2:
        return Int4Kernel.GEMM
    return Int4Kernel.DEQUANTIZE


def multiply_int4(
    weight: Int4Weight, x: Tensor, bias: Tensor | None, epilogue: Epilogue, norm: Norm | None
) -> Tensor | PartialSums:
    """Multiply x `[n, in]`; see `WeightFormat.matmul`."""
    kernel = choose_int4_kernel(x)
    if kernel is Int4Kernel.GEMV:
        return int4_gemv(
            x,
            weight,
            bias,
            norm_weight=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            residual=epilogue.add_to,
            activation=epilogue.activation,
        )
    assert norm is None, "only the GEMV normalises its input"
    if kernel is Int4Kernel.GEMM and epilogue.out is None:
        reader_sums = epilogue.reader_sums or epilogue.add_to is not None
        # The activation on a CPU, where Triton's interpreter runs this, leaves a view.
        x = x.contiguous()
        if can_use_hopper_gemm(x):
            sums = PartialSums(hopper_gemm(x, weight, bias, reader_sums, epilogue.activation))
        else:
            assert epilogue.activation is None, "only the GEMV and `hopper_gemm` apply it"
            sums = PartialSums(int4_gemm(x, weight, bias, reader_sums))
        return sums if reader_sums else sums.sum()
    if weight.column_order is not None:
        x = x[:, weight.column_order]
    matrix = int4_dequantize(weight, x.dtype)
    return UNQUANTIZED.multiply_matrix(matrix, x, bias, epilogue, norm=None)


def dequantize_on_gpu(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize_int4` by a kernel."""
    matrix = int4_dequantize(weight, dtype)
    if weight.column_order is None:
        return matrix
    ordered = torch.empty_like(matrix)
    ordered[:, weight.column_order] = matrix
    return ordered
