"""`x W^T` of an INT4 weight for the few tokens of a decode step, as partial sums (split-K).

As in `split_gemm`, the inner dimension is split until every multiprocessor has some of the work,
and the kernel that reads the product adds the partial sums. The weight stays in four bits until it
is in registers. There a block of 128 columns becomes four tiles of 32 columns, one after the other,
which the tensor cores multiply with the same columns of x: see int4_layout.py. Only
`n - zero point` is multiplied there, which 16 bits hold exactly; the scale, which is the same for
all columns of a group, is multiplied into the sum over the group, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    device_limits,
    launch_next,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.int4_config import Int4GemmConfig, int4_gemm_config
from nanovllm.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, positions_per_group

# What makes `n - zero point` of two numbers, which share a register, at a position: $3 is how many
# bits it is above the lowest. In the lowest bits of a float so large that these count ones, n adds
# n to it; the addition takes that away again. (Written as a multiplication by 1 and an addition,
# since GPUs before Hopper have no addition of two bfloat16.) 0xEA is `(a & b) | c`.
ASSEMBLY = """{
    .reg .b32 bits, one;
    shr.b32 bits, $1, $3;
    lop3.b32 bits, bits, 0x000F000F, OFFSET, 0xEA;
    mov.b32 one, ONE;
    fma.rn.DTYPE $0, bits, one, $2;
}"""


@dataclass(frozen=True, slots=True)
class Dequantization:
    """How `n - zero point` becomes a number of x's dtype."""

    offset: float  # what is added to n on the way
    assembly: str | None  # that takes n out; None: plain Triton does


PLAIN = Dequantization(0.0, None)
BFLOAT16 = Dequantization(
    offset=128.0,
    assembly=ASSEMBLY.replace("OFFSET", "0x43004300")
    .replace("ONE", "0x3F803F80")
    .replace("DTYPE", "bf16x2"),
)
FLOAT16 = Dequantization(
    offset=1024.0,
    assembly=ASSEMBLY.replace("OFFSET", "0x64006400")
    .replace("ONE", "0x3C003C00")
    .replace("DTYPE", "f16x2"),
)


def dequantization(x: Tensor) -> Dequantization:
    """Choose how numbers of x's dtype are made."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return BFLOAT16
    if x.is_cuda and x.dtype == torch.float16:
        return FLOAT16
    return PLAIN


@triton.jit
def take_out(numbers, minus_zero, POSITION: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return `n - zero point` of the columns at a position, in the dtype of `minus_zero`.

    minus_zero: minus the zero point and the offset, as large as `numbers`.
    """
    if ASSEMBLY is None:
        return ((numbers >> 4 * POSITION) & 15).to(minus_zero.dtype) + minus_zero
    else:
        return tl.inline_asm_elementwise(
            ASSEMBLY,
            "=r,r,r,r,r",
            [numbers, minus_zero, 4 * POSITION],
            dtype=minus_zero.dtype,
            is_pure=True,
            pack=2,
        )


