"""The input of a linear layer, rounded to FP8 for a step of many tokens.

Each token has a scale of its own, or one for each group of its columns, so what one token is
multiplied with does not depend on the others of the step. The activation of an MLP and a norm that
comes with an addition round their result before they write it. The kernel here is for what was
written in 16 bits, the output of attention above all.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_weight import E4M3, FP8Input, Rounding


@triton.jit
def store_rounded(
    x,
    values_ptr,
    scales_ptr,
    num_rows,
    token,
    SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round a token's input x `[BLOCK]`, float32 and 0 from SIZE on, and store it: see `FP8Input`.

    The numbers are those of fp8_weight.py: 448 is FP8's largest, and 2^-100 the smallest scale.
    """
    COLUMNS: tl.constexpr = BLOCK if GROUP_SIZE == SIZE else GROUP_SIZE
    GROUPS: tl.constexpr = BLOCK // COLUMNS
    x = tl.reshape(x, [GROUPS, COLUMNS])
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 448.0 * 2.0**-100)
    scale = tl.div_rn(largest, 448.0)
    # What lies beyond the largest number by an error of rounding would be NaN in the interpreter.
    # What is NaN stays so: a clamp of the GPU may otherwise make a number of it.
    scaled = x * tl.div_rn(1.0, scale)[:, None]
    values = tl.clamp(scaled, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    group = tl.arange(0, GROUPS)
    column = group[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    values = values.to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + token * SIZE + column, values, mask=column < SIZE)
    tl.store(scales_ptr + group * num_rows + token, scale, mask=group * COLUMNS < SIZE)


# Triton would compile one variant for numbers of rows that 16 divides, and another for all others:
# at start-up the first, which has the largest steps, and then a prompt would wait for the second.
@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one token."""
    launch_next(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + token * SIZE + column, mask=column < SIZE, other=0.0).to(tl.float32)
    store_rounded(x, values_ptr, scales_ptr, num_rows, token, SIZE, GROUP_SIZE, BLOCK)


def quantize_input(x: Tensor, rounding: Rounding) -> FP8Input:
    """Round each group of a token to FP8, with the scale that its largest absolute value asks for.

    The reference is `quantize_input_torch`.

    x: `[n, in]`, contiguous.
    """
    num_tokens, in_size = x.shape
    assert x.is_contiguous()
    rounded = empty_input(num_tokens, in_size, x, rounding)
    block = next_power_of_2(in_size)
    _quantize_kernel[(num_tokens,)](
        x,
        rounded.values,
        rounded.scales,
        rounding.num_rows,
        SIZE=in_size,
        GROUP_SIZE=rounding.group_size,
        BLOCK=block,
        num_warps=min(8, max(1, block // 1024)),
        **pdl_options(),
    )
    return rounded


def empty_input(num_tokens: int, in_size: int, like: Tensor, rounding: Rounding) -> FP8Input:
    """An input for a kernel to fill; its dtype and device are those of `like`."""
    assert in_size % rounding.group_size == 0 and rounding.num_rows >= num_tokens
    shape = (in_size // rounding.group_size, rounding.num_rows)
    return FP8Input(
        values=torch.empty(rounding.num_rows, in_size, dtype=E4M3, device=like.device),
        scales=torch.empty(shape, dtype=torch.float32, device=like.device),
        num_tokens=num_tokens,
        dtype=like.dtype,
    )
