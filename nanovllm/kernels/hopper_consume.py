"""The consumers of `hopper_gemm`: they convert the weight, multiply, and write the sums."""

from typing import Any, NamedTuple

from nanovllm.kernels._gluon import (
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from nanovllm.kernels.gate_mul import gated
from nanovllm.kernels.hopper_convert import ROWS, convert, read_scales


class Work(NamedTuple):
    """What all programs together compute: it is known to every part of each program."""

    num_tokens: Any  # of x
    token_tiles: Any  # tiles of tokens; neighbouring programs have the same rows of the weight
    row_tiles: Any  # tiles of rows of the weight
    num_tiles: Any  # of both, in all splits of the inner dimension
    split_blocks: Any  # blocks of 128 columns in a split; the last one may have fewer
    num_blocks: Any  # in all splits
    out_size: Any  # rows of the weight


class Tile(NamedTuple):
    """The part of the work that a program does at a time."""

    first_token: Any
    first_row: Any  # of the weight; with an activation it is a place, see `weight_row`
    split: Any  # of the inner dimension, all of whose columns are multiplied


class Handover(NamedTuple):
    """Where a consumer finds the sums of the other one, if both have the same rows; else None."""

    sums: Any  # [64, tokens] float32
    given: Any  # [1, 1]: a barrier that completes when the sums of a tile are there
    taken: Any  # [1, 1]: and when they have been read


@gluon.jit
def find_tile(index, work, TOKENS: gl.constexpr, TILE_ROWS: gl.constexpr):
    """Tile number `index`."""
    # The last tile is moved back until it ends with the last token: it overlaps the tile before it,
    # and both write the same numbers there.
    first_token = index % work.token_tiles * TOKENS
    first_token = gl.maximum(gl.minimum(first_token, work.num_tokens - TOKENS), 0)
    first_row = index // work.token_tiles % work.row_tiles * TILE_ROWS
    return Tile(first_token, first_row, index // (work.token_tiles * work.row_tiles))


@gluon.jit
def weight_row(place, work, ACTIVATION: gl.constexpr):
    """The row of the weight that is in a place of the tiles, counted from the first tile on.

    Without an activation it is that number. With one, eight rows of the gate are followed by the
    eight of up that belong to them: of 16 sums, which the tensor cores leave in registers, a thread
    has those in places r and r + 8, and so it has the gate and the up of an output.
    """
    row = place
    if ACTIVATION is not None:
        # The group of sixteen, the row in one of its halves, and which half: gate or up.
        row = place // 16 * 8 + place % 8 + place // 8 % 2 * (work.out_size // 2)
    return row


@gluon.jit
def _start_product(weight, rings, stage, acc, SIDE: gl.constexpr):
    """Start `acc += weight x^T` with half a block of x."""
    x = rings.x.index(2 * stage + SIDE).permute((1, 0))
    return warpgroup_mma(weight, x, acc, is_async=True)


@gluon.jit
def _multiply(
    acc,
    row,
    grains,
    rings,
    first_block,
    end,
    count,
    operand: gl.constexpr,
    OWN_ROWS: gl.constexpr,
    FIRST_SIDE: gl.constexpr,
    LAST_SIDE: gl.constexpr,
    HOW: gl.constexpr,
):
    """Return `acc` plus the products of one consumer's part of a tile, and the new `count`.

    row: of the weight, for each row of `acc`. first_block, end: of the tile.
    count: of the blocks in the program's earlier tiles.
    OWN_ROWS, FIRST_SIDE, LAST_SIDE: see `consume`.
    """
    STAGES: gl.constexpr = rings.full.shape[0]
    like = gl.zeros([1], rings.x.dtype, gl.SliceLayout(1, operand))
    scales = read_scales(grains, row, first_block, like, FIRST_SIDE, HOW)
    stage = count % STAGES
    mbarrier.wait(rings.full.index(stage), count // STAGES & 1)
    weight = convert(rings, stage, scales, operand, OWN_ROWS, FIRST_SIDE, HOW)
    # The tensor cores multiply half a block while the next half is read and converted. It would be
    # faster still to start the next product before the last one has ended, but then the assembler,
    # ptxas, lets all of them run one by one.
    for block in range(first_block, end):
        if FIRST_SIDE != LAST_SIDE:
            scales = read_scales(grains, row, block, like, LAST_SIDE, HOW)
        next_scales = read_scales(grains, row, block + 1, like, FIRST_SIDE, HOW)
        if FIRST_SIDE != LAST_SIDE:
            acc = _start_product(weight, rings, stage, acc, FIRST_SIDE)
            weight = convert(rings, stage, scales, operand, OWN_ROWS, LAST_SIDE, HOW)
            acc = warpgroup_mma_wait(0, deps=(acc,))
        acc = _start_product(weight, rings, stage, acc, LAST_SIDE)
        count += 1
        next_stage = count % STAGES
        if block + 1 < end:
            mbarrier.wait(rings.full.index(next_stage), count // STAGES & 1)
        # Behind the last block this converts whatever is there, and nobody uses it.
        weight = convert(rings, next_stage, next_scales, operand, OWN_ROWS, FIRST_SIDE, HOW)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(rings.empty.index(stage), count=1)
        stage = next_stage
    return acc, count


@gluon.jit
def _store(
    acc,
    grains,
    bias_ptr,
    partial_sums_ptr,
    tile,
    first_place,
    work,
    HOW: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """Write the sums `[64, tokens]` of a consumer: of the rows from `first_place` on."""
    TOKENS: gl.constexpr = acc.shape[1]
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    place = first_place + gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc.type.layout))
    row = weight_row(place, work, ACTIVATION)
    is_row = row < work.out_size
    if HOW.assembly is None and HOW.grains == 1:
        scale = gl.load(grains[0] + row // HOW.row_grain, mask=is_row, other=0.0)
        acc *= scale[:, None]
    if bias_ptr is not None:  # noqa: SIM102 (this is decided when the kernel is compiled)
        if tile.split == 0:  # the bias is added once
            bias = gl.load(bias_ptr + row, mask=is_row, other=0.0)
            acc += bias.to(gl.float32)[:, None]
    # With an activation two places make one output.
    first_out = first_place
    out_size = work.out_size
    if ACTIVATION is not None:
        pairs = acc.reshape([ROWS // 16, 2, 8, TOKENS]).permute((0, 2, 3, 1))
        gate, up = gl.split(pairs)
        acc = gated(gate, up, ACTIVATION).reshape([ROWS // 2, TOKENS])
        out_size = out_size // 2
        first_out = first_place // 2
    # A thread is to store neighbouring rows, that is, outputs of one token.
    out = acc.to(partial_sums_ptr.dtype.element_ty).permute((1, 0))
    out = gl.convert_layout(out, store_layout)
    token = tile.first_token + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, store_layout))
    out_row = first_out + gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, store_layout))
    mask = (token < work.num_tokens)[:, None] & (out_row < out_size)[None, :]
    offsets = (tile.split * work.num_tokens + token) * out_size
    gl.store(partial_sums_ptr + offsets[:, None] + out_row[None, :], out, mask=mask)


@gluon.jit
def consume(
    grains,
    bias_ptr,
    partial_sums_ptr,
    rings,
    handover,
    work,
    HOW: gl.constexpr,
    ACTIVATION: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Do the work of one consumer in all tiles of the program.

    If a tile has 128 rows of the weight, each consumer has 64 of them, and multiplies the left half
    of each block, and then the right. If it has 64, both consumers have them all, and each has one
    half of each block; at last consumer 0 adds the sums of the other one to its own.
    """
    TOKENS: gl.constexpr = rings.x.shape[1]
    TILE_ROWS: gl.constexpr = rings.weight.shape[1]
    HAVE_SAME_ROWS: gl.constexpr = TILE_ROWS == ROWS
    # Which 64 rows of the tile, and which half of a block is multiplied first, and which last: each
    # is 0 or 1.
    OWN_ROWS: gl.constexpr = 0 if HAVE_SAME_ROWS else CONSUMER
    FIRST_SIDE: gl.constexpr = CONSUMER if HAVE_SAME_ROWS else 0
    LAST_SIDE: gl.constexpr = CONSUMER if HAVE_SAME_ROWS else 1
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, registers, 2)
    count = 0  # of blocks in earlier tiles
    tile_count = 0
    for index in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        tile = find_tile(index, work, TOKENS, TILE_ROWS)
        first_place = tile.first_row + OWN_ROWS * ROWS
        place = first_place + gl.arange(0, ROWS, layout=gl.SliceLayout(1, operand))
        row = gl.minimum(weight_row(place, work, ACTIVATION), work.out_size - 1)
        first_block = tile.split * work.split_blocks
        end = gl.minimum(first_block + work.split_blocks, work.num_blocks)
        acc = gl.zeros([ROWS, TOKENS], gl.float32, registers)
        acc, count = _multiply(
            acc,
            row,
            grains,
            rings,
            first_block,
            end,
            count,
            operand,
            OWN_ROWS,
            FIRST_SIDE,
            LAST_SIDE,
            HOW,
        )
        if HAVE_SAME_ROWS:
            phase = tile_count & 1  # of both barriers of the handover, which has one stage
            tile_count += 1
            if CONSUMER == 1:
                mbarrier.wait(handover.taken.index(0), phase ^ 1)
                handover.sums.store(acc)
                mbarrier.arrive(handover.given.index(0), count=1)
            else:
                mbarrier.wait(handover.given.index(0), phase)
                acc += handover.sums.load(registers)
                mbarrier.arrive(handover.taken.index(0), count=1)
        if CONSUMER == 0 or not HAVE_SAME_ROWS:
            _store(
                acc,
                grains,
                bias_ptr,
                partial_sums_ptr,
                tile,
                first_place,
                work,
                HOW,
                ACTIVATION,
            )
