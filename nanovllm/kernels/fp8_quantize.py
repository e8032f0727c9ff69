"""The input of a linear layer, rounded to FP8 for a step of many tokens.

Each token has a scale of its own, or one for each group of its columns, so what one token is
multiplied with does not depend on the others of the step.
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
from nanovllm.kernels.fp8_weight import E4M3, LARGEST, SMALLEST_SCALE, FP8Input


@triton.jit
def _quantize_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    IN_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_SCALE: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes one token, in a tile `[GROUPS, COLUMNS]`, both powers of two."""
    launch_next(PDL)
    NUM_GROUPS: tl.constexpr = IN_SIZE // GROUP_SIZE
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    column = tl.arange(0, COLUMNS)[None, :]
    is_group = group < NUM_GROUPS
    mask = is_group[:, None] & (column < GROUP_SIZE)
    offsets = token * IN_SIZE + group[:, None] * GROUP_SIZE + column
    wait_for_previous(PDL)
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), SMALLEST_SCALE * LARGEST)
    scale = tl.div_rn(largest, LARGEST)
    # What lies beyond the largest number by an error of rounding would be NaN in the interpreter.
    # What is NaN stays so: a clamp of the GPU may otherwise make a number of it.
    scaled = x * tl.div_rn(1.0, scale)[:, None]
    values = tl.clamp(scaled, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(values_ptr + offsets, values.to(values_ptr.dtype.element_ty), mask=mask)
    tl.store(scales_ptr + group * num_rows + token, scale, mask=is_group)


def quantize_input(x: Tensor, group_size: int, num_rows: int | None = None) -> FP8Input:
    """Round each group of a token to FP8, with the scale that its largest absolute value asks for.

    The reference is `quantize_input_torch`.

    x: `[n, in]`, contiguous. group_size: divides in; in itself is one scale a token.
    num_rows: at least n, for a kernel that wants more; what is in rows from n on is not defined.
    """
    num_tokens, in_size = x.shape
    assert x.is_contiguous() and in_size % group_size == 0
    num_groups = in_size // group_size
    num_rows = num_rows or num_tokens
    values = torch.empty(num_rows, in_size, dtype=E4M3, device=x.device)
    scales = torch.empty(num_groups, num_rows, dtype=torch.float32, device=x.device)
    groups = next_power_of_2(num_groups)
    columns = next_power_of_2(group_size)
    _quantize_kernel[(num_tokens,)](
        x,
        values,
        scales,
        num_rows,
        IN_SIZE=in_size,
        GROUP_SIZE=group_size,
        LARGEST=LARGEST,
        SMALLEST_SCALE=SMALLEST_SCALE,
        GROUPS=groups,
        COLUMNS=columns,
        num_warps=min(8, max(1, groups * columns // 1024)),
        **pdl_options(),
    )
    return FP8Input(values, scales)
