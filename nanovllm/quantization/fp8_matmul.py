"""Which kernel multiplies with an FP8 weight on a GPU."""

from __future__ import annotations

from enum import Enum, auto

import torch
from torch import Tensor

from nanovllm.kernels._triton import has_e4m3, has_tma
from nanovllm.kernels.fp8_block_gemm import fp8_block_gemm
from nanovllm.kernels.fp8_config import (
    FAST_ACCUMULATION,
    MAX_GEMM_TOKENS,
    MAX_GEMM_TOKENS_ALONE,
)
from nanovllm.kernels.fp8_dequantize import fp8_dequantize
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_gemv import THREAD_COLUMNS, fp8_gemv
from nanovllm.kernels.fp8_quantize import quantize_input
from nanovllm.kernels.fp8_weight import FP8Weight, dequantize_fp8
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import Epilogue, Norm, PartialSums, uses_gemv

# Before, `torch._scaled_mm` has one scale for a tensor only.
HAS_SCALED_MM = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 5)


class FP8Kernel(Enum):
    """The ways to compute `x W^T`."""

    GEMV = auto()  # one token: reading the weight is all the time it takes
    GEMM = auto()  # few tokens: the weight gets x's dtype in registers
    SCALED = auto()  # many: x is rounded to FP8 too, and the tensor cores multiply in FP8
    DEQUANTIZE = auto()  # many, or no kernel: the weight gets x's dtype in memory


def choose_fp8_kernel(x: Tensor, weight: FP8Weight, quantizes_input: bool) -> FP8Kernel:
    """Choose the fastest kernel for x `[n, in]`. This is decided here and nowhere else.

    quantizes_input: x may be rounded to FP8, with a scale for each token (and each block of
        columns, if the weight has blocks). That changes the result by what the checkpoint, or who
        asked for FP8, has accepted, so it is done where it is faster only.
    """
    if not has_e4m3():
        return FP8Kernel.DEQUANTIZE
    if uses_gemv(x):
        is_readable = weight.has_whole_rows or weight.column_grain % THREAD_COLUMNS == 0
        return FP8Kernel.GEMV if is_readable else FP8Kernel.DEQUANTIZE
    # TMA needs rows of a multiple of 16 bytes. Exact products of float32 are not for tensor cores.
    if not (has_tma() and weight.in_size % 16 == 0 and x.dtype.itemsize == 2):
        return FP8Kernel.DEQUANTIZE
    is_scaled = quantizes_input and (has_row_scales(weight, x) or has_blocks(weight))
    if is_scaled and len(x) > MAX_GEMM_TOKENS:
        return FP8Kernel.SCALED
    has_chunks = weight.has_whole_rows or weight.column_grain % 32 == 0
    if has_chunks and len(x) <= MAX_GEMM_TOKENS_ALONE:
        return FP8Kernel.GEMM
    return FP8Kernel.DEQUANTIZE


def has_row_scales(weight: FP8Weight, x: Tensor) -> bool:
    """Whether `torch._scaled_mm` multiplies with the weight: it writes bf16, and the sizes must be
    multiples of 16.
    """
    return (
        HAS_SCALED_MM
        and weight.has_whole_rows
        and weight.row_grain == 1
        and weight.out_size % 16 == 0
        and x.dtype == torch.bfloat16
    )


def has_blocks(weight: FP8Weight) -> bool:
    """Whether `fp8_block_gemm` multiplies with the weight: a block's columns are a tile's."""
    return weight.column_grain in (32, 64, 128)


def can_read_experts(weight: FP8Weight) -> bool:
    """Whether the kernels of a mixture of experts multiply with the weight, x in 16 bits."""
    return has_e4m3() and (weight.has_whole_rows or has_blocks(weight))


def multiply_fp8(
    weight: FP8Weight,
    x: Tensor,
    bias: Tensor | None,
    epilogue: Epilogue,
    norm: Norm | None,
    quantizes_input: bool,
) -> Tensor | PartialSums:
    """Multiply x `[n, in]`; see `WeightFormat.matmul`, and `choose_fp8_kernel`."""
    kernel = choose_fp8_kernel(x, weight, quantizes_input)
    if kernel is FP8Kernel.GEMV:
        return fp8_gemv(
            x,
            weight,
            bias,
            norm_weight=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            residual=epilogue.add_to,
            activation=epilogue.activation,
        )
    if kernel is FP8Kernel.DEQUANTIZE:
        matrix = dequantize_on_gpu(weight, x.dtype)
        return UNQUANTIZED.multiply_matrix(matrix, x, bias, epilogue, norm)
    assert norm is None and epilogue.activation is None, "only the GEMV computes these"
    # The activation on a CPU, where Triton's interpreter runs this, leaves a view.
    x = x.contiguous()
    if kernel is FP8Kernel.SCALED:
        product = multiply_scaled(weight, x, bias, epilogue.out)
        # Whoever adds computes the norm on the way, as of partial sums.
        return product if epilogue.add_to is None else PartialSums(product[None])
    reader_sums = epilogue.reader_sums or epilogue.add_to is not None
    sums = PartialSums(fp8_gemm(x, weight, bias, reader_sums))
    if epilogue.out is not None:
        return epilogue.out.copy_(sums.sum())
    return sums if reader_sums else sums.sum()


def multiply_scaled(
    weight: FP8Weight, x: Tensor, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """Round x `[n, in]` to FP8, and multiply in FP8: `[n, out]`, written to `out` if there is one.

    Its scales are those of `quantize_input`: one for each token, or one for each token and block
    of columns. They are found anew in each step, also where a checkpoint has one for all of them.
    """
    if out is None:
        out = torch.empty(len(x), weight.out_size, dtype=x.dtype, device=x.device)
    quantized = quantize_input(x, weight.column_grain)
    if not has_row_scales(weight, x):
        return fp8_block_gemm(quantized, weight, bias, out)
    return torch._scaled_mm(
        quantized.values,
        weight.values.t(),
        scale_a=quantized.scales.view(-1, 1),
        scale_b=weight.scales.view(1, -1),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=FAST_ACCUMULATION,
        out=out,
    )


def dequantize_on_gpu(weight: FP8Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize_fp8`, by a kernel if the GPU has e4m3."""
    return fp8_dequantize(weight, dtype) if has_e4m3() else dequantize_fp8(weight, dtype)
