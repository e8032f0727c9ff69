"""`x W^T` of an INT4 or FP8 weight for tens to hundreds of tokens, on Hopper, as partial sums.

With so many tokens the tensor cores' time counts. So each number of the weight is converted to x's
dtype once for up to 256 tokens, and a consumer converts the next ones while the tensor cores
multiply those before. They read the weight from registers, and x from shared memory. For the parts
of a program see _gluon.py.
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels._gluon import (
    REGISTERS,
    TILE_ROWS,
    WARPS,
    GluonDescriptor,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from nanovllm.kernels._triton import device_limits, pdl_options, readable_rows, triton
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.hopper_config import HopperGemmConfig, hopper_gemm_config
from nanovllm.kernels.int4_layout import Int4Weight, positions_per_group

BLOCK = gl.constexpr(128)  # columns of the weight in a stage of the ring
HALF = gl.constexpr(64)  # columns that are multiplied at a time

# What makes `scale * (n - zero point)` of two numbers, which share a register, at a position: as in
# int4_gemm.py, and $3 is the scale, which every product with x then has.
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


@gluon.jit
def _find_tile(index, sizes):
    """The first token, the first row and the split of tile number `index`."""
    num_tokens, token_tiles, row_tiles, TOKENS, ROWS = sizes
    # The last tile is moved back until it ends with the last token: it overlaps the tile before it,
    # and both write the same numbers there.
    first_token = index % token_tiles * TOKENS
    first_token = gl.maximum(gl.minimum(first_token, num_tokens - TOKENS), 0)
    first_row = index // token_tiles % row_tiles * ROWS
    return first_token, first_row, index // (token_tiles * row_tiles)


@gluon.jit
def _produce(
    x_desc,
    weight_desc,
    rings,
    sizes,
    num_tiles,
    split_blocks,
    BLOCKS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Copy the tiles of x and of the weight, in the order in which they are multiplied."""
    x_ring, weight_ring, full, empty = rings
    STAGES: gl.constexpr = full.shape[0]
    # An INT4 weight has one tile for a block, an FP8 weight two, as x does.
    WEIGHT_TILES: gl.constexpr = weight_ring.shape[0] // STAGES
    WEIGHT_COLUMNS: gl.constexpr = weight_ring.shape[2]
    X_BYTES: gl.constexpr = x_ring.shape[1] * BLOCK * 2
    WEIGHT_BYTES: gl.constexpr = weight_ring.shape[1] * (128 if WEIGHT_TILES == 2 else 64)
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], gl.int32, is_pure=False, pack=1
        )
    count = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_token, first_row, split = _find_tile(index, sizes)
        end = gl.minimum((split + 1) * split_blocks, BLOCKS)
        for block in range(split * split_blocks, end):
            stage = count % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(arrived, X_BYTES + WEIGHT_BYTES)
            for i in gl.static_range(WEIGHT_TILES):
                place = [first_row, (block * WEIGHT_TILES + i) * WEIGHT_COLUMNS]
                tile = weight_ring.index(WEIGHT_TILES * stage + i)
                load_tile(weight_desc, place, arrived, tile)
            for i in gl.static_range(2):
                place = [first_token, block * BLOCK + i * HALF]
                load_tile(x_desc, place, arrived, x_ring.index(2 * stage + i))
            count += 1


