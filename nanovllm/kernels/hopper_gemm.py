"""`x W^T` of an INT4 or FP8 weight for 2 to some 2,000 tokens, on Hopper, as partial sums.

For a few tokens nearly all the time goes into reading the weight. So a program begins with that
while the kernels before it still compute x (see `wait_for_previous`), and mostly two programs share
a multiprocessor: while one of them waits, the other converts or multiplies.

From tens of tokens on the tensor cores' time counts. So each number of the weight is converted to
x's dtype once for up to 256 tokens, and a consumer converts the next ones while the tensor cores
multiply those before. They read the weight from registers, and x from shared memory. For the parts
of a program see _gluon.py; the consumers are in hopper_consume.py.
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm.kernels._gluon import (
    WARPS,
    GluonDescriptor,
    can_run_gluon,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    make_barriers,
    mbarrier,
)
from nanovllm.kernels._triton import (
    device_limits,
    padded_empty,
    pdl_options,
    readable_rows,
    triton,
)
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.hopper_config import HopperGemmConfig, hopper_gemm_config
from nanovllm.kernels.hopper_consume import Handover, Work, consume, find_tile
from nanovllm.kernels.hopper_convert import BLOCK, HALF, ROWS, Rings, conversion_of
from nanovllm.kernels.int4_layout import Int4Weight

PRODUCER_REGISTERS = 24  # of a thread


@gluon.jit
def _load_weight(weight_desc, rings, first_row, block, stage):
    """Start to copy a block of the weight to its stage, which is full when x has arrived, too."""
    # A block is two tiles of an FP8 weight, as of x, and one of an INT4 weight.
    TILES: gl.constexpr = rings.weight.shape[0] // rings.full.shape[0]
    TILE_ROWS: gl.constexpr = rings.weight.shape[1]
    COLUMNS: gl.constexpr = rings.weight.shape[2]
    X_BYTES: gl.constexpr = rings.x.shape[1] * BLOCK * 2
    # Either there is one tile, and its numbers have two bytes, or there are two of one byte.
    WEIGHT_BYTES: gl.constexpr = TILE_ROWS * COLUMNS * 2
    arrived = rings.full.index(stage)
    mbarrier.expect(arrived, X_BYTES + WEIGHT_BYTES)
    for i in gl.static_range(TILES):
        column = (block * TILES + i) * COLUMNS
        tile = rings.weight.index(TILES * stage + i)
        if len(weight_desc.block_shape) == 4:  # `describe_gated`
            corner = [first_row // 16, 0, 0, column]
            load_tile(weight_desc, corner, arrived, tile.reshape(weight_desc.block_shape))
        else:
            load_tile(weight_desc, [first_row, column], arrived, tile)


@gluon.jit
def _produce(x_desc, weight_desc, rings, work, PDL: gl.constexpr):
    """Copy the tiles of x and of the weight, in the order in which they are multiplied."""
    STAGES: gl.constexpr = rings.full.shape[0]
    TOKENS: gl.constexpr = rings.x.shape[1]
    TILE_ROWS: gl.constexpr = rings.weight.shape[1]
    # No kernel of this step writes the weight. So the ring is filled with that of the first tile
    # while the kernels before still run.
    tile = find_tile(gl.program_id(0), work, TOKENS, TILE_ROWS)
    first_block = tile.split * work.split_blocks
    num_early = gl.minimum(gl.minimum(work.split_blocks, work.num_blocks - first_block), STAGES)
    for stage in range(num_early):
        _load_weight(weight_desc, rings, tile.first_row, first_block + stage, stage)
    # The consumers need no such wait: they write only after they have got some of x.
    if PDL:  # `wait_for_previous` in Gluon
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], gl.int32, is_pure=False, pack=1
        )
    count = 0
    for index in range(gl.program_id(0), work.num_tiles, gl.num_programs(0)):
        tile = find_tile(index, work, TOKENS, TILE_ROWS)
        end = gl.minimum((tile.split + 1) * work.split_blocks, work.num_blocks)
        for block in range(tile.split * work.split_blocks, end):
            stage = count % STAGES
            if count >= num_early:  # otherwise the weight is on its way already
                mbarrier.wait(rings.empty.index(stage), (count // STAGES & 1) ^ 1)
                _load_weight(weight_desc, rings, tile.first_row, block, stage)
            for i in gl.static_range(2):
                corner = [tile.first_token, block * BLOCK + i * HALF]
                load_tile(x_desc, corner, rings.full.index(stage), rings.x.index(2 * stage + i))
            count += 1


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
    TILE_ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
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
    # What a stage has of x and of the weight is copied and read together: one pair of barriers
    # serves both.
    full, empty = make_barriers(STAGES, 2)
    x_shape: gl.constexpr = [2 * STAGES] + x_desc.block_shape
    x_ring = gl.allocate_shared_memory(x_desc.dtype, x_shape, x_desc.layout)
    WEIGHT_TILES: gl.constexpr = 2 if HOW.assembly is None else 1
    tile_shape: gl.constexpr = [TILE_ROWS, weight_desc.block_shape[-1]]
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(tile_shape, weight_desc.dtype)
    shape: gl.constexpr = [WEIGHT_TILES * STAGES] + tile_shape
    weight_ring = gl.allocate_shared_memory(weight_desc.dtype, shape, tile_layout)
    sums = None
    given = None
    taken = None
    if TILE_ROWS == ROWS:
        sums_shape: gl.constexpr = [ROWS, x_desc.block_shape[0]]
        sums_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        sums = gl.allocate_shared_memory(gl.float32, sums_shape, sums_layout)
        given, taken = make_barriers(1, 1)
    handover = Handover(sums, given, taken)
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
    gl.warp_specialize(
        [
            (
                consume,
                (grains, bias_ptr, partial_sums_ptr, rings, handover, work, HOW, ACTIVATION, 0),
            ),
            (
                consume,
                (grains, bias_ptr, partial_sums_ptr, rings, handover, work, HOW, ACTIVATION, 1),
            ),
            (_produce, (x_desc, weight_desc, rings, work, PDL)),
        ],
        WARPS,
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

    With an activation W is a gate above an up projection, and the result is `act(gate) * up`,
    `[1, n, out / 2]`: what `gate_mul` makes of the product, but that is not rounded in between.

    The reference is `F.linear` with the weight of `dequantize_int4` or `dequantize_fp8`. As those
    of that weight, the products with a scale are rounded to x's dtype; so are INT4's scales.

    x: `[n, in]`, bf16 or fp16, contiguous; in is a multiple of 16. bias: `[out]`, or None.
    weight: in FP8, its column grain is a multiple of 64, or a whole row.
    reader_sums: whether there may be more than one.
    activation: "silu", "gelu_tanh" or None; see `can_apply_activation`.
    config: overrides `hopper_gemm_config`, for tests and tuning.
    """
    num_tokens, in_size = x.shape
    out_size = weight.out_size
    zero_points = None
    if isinstance(weight, FP8Weight):
        matrix = weight.values
        tile_columns = 64  # half a block
    else:
        matrix = weight.packed
        tile_columns = 32  # a whole block: a number of 16 bits holds four columns
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
            is_gated=activation is not None,
        )
    blocks = triton.cdiv(in_size, BLOCK.value)
    split_blocks = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, split_blocks)
    tile_shape = [config.rows, tile_columns]
    if activation is None:
        matrix_desc = describe_contiguous(matrix, out_size, tile_shape)
        shape = (splits, num_tokens, out_size)
        partial_sums = torch.empty(shape, dtype=x.dtype, device=x.device)
    else:
        assert splits == 1 and can_apply_activation(weight)
        matrix_desc = describe_gated(matrix, tile_shape)
        partial_sums = padded_empty(num_tokens, out_size // 2, x)[None]
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
        TILE_ROWS=config.rows,
        STAGES=config.num_stages,
        REGISTERS=(consumer_registers(config), PRODUCER_REGISTERS),
        maxnreg=config.registers,
        num_warps=4,
        **pdl_options(),
    )
    return partial_sums


