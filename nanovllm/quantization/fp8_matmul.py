"""Which kernel multiplies with an FP8 weight on a GPU."""

from __future__ import annotations

from enum import Enum, auto

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    device_limits,
    has_e4m3,
    has_tma,
    is_hopper,
    major_and_minor,
)
from nanovllm.kernels.fp8_config import (
    MAX_FAST_COLUMNS,
    MAX_GEMM_TOKENS,
    MAX_GEMM_TOKENS_ALONE,
)
from nanovllm.kernels.fp8_dequantize import fp8_dequantize
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_gemv import THREAD_COLUMNS, fp8_gemv
from nanovllm.kernels.fp8_quantize import quantize_input
from nanovllm.kernels.fp8_scaled_gemm import fp8_scaled_gemm
from nanovllm.kernels.fp8_weight import FP8Input, FP8Weight, Rounding, dequantize_fp8
from nanovllm.kernels.hopper_config import MAX_HOPPER_TOKENS
from nanovllm.kernels.hopper_gemm import can_use_hopper_gemm, hopper_gemm
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import Epilogue, Norm, PartialSums, uses_gemv

TORCH_VERSION = major_and_minor(torch.__version__)
CUDA_VERSION = major_and_minor(torch.version.cuda or "0.0")
# Before, `torch._scaled_mm` has one scale for a tensor only.
HAS_SCALED_MM = TORCH_VERSION >= (2, 5)
# Scales of blocks, which cuBLAS has from CUDA 12.9 on.
HAS_BLOCK_SCALES = TORCH_VERSION >= (2, 9) and CUDA_VERSION >= (12, 9)


class FP8Kernel(Enum):
    """The ways to compute `x W^T`."""

    GEMV = auto()  # one token: reading the weight is all the time it takes
    GEMM = auto()  # few tokens: the weight gets x's dtype in registers
    SCALED = auto()  # many: x is rounded to FP8 too, and the tensor cores multiply in FP8
    DEQUANTIZE = auto()  # many, or no kernel: the weight gets x's dtype in memory


def choose_fp8_kernel(x: Tensor, weight: FP8Weight, quantizes_input: bool) -> FP8Kernel:
    """Choose the fastest kernel for x `[n, in]`. This is decided here and nowhere else.

    x: only its rows, dtype and device count.
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
    can_scale = quantizes_input and (has_row_scales(weight, x.dtype) or has_blocks(weight))
    if can_scale and len(x) > MAX_GEMM_TOKENS:
        return FP8Kernel.SCALED
    is_wide = len(x) > max_gemm_tokens(x, weight)
    return FP8Kernel.DEQUANTIZE if is_wide else FP8Kernel.GEMM


def max_gemm_tokens(x: Tensor, weight: FP8Weight) -> int:
    """Up to how many tokens the GEMM is faster than to dequantise; 0 if none reads this weight."""
    if uses_hopper_gemm(x, weight):
        return MAX_HOPPER_TOKENS
    if weight.has_whole_rows or weight.column_grain % 32 == 0:
        return MAX_GEMM_TOKENS_ALONE
    return 0


def has_row_scales(weight: FP8Weight, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` multiplies with the weight, the product in `dtype`: it writes
    bf16, and the sizes must be multiples of 16.
    """
    return (
        HAS_SCALED_MM
        and weight.has_whole_rows
        and weight.row_grain == 1
        and weight.out_size % 16 == 0
        and dtype == torch.bfloat16
    )