@triton.jit(do_not_specialize=["num_tokens", "split_blocks"])
def _int4_gemm_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    partial_sums_ptr,
    num_tokens,
    out_size,
    split_blocks,
    IN_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    POSITIONS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes ROWS outputs of TOKENS tokens over one split of the inner dimension."""
    launch_next(PDL)
    BLOCKS: tl.constexpr = (IN_SIZE + 127) // 128
    GROUPS: tl.constexpr = (IN_SIZE + GROUP_SIZE - 1) // GROUP_SIZE
    dtype = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    stripe = tl.arange(0, 32)[None, :]
    # Rows that do not exist are read as the last one, and tokens as others, since a mask for each
    # load takes as many instructions as the arithmetic does. If they were all read as the last
    # token, all programs would wait for the one part of the L2 cache that has it.
    read_row = tl.minimum(row, out_size - 1).to(tl.int64)
    read_token = (token % num_tokens).to(tl.int64)
    number_ptrs = packed_ptr + read_row[:, None] * (BLOCKS * 32) + stripe
    x_ptrs = x_ptr + read_token[:, None] * IN_SIZE + stripe
    first_block = split * split_blocks
    wait_for_previous(PDL)
    acc = tl.zeros([ROWS, TOKENS], tl.float32)
    minus_zero = tl.full([ROWS, 32], -OFFSET - SYMMETRIC_ZERO, dtype)
    for block in range(first_block, tl.minimum(first_block + split_blocks, BLOCKS)):
        numbers = tl.load(number_ptrs + block * 32)
        for position in tl.static_range(4):
            column = block * 128 + position * 32
            if position % POSITIONS == 0:
                parameter = read_row * GROUPS + tl.minimum(column // GROUP_SIZE, GROUPS - 1)
                scale = tl.load(scales_ptr + parameter).to(tl.float32)
                if zeros_ptr is not None:
                    zero = tl.load(zeros_ptr + parameter).to(tl.float32)
                    minus_zero = tl.broadcast_to((-OFFSET - zero).to(dtype)[:, None], (ROWS, 32))
                group_sum = tl.zeros([ROWS, TOKENS], tl.float32)
            if IN_SIZE % 128 == 0:
                x = tl.load(x_ptrs + column)
            else:
                x = tl.load(x_ptrs + column, mask=column + stripe < IN_SIZE, other=0.0)
            weight = take_out(numbers, minus_zero, position, ASSEMBLY)
            group_sum = tl.dot(weight, tl.trans(x), group_sum, input_precision="ieee")
            if (position + 1) % POSITIONS == 0:
                acc += group_sum * scale[:, None]
    out = tl.trans(acc)
    token = token[:, None]
    row = row[None, :]
    if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if split == 0:  # the bias is added once
            out += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    tl.store(
        partial_sums_ptr + (split * num_tokens + token) * out_size + row,
        out.to(dtype),
        mask=(token < num_tokens) & (row < out_size),
    )


def int4_gemm(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    reader_sums: bool = True,
    config: Int4GemmConfig | None = None,
) -> Tensor:
    """Return partial sums `[splits, n, out]` whose sum is `x W^T + bias`, rounded to x's dtype.

    The reference is `F.linear` with the weight of `dequantize_int4`.

    x: `[n, in]`, contiguous. bias: `[out]`, or None.
    reader_sums: whether there may be more than one.
    config: overrides `int4_gemm_config`, for tests and tuning.
    """
    num_tokens = len(x)
    assert x.is_contiguous() and weight.packed.is_contiguous()
    if weight.column_order is not None:
        x = x[:, weight.column_order]
    if config is None:
        num_multiprocessors, _ = device_limits(x.device)
        sizes = (num_tokens, weight.out_size, weight.in_size)
        config = int4_gemm_config(*sizes, num_multiprocessors, reader_sums)
    blocks = triton.cdiv(weight.in_size, 128)
    split_blocks = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, split_blocks)
    partial_sums = torch.empty(splits, num_tokens, weight.out_size, dtype=x.dtype, device=x.device)
    grid = (
        triton.cdiv(weight.out_size, config.rows),
        splits,
        triton.cdiv(num_tokens, config.tokens),
    )
    how = dequantization(x)
    _int4_gemm_kernel[grid](
        x,
        weight.packed,
        weight.scales,
        weight.zero_points,
        bias,
        partial_sums,
        num_tokens,
        weight.out_size,
        split_blocks,
        IN_SIZE=weight.in_size,
        GROUP_SIZE=weight.group_size,
        POSITIONS=positions_per_group(weight.group_size, weight.in_size),
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        TOKENS=config.tokens,
        ROWS=config.rows,
        OFFSET=how.offset,
        ASSEMBLY=how.assembly,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(),
    )
    return partial_sums