@gluon.jit
def _read_int4_group(
    grains,
    row,
    column,
    like,
    GROUP_SIZE: gl.constexpr,
    GROUPS: gl.constexpr,
    OFFSET: gl.constexpr,
):
    """Of the group at a column: the scale of each row, and minus its zero point and the offset."""
    scales_ptr, zeros_ptr = grains
    place = row * GROUPS + gl.minimum(column // GROUP_SIZE, GROUPS - 1)
    scale = gl.load(scales_ptr + place).to(gl.float32).to(like.dtype)
    minus_zero = gl.full(scale.shape, -OFFSET - 8.0, like.dtype, scale.type.layout)
    if zeros_ptr is not None:
        minus_zero = (-OFFSET - gl.load(zeros_ptr + place).to(gl.float32)).to(like.dtype)
    return scale, minus_zero


@gluon.jit
def _read_scales(
    grains,
    row,
    block,
    like,
    HALF_INDEX: gl.constexpr,
    ROW_GRAIN: gl.constexpr,
    COLUMN_GRAIN: gl.constexpr,
    GRAINS: gl.constexpr,
    ASSEMBLY: gl.constexpr,
    OFFSET: gl.constexpr,
    POSITIONS: gl.constexpr,
):
    """Read what the conversion of half a block needs: of INT4 for both of its stripes."""
    scales_ptr, zeros_ptr = grains
    column = block * BLOCK + HALF_INDEX * HALF
    if ASSEMBLY is None:
        if GRAINS == 1:  # a scale of a whole row is multiplied into its finished sum
            return like, like
        else:
            place = row // ROW_GRAIN * GRAINS + gl.minimum(column // COLUMN_GRAIN, GRAINS - 1)
            return gl.load(scales_ptr + place), like
    else:
        left = _read_int4_group(grains, row, column, like, COLUMN_GRAIN, GRAINS, OFFSET)
        right = left
        if POSITIONS == 1:
            right = _read_int4_group(grains, row, column + 32, like, COLUMN_GRAIN, GRAINS, OFFSET)
        return left, right


@gluon.jit
def _take_out(numbers, group, POSITION: gl.constexpr, ASSEMBLY: gl.constexpr):
    """Return `scale * (n - zero point)` of the columns at a position of a block."""
    scale, minus_zero = group
    layout: gl.constexpr = numbers.type.layout
    zeros = gl.zeros(numbers.shape, scale.dtype, layout)
    scale, _ = gl.broadcast(scale[:, None], zeros)
    minus_zero, _ = gl.broadcast(minus_zero[:, None], zeros)
    return gl.inline_asm_elementwise(
        ASSEMBLY,
        "=r,r,r,r,r,r",
        [numbers, minus_zero, scale, 4 * POSITION],
        dtype=scale.dtype,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _convert(
    grains,
    rings,
    stage,
    scales,
    operand: gl.constexpr,
    CONSUMER: gl.constexpr,
    HALF_INDEX: gl.constexpr,
    ROW_GRAIN: gl.constexpr,
    COLUMN_GRAIN: gl.constexpr,
    GRAINS: gl.constexpr,
    ASSEMBLY: gl.constexpr,
    OFFSET: gl.constexpr,
    POSITIONS: gl.constexpr,
):
    """Return half a block of the consumer's rows in x's dtype, `[64, 64]`."""
    x_ring, weight_ring, full, empty = rings
    ROWS: gl.constexpr = weight_ring.shape[1] // 2
    if ASSEMBLY is None:
        tile = weight_ring.index(2 * stage + HALF_INDEX).slice(CONSUMER * ROWS, ROWS, 0)
        # By float32, since the GPU's instruction from FP8 gives fp16, and the one from that to
        # bf16 is eight times slower than these.
        weight = tile.load(operand).to(gl.float32)
        if GRAINS != 1:
            weight *= scales[0][:, None]
        return weight.to(x_ring.dtype)
    else:
        left_group, right_group = scales
        tile = weight_ring.index(stage).slice(CONSUMER * ROWS, ROWS, 0)
        numbers = tile.load(operand)
        left = _take_out(numbers, left_group, 2 * HALF_INDEX, ASSEMBLY)
        right = _take_out(numbers, right_group, 2 * HALF_INDEX + 1, ASSEMBLY)
        weight = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, HALF])
        return gl.convert_layout(weight, operand, assert_trivial=True)