def can_use_hopper_gemm(x: Tensor) -> bool:
    """Whether `hopper_gemm` multiplies x `[n, in]`. The model may be on the CPU of a machine that
    has such a GPU.
    """
    is_readable = x.dtype.itemsize == 2 and x.shape[1] % 16 == 0
    return x.is_cuda and is_readable and can_run_gluon()


def can_apply_activation(weight: Int4Weight | FP8Weight) -> bool:
    """Whether the gate and the up projection have whole groups of rows: see `describe_gated`."""
    return weight.out_size % 16 == 0


def consumer_registers(config: HopperGemmConfig) -> int:
    """How many a thread of a consumer has: half of what the producer leaves, a multiple of 8."""
    of_consumers = 3 * config.registers - PRODUCER_REGISTERS
    return of_consumers // 2 // 8 * 8


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
    """Describe a gate above an up projection to TMA, `[2 * size, columns]`, in tiles of a shape.

    A tile has eight rows of the gate, the eight of up that belong to them, the next eight of the
    gate, and so on, as `weight_row` counts them. So to TMA the matrix has four dimensions: groups
    of eight rows, gate or up, the rows of a group, and columns.
    """
    num_rows, columns = matrix.shape
    size = num_rows // 2
    shape = [size // 8, 2, 8, columns]
    strides = [8 * columns, size * columns, columns, 1]
    block = [tile[0] // 16, 2, 8, tile[1]]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[matrix.dtype])
    return GluonDescriptor(matrix, shape, strides, block, layout)
