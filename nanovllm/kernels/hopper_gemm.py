"""`x W^T` of an INT4 or FP8 weight for 2 to some 2,000 tokens, on Hopper, as partial sums.

From tens of tokens on the tensor cores' time counts. So each number of the weight is converted to
x's dtype once for up to 256 tokens, and a consumer converts the next ones while the tensor cores
multiply those before. They read the weight from registers, and x from shared memory. For the parts
of a program see _gluon.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels._gluon import (
    GluonDescriptor,
    can_run_gluon,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    make_barriers,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from nanovllm.kernels._triton import device_limits, pdl_options, readable_rows, triton
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.gate_mul import gated
from nanovllm.kernels.hopper_config import HopperGemmConfig, hopper_gemm_config
from nanovllm.kernels.hopper_convert import BLOCK, HALF, Rings, conversion_of, convert, read_scales
from nanovllm.kernels.int4_layout import Int4Weight


class Work(NamedTuple):
    """What all programs together compute: it is known to every part of each program."""

    num_tokens: Any  # of x
    token_tiles: Any  # tiles of tokens; neighbouring programs have the same rows of the weight
    row_tiles: Any  # tiles of rows of the weight
    num_tiles: Any  # of both, in all splits of the inner dimension
    split_blocks: Any  # blocks of 128 columns in a split; the last one may have fewer
    num_blocks: Any  # in all splits
    out_size: Any  # rows of the weight


class Exchange(NamedTuple):
    """What the consumers tell each other."""

    sums: Any
    given: Any
    taken: Any


class Place(NamedTuple):
    """Where a tile begins."""

    token: Any
    row: Any
    split: Any


@gluon.jit
def _find_tile(index, work, TOKENS: gl.constexpr, ROWS: gl.constexpr):
    """The `Place` of tile number `index`."""
    # The last tile is moved back until it ends with the last token: it overlaps the tile before it,
    # and both write the same numbers there.
    first_token = index % work.token_tiles * TOKENS
    first_token = gl.maximum(gl.minimum(first_token, work.num_tokens - TOKENS), 0)
    first_row = index // work.token_tiles % work.row_tiles * ROWS
    return Place(first_token, first_row, index // (work.token_tiles * work.row_tiles))


@gluon.jit
def _load_weight(weight_desc, rings, row, block, stage):
    """Start to copy a block of the weight. The stage becomes full when x has arrived, too."""
    # Of the 128 columns of a stage, x and an FP8 weight have two tiles, and an INT4 weight one.
    TILES: gl.constexpr = rings.weight.shape[0] // rings.full.shape[0]
    ROWS: gl.constexpr = rings.weight.shape[1]
    COLUMNS: gl.constexpr = rings.weight.shape[2]
    X_BYTES: gl.constexpr = rings.x.shape[1] * BLOCK * 2
    # A row of an INT4 tile is 32 numbers of two bytes, one of the two FP8 tiles 64 of one byte.
    WEIGHT_BYTES: gl.constexpr = ROWS * COLUMNS * 2
    arrived = rings.full.index(stage)
    mbarrier.expect(arrived, X_BYTES + WEIGHT_BYTES)
    for i in gl.static_range(TILES):
        column = (block * TILES + i) * COLUMNS
        tile = rings.weight.index(TILES * stage + i)
        if len(weight_desc.block_shape) == 4:
            place = [row // 16, 0, 0, column]
            load_tile(weight_desc, place, arrived, tile.reshape(weight_desc.block_shape))
        else:
            load_tile(weight_desc, [row, column], arrived, tile)


@gluon.jit
def _produce(x_desc, weight_desc, rings, work, EARLY: gl.constexpr, PDL: gl.constexpr):
    """Copy the tiles of x and of the weight, in the order in which they are multiplied."""
    STAGES: gl.constexpr = rings.full.shape[0]
    TOKENS: gl.constexpr = rings.x.shape[1]
    ROWS: gl.constexpr = rings.weight.shape[1]
    num_early = 0
    if EARLY:
        # No kernel writes the weight, so the ring is filled with it while the last one still runs.
        first = _find_tile(gl.program_id(0), work, TOKENS, ROWS)
        first_block = first.split * work.split_blocks
        num_early = gl.minimum(gl.minimum(work.split_blocks, work.num_blocks - first_block), STAGES)
        for stage in range(num_early):
            _load_weight(weight_desc, rings, first.row, first_block + stage, stage)
    if PDL:  # `wait_for_previous` in Gluon; the consumers wait for what is copied from here on
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], gl.int32, is_pure=False, pack=1
        )
    count = 0
    for index in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        first = _find_tile(index, work, TOKENS, ROWS)
        end = gl.minimum((first.split + 1) * work.split_blocks, work.num_blocks)
        for block in range(first.split * work.split_blocks, end):
            stage = count % STAGES
            if count >= num_early:
                mbarrier.wait(rings.empty.index(stage), (count // STAGES & 1) ^ 1)
                _load_weight(weight_desc, rings, first.row, block, stage)
            arrived = rings.full.index(stage)
            for i in gl.static_range(2):
                place = [first.token, block * BLOCK + i * HALF]
                load_tile(x_desc, place, arrived, rings.x.index(2 * stage + i))
            count += 1


@gluon.jit
def _start_product(weight, rings, stage, acc, SIDE: gl.constexpr):
    """Start `acc += weight x^T` with half a block of x."""
    x = rings.x.index(2 * stage + SIDE).permute((1, 0))
    return warpgroup_mma(weight, x, acc, is_async=True)


@gluon.jit
def _consume(
    common,
    HOW: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CONSUMERS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Compute the rows of one consumer in all tiles of the program."""
    grains, bias_ptr, partial_sums_ptr, rings, exchange, work = common
    STAGES: gl.constexpr = rings.full.shape[0]
    TOKENS: gl.constexpr = rings.x.shape[1]
    TILE: gl.constexpr = rings.weight.shape[1]
    ROWS: gl.constexpr = 64  # of a consumer
    ROW_GROUPS: gl.constexpr = TILE // ROWS
    OWN_ROWS: gl.constexpr = CONSUMER % ROW_GROUPS
    # If there are two consumers for the same rows, each takes every other block.
    STEP: gl.constexpr = CONSUMERS // ROW_GROUPS
    OWN: gl.constexpr = CONSUMER // ROW_GROUPS
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, registers, 2)
    like = gl.zeros([1], rings.x.dtype, gl.SliceLayout(1, operand))
    count = 0
    tile_count = 0
    for index in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        first = _find_tile(index, work, TOKENS, TILE)
        split = first.split
        first_row = first.row + OWN_ROWS * ROWS
        row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, operand))
        if ACTIVATION is not None:
            row = _gated_row(row, work)
        row = gl.minimum(row, work.out_size - 1)
        first_block = split * work.split_blocks
        end = gl.minimum(first_block + work.split_blocks, work.num_blocks)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, registers)
        scales = read_scales(grains, row, first_block + OWN, like, 0, HOW)
        next_scales = read_scales(grains, row, first_block + OWN + STEP, like, 0, HOW)
        num_blocks = end - first_block
        stage = (count + OWN) % STAGES
        if OWN < num_blocks:
            mbarrier.wait(rings.full.index(stage), (count + OWN) // STAGES & 1)
        weight = convert(rings, stage, scales, operand, OWN_ROWS, 0, HOW)
        # The tensor cores multiply half a block while the next half is read and converted. It would
        # be faster still to start the next product before the last one has ended, but then the
        # assembler, ptxas, lets all of them run one by one.
        for i in range(OWN, num_blocks, STEP):
            block = first_block + i
            # They come from the L2 cache, which takes longer than a block.
            later_scales = read_scales(grains, row, block + 2 * STEP, like, 0, HOW)
            if not HOW.is_uniform:
                scales = read_scales(grains, row, block, like, 1, HOW)
            acc = _start_product(weight, rings, stage, acc, 0)
            weight = convert(rings, stage, scales, operand, OWN_ROWS, 1, HOW)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            acc = _start_product(weight, rings, stage, acc, 1)
            following = count + i + STEP
            next_stage = following % STAGES
            if i + STEP < num_blocks:
                mbarrier.wait(rings.full.index(next_stage), following // STAGES & 1)
            # Behind the last block this converts whatever is there, and nobody uses it.
            weight = convert(rings, next_stage, next_scales, operand, OWN_ROWS, 0, HOW)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(rings.empty.index(stage), count=1)
            stage = next_stage
            scales = next_scales
            next_scales = later_scales
        count += num_blocks

        if STEP == 2:
            phase = tile_count & 1
            tile_count += 1
            given = exchange.given.index(OWN_ROWS)
            taken = exchange.taken.index(OWN_ROWS)
            if OWN == 1:
                mbarrier.wait(taken, phase ^ 1)
                exchange.sums.index(OWN_ROWS).store(acc)
                mbarrier.arrive(given, count=1)
            else:
                mbarrier.wait(given, phase)
                acc += exchange.sums.index(OWN_ROWS).load(registers)
                mbarrier.arrive(taken, count=1)
        if OWN == 0:
            _store(
                acc,
                grains,
                bias_ptr,
                partial_sums_ptr,
                first_row,
                first.token,
                split,
                work,
                HOW,
                ACTIVATION,
            )


@gluon.jit
def _gated_row(row, work):
    """The row of the weight in place of a row of a tile: eight of the gate, eight of up."""
    return row // 16 * 8 + row % 8 + row // 8 % 2 * (work.out_size // 2)


@gluon.jit
def _store(
    acc,
    grains,
    bias_ptr,
    partial_sums_ptr,
    first_row,
    first_token,
    split,
    work,
    HOW: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """Write the sums of a consumer."""
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    registers: gl.constexpr = acc.type.layout
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    sum_row = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, registers))
    if ACTIVATION is not None:
        sum_row = _gated_row(sum_row, work)
    is_row = sum_row < work.out_size
    if HOW.assembly is None and HOW.grains == 1:
        scale = gl.load(grains[0] + sum_row // HOW.row_grain, mask=is_row, other=0.0)
        acc *= scale[:, None]
    if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if split == 0:  # the bias is added once
            bias = gl.load(bias_ptr + sum_row, mask=is_row, other=0.0)
            acc += bias.to(gl.float32)[:, None]
    out_size = work.out_size
    if ACTIVATION is not None:
        pairs = acc.reshape([ROWS // 16, 2, 8, TOKENS]).permute((0, 2, 3, 1))
        gate, up = gl.split(pairs)
        acc = gated(gate, up, ACTIVATION).reshape([ROWS // 2, TOKENS])
        out_size = out_size // 2
        first_row = first_row // 2
    # A thread is to store neighbouring rows, that is, outputs of one token.
    out = acc.to(partial_sums_ptr.dtype.element_ty).permute((1, 0))
    out = gl.convert_layout(out, store_layout)
    token = first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, store_layout))
    out_row = first_row + gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, store_layout))
    mask = (token < work.num_tokens)[:, None] & (out_row < out_size)[None, :]
    places = (split * work.num_tokens + token) * out_size
    gl.store(partial_sums_ptr + places[:, None] + out_row[None, :], out, mask=mask)


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
    HOW: gl.constexpr,
    ACTIVATION: gl.constexpr,
    STAGES: gl.constexpr,
    ROWS: gl.constexpr,
    EARLY: gl.constexpr,
    REGISTERS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    PDL: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program computes a tile of the result over a split of the inner dimension, then another one
    as many further on as there are programs, and so on.
    """
    if PDL:  # `launch_next` in Gluon
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; // $0", "=r", [], gl.int32, is_pure=False, pack=1
        )
    # The tiles of a stage are copied and read together: one pair of barriers serves them all.
    full, empty = make_barriers(STAGES, ROWS // 64)
    x_shape: gl.constexpr = [2 * STAGES] + x_desc.block_shape
    x_ring = gl.allocate_shared_memory(x_desc.dtype, x_shape, x_desc.layout)
    WEIGHT_TILES: gl.constexpr = 2 if HOW.assembly is None else 1
    COLUMNS: gl.constexpr = weight_desc.block_shape[-1]
    shape: gl.constexpr = [WEIGHT_TILES * STAGES, ROWS, COLUMNS]
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(
        [ROWS, COLUMNS], weight_desc.dtype
    )
    weight_ring = gl.allocate_shared_memory(weight_desc.dtype, shape, tile_layout)
    sums = None
    given = None
    taken = None
    if ROWS // 64 != CONSUMERS:
        GROUPS: gl.constexpr = ROWS // 64
        sums_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        sums_shape: gl.constexpr = [GROUPS, 64, x_desc.block_shape[0]]
        sums = gl.allocate_shared_memory(gl.float32, sums_shape, sums_layout)
        given = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        taken = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(GROUPS):
            mbarrier.init(given.index(i), count=1)
            mbarrier.init(taken.index(i), count=1)
    exchange = Exchange(sums, given, taken)
    fence_async_shared()
    rings = Rings(x_ring, weight_ring, full, empty)
    grains = (scales_ptr, zeros_ptr)
    work = Work(
        num_tokens,
        token_tiles,
        row_tiles,
        num_tiles,
        split_blocks,
        gl.cdiv(IN_SIZE, BLOCK),
        out_size,
    )
    common = (grains, bias_ptr, partial_sums_ptr, rings, exchange, work)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (common, HOW, ACTIVATION, 2, 0)),
                (_consume, (common, HOW, ACTIVATION, 2, 1)),
                (_produce, (x_desc, weight_desc, rings, work, EARLY, PDL)),
            ],
            [4, 1],
            REGISTERS,
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (common, HOW, ACTIVATION, 4, 0)),
                (_consume, (common, HOW, ACTIVATION, 4, 1)),
                (_consume, (common, HOW, ACTIVATION, 4, 2)),
                (_consume, (common, HOW, ACTIVATION, 4, 3)),
                (_produce, (x_desc, weight_desc, rings, work, EARLY, PDL)),
            ],
            [4, 4, 4, 1],
            REGISTERS,
        )


def hopper_gemm(
    x: Tensor,
    weight: Int4Weight | FP8Weight,
    bias: Tensor | None = None,
    reader_sums: bool = True,
    activation: str | None = None,
    config: HopperGemmConfig | None = None,
) -> Tensor:
    """Return partial sums `[splits, n, out]` whose sum is `x W^T + bias`, rounded to x's dtype.

    The reference is `F.linear` with the weight of `dequantize_int4` or `dequantize_fp8`. As those
    of that weight, the products with a scale are rounded to x's dtype; so are INT4's scales.

    x: `[n, in]`, bf16 or fp16, contiguous; in is a multiple of 16. bias: `[out]`, or None.
    weight: in FP8, its column grain is a multiple of 64, or a whole row.
    reader_sums: whether there may be more than one.
    config: overrides `hopper_gemm_config`, for tests and tuning.
    """
    num_tokens, in_size = x.shape
    out_size = weight.out_size
    zero_points = None
    if isinstance(weight, FP8Weight):
        matrix = weight.values
        weight_tile = 64  # half a block
    else:
        matrix = weight.packed
        weight_tile = 32  # a whole block: four columns a number of 16 bits
        zero_points = weight.zero_points
        if weight.column_order is not None:
            x = x[:, weight.column_order]
    assert x.is_contiguous() and matrix.is_contiguous() and in_size % 16 == 0
    num_multiprocessors, shared_memory = device_limits(x.device)
    if config is None:
        config = hopper_gemm_config(
            num_tokens,
            out_size,
            in_size,
            weight_bits=8 if isinstance(weight, FP8Weight) else 4,
            num_multiprocessors=num_multiprocessors,
            shared_memory=shared_memory,
            reader_sums=reader_sums,
        )
    blocks = triton.cdiv(in_size, BLOCK.value)
    split_blocks = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, split_blocks)
    width = out_size
    matrix_desc = describe_contiguous(matrix, out_size, [config.rows, weight_tile])
    if activation is not None:
        assert splits == 1
        width = out_size // 2
        matrix_desc = describe_gated(matrix, [config.rows, weight_tile])
    partial_sums = torch.empty(splits, num_tokens, width, dtype=x.dtype, device=x.device)
    token_tiles = triton.cdiv(num_tokens, config.tokens)
    row_tiles = triton.cdiv(out_size, config.rows)
    num_tiles = token_tiles * row_tiles * splits
    _hopper_gemm_kernel[(min(num_tiles, config.programs * num_multiprocessors),)](
        describe_contiguous(x, readable_rows(x, config.tokens), [config.tokens, 64]),
        matrix_desc,
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
        HOW=conversion_of(weight, x.dtype),
        ACTIVATION=activation,
        STAGES=config.num_stages,
        ROWS=config.rows,
        EARLY=config.early,
        REGISTERS=REGISTERS[config.registers],
        CONSUMERS=4 if config.registers == 96 else 2,
        maxnreg=config.registers,
        num_warps=4,
        **pdl_options(),
    )
    return partial_sums


def can_use_hopper_gemm(x: Tensor) -> bool:
    """Whether `hopper_gemm` multiplies x `[n, in]`."""
    return can_run_gluon() and x.dtype.itemsize == 2 and x.shape[1] % 16 == 0


# Of the consumer and the producer, by those of a thread on average.
REGISTERS = {
    96: (112, 112, 112, 24),
    64: (80, 24),
    80: (104, 24),
    104: (144, 24),
    128: (176, 24),
    168: (240, 24),
}

DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.int16: gl.int16,
    torch.float8_e4m3fn: gl.float8e4nv,
}


def describe_contiguous(matrix: Tensor, num_rows: int, tile: list[int]) -> Any:
    """Describe a contiguous matrix `[n, columns]` to TMA, in tiles of a shape.

    num_rows: that TMA may read: n, or what `readable_rows` returns. The stride is computed, since
        the one that PyTorch gives a single row may be anything.
    """
    layout = gl.NVMMASharedLayout.get_default_for(tile, DTYPES[matrix.dtype])
    columns = matrix.shape[1]
    return GluonDescriptor(matrix, [num_rows, columns], [columns, 1], tile, layout)


def describe_gated(matrix: Tensor, tile: list[int]) -> Any:
    """Describe a gate above an up projection, so that a tile has eight rows of the one, eight rows
    of the other, and so on.
    """
    num_rows, columns = matrix.shape
    size = num_rows // 2
    assert size % 8 == 0
    shape = [size // 8, 2, 8, columns]
    strides = [8 * columns, size * columns, columns, 1]
    block = [tile[0] // 16, 2, 8, tile[1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[matrix.dtype])
    return GluonDescriptor(matrix, shape, strides, block, layout)
