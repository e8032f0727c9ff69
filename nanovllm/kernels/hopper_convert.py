"""How `hopper_gemm` makes numbers of x's dtype of an INT4 or FP8 weight, in registers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nanovllm.kernels import hopper_config
from nanovllm.kernels._gluon import CONSUMER_ROWS, gl, gluon
from nanovllm.kernels._triton import triton
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.int4_layout import Int4Weight, positions_per_group

ROWS = gl.constexpr(CONSUMER_ROWS)  # of the weight, which a consumer has of a tile
BLOCK = gl.constexpr(hopper_config.BLOCK)  # columns of a stage of the rings
HALF = gl.constexpr(hopper_config.BLOCK // 2)  # columns that are multiplied at a time

# What makes `scale * (n - zero point)` of two numbers, which share a register, at a position. It is
# that of int4_gemm.py, and then multiplies with the scale, $3, in x's dtype.
ASSEMBLY = """{
    .reg .b32 bits, one;
    shr.b32 bits, $1, $4;
    lop3.b32 bits, bits, 0x000F000F, OFFSET, 0xEA;
    mov.b32 one, ONE;
    fma.rn.DTYPE bits, bits, one, $2;
    mul.rn.DTYPE $0, bits, $3;
}"""
BFLOAT16 = (
    ASSEMBLY.replace("OFFSET", "0x43004300").replace("ONE", "0x3F803F80").replace("DTYPE", "bf16x2")
)
FLOAT16 = (
    ASSEMBLY.replace("OFFSET", "0x64006400").replace("ONE", "0x3C003C00").replace("DTYPE", "f16x2")
)


class Rings(NamedTuple):
    """A program's tiles in shared memory. A stage is a block of 128 columns; see _gluon.py."""

    x: Any  # two tiles a stage: [2 * stages, tokens, 64] in 16 bits
    # One tile a stage of INT4, [stages, rows, 32] int16, or two of FP8, [2 * stages, rows, 64].
    weight: Any
    full: Any  # [stages, 1]: barriers that complete when both have arrived
    empty: Any  # [stages, 1]: and when both consumers have read them


@dataclass(frozen=True)
class Conversion:
    """How a weight becomes numbers of x's dtype: known when the kernel is compiled."""

    row_grain: int  # rows that share a scale
    column_grain: int  # columns that share a scale, or a scale and a zero point
    grains: int  # of a row
    # Of INT4 only:
    assembly: str | None = None  # that takes numbers out
    offset: float = 0.0  # what that adds to them on the way
    positions: int = 4  # of a block that are surely of one group


def conversion_of(weight: Int4Weight | FP8Weight, dtype: torch.dtype) -> Conversion:
    """The conversion of a weight to a 16-bit dtype."""
    if isinstance(weight, FP8Weight):
        grains = weight.in_size // weight.column_grain
        return Conversion(weight.row_grain, weight.column_grain, grains)
    is_bf16 = dtype == torch.bfloat16
    return Conversion(
        row_grain=1,
        column_grain=weight.group_size,
        grains=triton.cdiv(weight.in_size, weight.group_size),
        assembly=BFLOAT16 if is_bf16 else FLOAT16,
        offset=128.0 if is_bf16 else 1024.0,
        positions=positions_per_group(weight.group_size, weight.in_size),
    )


@gluon.jit
def _read_group(grains, row, column, like, HOW: gl.constexpr):
    """Of the INT4 group at a column: each row's scale, and minus its zero point and the offset."""
    scales_ptr, zeros_ptr = grains
    place = row * HOW.grains + gl.minimum(column // HOW.column_grain, HOW.grains - 1)
    scale = gl.load(scales_ptr + place).to(gl.float32).to(like.dtype)
    minus_zero = gl.full(scale.shape, -HOW.offset - 8.0, like.dtype, scale.type.layout)
    if zeros_ptr is not None:
        zero = gl.load(zeros_ptr + place).to(gl.float32)
        minus_zero = (-HOW.offset - zero).to(like.dtype)
    return scale, minus_zero


@gluon.jit
def read_scales(grains, row, block, like, SIDE: gl.constexpr, HOW: gl.constexpr):
    """Read what the conversion of half a block needs: of INT4 for each of its two positions.

    row: of the weight, for each row of the consumer. SIDE: 0 for the left half, 1 for the right.
    like: any tensor of x's dtype. Its dtype is that of INT4 scales, and it stands for scales that
        the conversion does not need.
    """
    column = block * BLOCK + SIDE * HALF
    if HOW.assembly is not None:
        left = _read_group(grains, row, column, like, HOW)
        right = left
        if HOW.positions == 1:
            right = _read_group(grains, row, column + HALF // 2, like, HOW)
        return left, right
    elif HOW.grains == 1:  # the scale of a whole row is multiplied into its finished sum
        return like, like
    else:
        scales_ptr, zeros_ptr = grains
        place = row // HOW.row_grain * HOW.grains
        place += gl.minimum(column // HOW.column_grain, HOW.grains - 1)
        return gl.load(scales_ptr + place), like


@gluon.jit
def _take_out(numbers, group, POSITION: gl.constexpr, HOW: gl.constexpr):
    """Return `scale * (n - zero point)` of the columns at a position of a block."""
    scale, minus_zero = group
    layout: gl.constexpr = numbers.type.layout
    zeros = gl.zeros(numbers.shape, scale.dtype, layout)
    scale, _ = gl.broadcast(scale[:, None], zeros)
    minus_zero, _ = gl.broadcast(minus_zero[:, None], zeros)
    return gl.inline_asm_elementwise(
        HOW.assembly,
        "=r,r,r,r,r,r",
        [numbers, minus_zero, scale, 4 * POSITION],
        dtype=scale.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def convert(
    rings,
    stage,
    scales,
    operand: gl.constexpr,
    OWN_ROWS: gl.constexpr,
    SIDE: gl.constexpr,
    HOW: gl.constexpr,
):
    """Return half a block of the consumer's rows in x's dtype, as the tensor cores read it.

    scales: of `read_scales`. operand: the layout in which the tensor cores read registers.
    """
    if HOW.assembly is None:
        tile = rings.weight.index(2 * stage + SIDE).slice(OWN_ROWS * ROWS, ROWS, 0)
        # By float32, since the GPU's instruction from FP8 gives fp16, and the one from that to
        # bf16 is eight times slower than these.
        weight = tile.load(operand).to(gl.float32)
        if HOW.grains != 1:
            weight *= scales[0][:, None]
        return weight.to(rings.x.dtype)
    else:
        numbers = rings.weight.index(stage).slice(OWN_ROWS * ROWS, ROWS, 0).load(operand)
        left = _take_out(numbers, scales[0], 2 * SIDE, HOW)
        right = _take_out(numbers, scales[1], 2 * SIDE + 1, HOW)
        # Side by side, which moves nothing: each thread has the same columns of both.
        weight = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, HALF])
        return gl.convert_layout(weight, operand, assert_trivial=True)