@gluon.jit
def _consume(
    common,
    ROW_GRAIN: gl.constexpr,
    COLUMN_GRAIN: gl.constexpr,
    GRAINS: gl.constexpr,
    ASSEMBLY: gl.constexpr,
    OFFSET: gl.constexpr,
    POSITIONS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Compute the rows of one consumer in all tiles of the program."""
    grains, bias_ptr, out_ptr, rings, sizes, limits = common
    num_tiles, split_blocks, out_size, BLOCKS = limits
    scales_ptr, zeros_ptr = grains
    x_ring, weight_ring, full, empty = rings
    num_tokens = sizes[0]
    dtype: gl.constexpr = x_ring.dtype
    STAGES: gl.constexpr = full.shape[0]
    TOKENS: gl.constexpr = x_ring.shape[1]
    ROWS: gl.constexpr = weight_ring.shape[1] // 2
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, registers, 2)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    like = gl.zeros([1], dtype, gl.SliceLayout(1, operand))
    count = 0
    for index in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        first_token, first_row, split = _find_tile(index, sizes)
        first_row += CONSUMER * ROWS
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, operand))
        row = gl.minimum(row, out_size - 1)
        first_block = split * split_blocks
        last_block = gl.minimum(first_block + split_blocks, BLOCKS) - 1
        acc = gl.zeros([ROWS, TOKENS], gl.float32, registers)
        scales = _read_scales(
            grains,
            row,
            first_block,
            like,
            0,
            ROW_GRAIN,
            COLUMN_GRAIN,
            GRAINS,
            ASSEMBLY,
            OFFSET,
            POSITIONS,
        )
        stage = count % STAGES
        mbarrier.wait(full.index(stage), count // STAGES & 1)
        weight = _convert(
            grains,
            rings,
            stage,
            scales,
            operand,
            CONSUMER,
            0,
            ROW_GRAIN,
            COLUMN_GRAIN,
            GRAINS,
            ASSEMBLY,
            OFFSET,
            POSITIONS,
        )
        for block in range(first_block, last_block):
            stage = count % STAGES
            scales = _read_scales(
                grains,
                row,
                block,
                like,
                1,
                ROW_GRAIN,
                COLUMN_GRAIN,
                GRAINS,
                ASSEMBLY,
                OFFSET,
                POSITIONS,
            )
            next_scales = _read_scales(
                grains,
                row,
                block + 1,
                like,
                0,
                ROW_GRAIN,
                COLUMN_GRAIN,
                GRAINS,
                ASSEMBLY,
                OFFSET,
                POSITIONS,
            )
            x = x_ring.index(2 * stage).permute((1, 0))
            acc = warpgroup_mma(weight, x, acc, is_async=True)
            weight = _convert(
                grains,
                rings,
                stage,
                scales,
                operand,
                CONSUMER,
                1,
                ROW_GRAIN,
                COLUMN_GRAIN,
                GRAINS,
                ASSEMBLY,
                OFFSET,
                POSITIONS,
            )
            acc = warpgroup_mma_wait(0, deps=(acc,))
            x = x_ring.index(2 * stage + 1).permute((1, 0))
            acc = warpgroup_mma(weight, x, acc, is_async=True)
            count += 1
            next_stage = count % STAGES
            mbarrier.wait(full.index(next_stage), count // STAGES & 1)
            weight = _convert(
                grains,
                rings,
                next_stage,
                next_scales,
                operand,
                CONSUMER,
                0,
                ROW_GRAIN,
                COLUMN_GRAIN,
                GRAINS,
                ASSEMBLY,
                OFFSET,
                POSITIONS,
            )
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(stage), count=1)
        stage = count % STAGES
        scales = _read_scales(
            grains,
            row,
            last_block,
            like,
            1,
            ROW_GRAIN,
            COLUMN_GRAIN,
            GRAINS,
            ASSEMBLY,
            OFFSET,
            POSITIONS,
        )
        acc = warpgroup_mma(weight, x_ring.index(2 * stage).permute((1, 0)), acc, is_async=True)
        weight = _convert(
            grains,
            rings,
            stage,
            scales,
            operand,
            CONSUMER,
            1,
            ROW_GRAIN,
            COLUMN_GRAIN,
            GRAINS,
            ASSEMBLY,
            OFFSET,
            POSITIONS,
        )
        acc = warpgroup_mma_wait(0, deps=(acc,))
        x = x_ring.index(2 * stage + 1).permute((1, 0))
        acc = warpgroup_mma(weight, x, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)
        count += 1

        acc_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, registers))
        is_row = acc_row < out_size
        if ASSEMBLY is None and GRAINS == 1:
            scale = gl.load(scales_ptr + acc_row // ROW_GRAIN, mask=is_row, other=0.0)
            acc *= scale[:, None]
        if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
            if split == 0:  # the bias is added once
                bias = gl.load(bias_ptr + acc_row, mask=is_row, other=0.0)
                acc += bias.to(gl.float32)[:, None]
        out = gl.convert_layout(acc.to(dtype).permute((1, 0)), store_layout)
        token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, store_layout))
        out_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(0, store_layout))
        mask = (token < num_tokens)[:, None] & (out_row < out_size)[None, :]
        places = (split * num_tokens + token) * out_size
        gl.store(out_ptr + places[:, None] + out_row[None, :], out, mask=mask)


@gluon.jit(
    do_not_specialize=["num_tokens", "token_tiles", "row_tiles", "num_tiles", "split_blocks"]
)
def _hopper_gemm_kernel(
    x_desc,
    weight_desc,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    partial_sums_ptr,
    num_tokens,
    token_tiles,
    row_tiles,
    num_tiles,
    split_blocks,
    out_size,
    IN_SIZE: gl.constexpr,
    ROW_GRAIN: gl.constexpr,
    COLUMN_GRAIN: gl.constexpr,
    ASSEMBLY: gl.constexpr,
    OFFSET: gl.constexpr,
    POSITIONS: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program computes a tile of the result over a split of the inner dimension, then another one
    as many further on as there are programs, and so on.
    """
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1
        )
    BLOCKS: gl.constexpr = (IN_SIZE + BLOCK - 1) // BLOCK
    GRAINS: gl.constexpr = (IN_SIZE + COLUMN_GRAIN - 1) // COLUMN_GRAIN
    # All tiles of a stage are copied and read together: one pair of barriers serves them.
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    x_shape: gl.constexpr = [2 * STAGES] + x_desc.block_shape
    x_ring = gl.allocate_shared_memory(x_desc.dtype, x_shape, x_desc.layout)
    WEIGHT_TILES: gl.constexpr = 2 if ASSEMBLY is None else 1
    shape: gl.constexpr = [WEIGHT_TILES * STAGES] + weight_desc.block_shape
    weight_ring = gl.allocate_shared_memory(weight_desc.dtype, shape, weight_desc.layout)
    fence_async_shared()
    rings = (x_ring, weight_ring, full, empty)
    sizes = (num_tokens, token_tiles, row_tiles, x_ring.shape[1], weight_ring.shape[1])
    grains = (scales_ptr, zeros_ptr)
    limits = (num_tiles, split_blocks, out_size, BLOCKS)
    common = (grains, bias_ptr, partial_sums_ptr, rings, sizes, limits)
    gl.warp_specialize(
        [
            (_consume, (common, ROW_GRAIN, COLUMN_GRAIN, GRAINS, ASSEMBLY, OFFSET, POSITIONS, 0)),
            (_consume, (common, ROW_GRAIN, COLUMN_GRAIN, GRAINS, ASSEMBLY, OFFSET, POSITIONS, 1)),
            (_produce, (x_desc, weight_desc, rings, sizes, num_tiles, split_blocks, BLOCKS, PDL)),
        ],
        WARPS,
        REGISTERS,
    )