def has_block_scales(weight: FP8Weight, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` multiplies with the weight's blocks of 128 x 128: on Hopper, where
    cuBLAS does. It wants rows of scales of a multiple of 16 bytes.
    """
    return (
        HAS_BLOCK_SCALES
        and is_hopper()
        and weight.row_grain == weight.column_grain == 128
        and weight.in_size % 512 == 0
        and dtype == torch.bfloat16
    )


def has_blocks(weight: FP8Weight) -> bool:
    """Whether `fp8_scaled_gemm` multiplies with the weight: a block's columns are a tile's."""
    return weight.column_grain in (32, 64, 128)


def uses_cublas(x: FP8Input, weight: FP8Weight) -> bool:
    """Whether `torch._scaled_mm` multiplies in FP8, and not `fp8_scaled_gemm`.

    cuBLAS does not split the inner dimension, and starts late. It is faster where tiles of 128 x
    128 numbers are enough work for half of the multiprocessors.
    """
    if not (has_row_scales(weight, x.dtype) or has_block_scales(weight, x.dtype)):
        return False
    num_multiprocessors, _ = device_limits(x.values.device)
    tiles = -(-x.num_tokens // 128) * -(-weight.out_size // 128)
    return 2 * tiles > num_multiprocessors


def uses_hopper_gemm(x: Tensor, weight: FP8Weight) -> bool:
    """Whether the GEMM is `hopper_gemm`.

    For few tokens and many rows of blocks it is `fp8_gemm`: `hopper_gemm` multiplies each number
    of a block with the scale, and there that takes longer than to read the weight.
    """
    if not can_use_hopper_gemm(x):
        return False
    if not weight.has_whole_rows and weight.column_grain % 64 != 0:
        return False
    if weight.has_whole_rows or len(x) > MAX_GEMM_TOKENS:
        return True
    num_multiprocessors, _ = device_limits(x.device)
    return weight.out_size < 128 * num_multiprocessors


def can_read_experts(weight: FP8Weight) -> bool:
    """Whether the kernels of a mixture of experts multiply with the weight, x in 16 bits."""
    return has_e4m3() and (weight.has_whole_rows or has_blocks(weight))


def choose_rounding(weight: FP8Weight, x: Tensor, quantizes_input: bool) -> Rounding | None:
    """How x is rounded before it is multiplied, or None if it is not. See `choose_fp8_kernel`."""
    if choose_fp8_kernel(x, weight, quantizes_input) is FP8Kernel.SCALED:
        return rounding_for(weight, x)
    return None


def rounding_for(weight: FP8Weight, x: Tensor) -> Rounding:
    """How x is rounded to be multiplied in FP8: with a scale for each token, or for each token and
    block of columns. They are found anew in each step, also where a checkpoint has one for all.
    """
    num_rows = len(x)
    if has_block_scales(weight, x.dtype):
        num_rows = -(-num_rows // 4) * 4  # cuBLAS wants a multiple of four tokens
    return Rounding(weight.column_grain, num_rows)


def multiply_fp8(
    weight: FP8Weight,
    x: Tensor | FP8Input,
    bias: Tensor | None,
    epilogue: Epilogue,
    norm: Norm | None,
    quantizes_input: bool,
) -> Tensor | PartialSums:
    """Multiply x `[n, in]`; see `WeightFormat.matmul`, and `choose_fp8_kernel`."""
    if isinstance(x, FP8Input):
        return multiply_scaled(weight, x, bias, epilogue)
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
    assert norm is None, "only the GEMV normalises its input"
    # The activation on a CPU, where Triton's interpreter runs this, leaves a view.
    x = x.contiguous()
    if kernel is FP8Kernel.SCALED:
        rounded = quantize_input(x, rounding_for(weight, x))
        return multiply_scaled(weight, rounded, bias, epilogue)
    reader_sums = epilogue.reader_sums or epilogue.add_to is not None
    if uses_hopper_gemm(x, weight):
        sums = PartialSums(hopper_gemm(x, weight, bias, reader_sums, epilogue.activation))
    else:
        assert epilogue.activation is None, "only `hopper_gemm` applies it"
        sums = PartialSums(fp8_gemm(x, weight, bias, reader_sums))
    if epilogue.out is not None:
        return epilogue.out.copy_(sums.sum())
    return sums if reader_sums else sums.sum()


def multiply_scaled(
    weight: FP8Weight, x: FP8Input, bias: Tensor | None, epilogue: Epilogue
) -> Tensor | PartialSums:
    """Multiply in FP8 what is rounded as `rounding_for` says."""
    reader_sums = epilogue.reader_sums or epilogue.add_to is not None
    if not uses_cublas(x, weight):
        sums = PartialSums(fp8_scaled_gemm(x, weight, bias, reader_sums, epilogue.out))
        if epilogue.out is not None:
            return epilogue.out
        return sums if reader_sums else sums.sum()
    multiply = multiply_blocks if has_block_scales(weight, x.dtype) else multiply_rows
    product = multiply(weight, x, bias, epilogue.out)
    # Whoever adds computes the norm on the way, as of partial sums.
    return product if epilogue.add_to is None else PartialSums(product[None])


def multiply_rows(
    weight: FP8Weight, x: FP8Input, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """The product `[n, out]`, written to `out` if there is one, by cuBLAS."""
    return torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales.view(-1, 1),
        scale_b=weight.scales.view(1, -1),
        bias=bias,
        out_dtype=x.dtype,
        use_fast_accum=weight.in_size <= MAX_FAST_COLUMNS,
        out=out,
    )


def multiply_blocks(
    weight: FP8Weight, x: FP8Input, bias: Tensor | None, out: Tensor | None
) -> Tensor:
    """The same with blocks, by cuBLAS."""
    product = torch._scaled_mm(
        x.values,
        weight.values.t(),
        scale_a=x.scales.t(),
        scale_b=weight.scales.t(),
        bias=bias,
        out_dtype=x.dtype,
        out=out if len(x.values) == x.num_tokens else None,
    )
    if out is None or product is out:
        return product[: x.num_tokens]
    return out.copy_(product[: x.num_tokens])


def dequantize_on_gpu(weight: FP8Weight, dtype: torch.dtype) -> Tensor:
    """`dequantize_fp8`, by a kernel if the GPU has e4m3."""
    return fp8_dequantize(weight, dtype) if has_e4m3() else dequantize_fp8(weight, dtype)