def hopper_gemm(
    x: Tensor,
    weight: Int4Weight | FP8Weight,
    bias: Tensor | None = None,
    reader_sums: bool = True,
    config: HopperGemmConfig | None = None,
) -> Tensor:
    """Return partial sums `[splits, n, out]` whose sum is `x W^T + bias`, rounded to x's dtype.

    The reference is `F.linear` with the weight of `dequantize_int4` or `dequantize_fp8`.

    x: `[n, in]`, bf16 or fp16, contiguous; in is a multiple of 16. bias: `[out]`, or None.
    weight: its scales are rounded to x's dtype if it is in INT4. In FP8 it has whole rows.
    reader_sums: whether there may be more than one.
    config: overrides `hopper_gemm_config`, for tests and tuning.
    """
    num_tokens, in_size = x.shape
    num_multiprocessors, _ = device_limits(x.device)
    out_size = weight.out_size
    is_bf16 = x.dtype == torch.bfloat16
    if isinstance(weight, Int4Weight):
        if weight.column_order is not None:
            x = x[:, weight.column_order]
        matrix = weight.packed
        positions = positions_per_group(weight.group_size, in_size)
        weight_format = (BFLOAT16, 128.0, positions) if is_bf16 else (FLOAT16, 1024.0, positions)
        grains: dict[str, Any] = {"ROW_GRAIN": 1, "COLUMN_GRAIN": weight.group_size}
        zero_points = weight.zero_points
        tile = [TILE_ROWS, 32]
    else:
        matrix = weight.values
        weight_format = (None, 0.0, 4)
        grains = {"ROW_GRAIN": weight.row_grain, "COLUMN_GRAIN": weight.column_grain}
        zero_points = None
        tile = [TILE_ROWS, 64]
    assert x.is_contiguous() and matrix.is_contiguous() and in_size % 16 == 0
    if config is None:
        config = hopper_gemm_config(num_tokens, out_size, in_size, num_multiprocessors, reader_sums)
    blocks = triton.cdiv(in_size, 128)
    split_blocks = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, split_blocks)
    partial_sums = torch.empty(splits, num_tokens, out_size, dtype=x.dtype, device=x.device)
    token_tiles = triton.cdiv(num_tokens, config.tokens)
    row_tiles = triton.cdiv(out_size, TILE_ROWS)
    num_tiles = token_tiles * row_tiles * splits
    _hopper_gemm_kernel[(min(num_tiles, num_multiprocessors),)](
        describe(x, readable_rows(x, config.tokens), [config.tokens, 64]),
        describe(matrix, out_size, tile),
        weight.scales,
        zero_points,
        bias,
        partial_sums,
        num_tokens,
        token_tiles,
        row_tiles,
        num_tiles,
        split_blocks,
        out_size,
        IN_SIZE=in_size,
        **grains,
        ASSEMBLY=weight_format[0],
        OFFSET=weight_format[1],
        POSITIONS=weight_format[2],
        STAGES=config.num_stages,
        num_warps=4,
        **pdl_options(),
    )
    return partial_sums


DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int16: gl.int16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def describe(matrix: Tensor, num_rows: int, tile: list[int]) -> Any:
    """Describe a contiguous matrix to TMA; num_rows: those that it may read."""
    layout = gl.NVMMASharedLayout.get_default_for(tile, DTYPES[matrix.dtype])
    columns = matrix.shape[1]
    return GluonDescriptor(matrix, [num_rows, columns], [columns, 1], tile, layout)
