"""The first half of a gated MLP in one kernel, on Hopper: `act(x W_gate^T) * (x W_up^T)`.

As two kernels, a GEMM writes gate and up to memory, 12 KB a token for Qwen3-0.6B, and `gate_mul`
reads them again: in a large prefill that takes a quarter of the time of the two. Here a program
holds the same tile of both products in registers, and writes only the result. For the parts of a
program see _gluon.py.
"""

import torch
from torch import Tensor

from nanovllm.kernels._gluon import (
    CONSUMER_ROWS,
    REGISTERS,
    TILE_ROWS,
    WARPS,
    can_run_gluon,
    describe,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    make_ring,
    mbarrier,
    store_tile,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from nanovllm.kernels._triton import device_limits, padded_empty, triton

TILE_COLUMNS = 128  # of the result; a consumer has as many of the gate and of up
BLOCK_K = 64  # of the inner dimension in a tile
STAGES = gl.constexpr(4)  # tiles on their way or being multiplied
GROUP_ROWS = gl.constexpr(
    8
)  # rows of tiles that are computed together, so that the L2 cache holds what they read
# With fewer tokens cuBLAS has better tiles for the size.
MIN_TOKENS = 2048
# Without a CUDA graph a smaller prefill waits for the host, which takes 40 us longer to launch this
# kernel than to launch the two.
MIN_TOKENS_EAGER = 8192


@gluon.jit
def _find_tile(index, num_row_tiles, num_column_tiles):
    """The row and the column of tile number `index`."""
    tiles_in_group = GROUP_ROWS * num_column_tiles
    first_row = index // tiles_in_group * GROUP_ROWS
    rows_in_group = gl.minimum(num_row_tiles - first_row, GROUP_ROWS)
    row = first_row + index % tiles_in_group % rows_in_group
    column = index % tiles_in_group // rows_in_group
    return row, column


@gluon.jit
def _produce(
    x_desc,
    weight_desc,
    rings,
    num_row_tiles,
    num_column_tiles,
    SIZE: gl.constexpr,
    INNER: gl.constexpr,
):
    """Copy the tiles of x and of both weights, in the order in which they are multiplied."""
    x_ring, gate_ring, up_ring, full, empty = rings
    ROWS: gl.constexpr = x_ring.shape[1]
    COLUMNS: gl.constexpr = gate_ring.shape[1]
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    count = 0
    for index in range(gl.program_id(0), num_row_tiles * num_column_tiles, gl.num_programs(0)):
        row, column = _find_tile(index, num_row_tiles, num_column_tiles)
        for k in range(0, INNER, BLOCK_K):
            stage = count % STAGES
            arrived = full.index(stage)
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(arrived, (ROWS + 2 * COLUMNS) * BLOCK_K * 2)
            load_tile(x_desc, [row * ROWS, k], arrived, x_ring.index(stage))
            load_tile(weight_desc, [column * COLUMNS, k], arrived, gate_ring.index(stage))
            load_tile(weight_desc, [SIZE + column * COLUMNS, k], arrived, up_ring.index(stage))
            count += 1


@gluon.jit
def _gated(gate, up, IS_GELU: gl.constexpr):
    """Return `act(gate) * up`; see `gate_mul.gated`."""
    exponent = gate
    if IS_GELU:
        exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    power = gl.exp2(-1.4426950408889634 * exponent)
    # A division takes ten instructions, and this one; it errs in the last bit of a float32.
    inverse = gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], gl.float32, is_pure=True, pack=1
    )
    return gate * inverse * up


@gluon.jit
def _consume(
    out_desc,
    out_tiles,
    rings,
    num_row_tiles,
    num_column_tiles,
    INNER: gl.constexpr,
    IS_GELU: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Compute the rows of one consumer in all tiles of the program."""
    x_ring, gate_ring, up_ring, full, empty = rings
    BLOCK_K: gl.constexpr = x_ring.shape[2]
    ROWS: gl.constexpr = out_tiles.shape[1]
    COLUMNS: gl.constexpr = out_tiles.shape[2]
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    out_tile = out_tiles.index(CONSUMER)
    count = 0
    for index in range(gl.program_id(0), num_row_tiles * num_column_tiles, gl.num_programs(0)):
        row, column = _find_tile(index, num_row_tiles, num_column_tiles)
        gate = gl.zeros([ROWS, COLUMNS], gl.float32, registers)
        up = gl.zeros([ROWS, COLUMNS], gl.float32, registers)
        for k in range(0, INNER, BLOCK_K):
            stage = count % STAGES
            before = (count + STAGES - 1) % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            x = x_ring.index(stage).slice(CONSUMER * ROWS, ROWS, 0)
            gate_weight = gate_ring.index(stage).permute((1, 0))
            up_weight = up_ring.index(stage).permute((1, 0))
            gate = warpgroup_mma(x, gate_weight, gate, is_async=True)
            up = warpgroup_mma(x, up_weight, up, is_async=True)
            # All but the newest two products are finished: the tiles before have been read.
            gate, up = warpgroup_mma_wait(2, deps=(gate, up))
            mbarrier.arrive(empty.index(before), count=1, pred=k > 0)
            count += 1
        gate, up = warpgroup_mma_wait(0, deps=(gate, up))
        mbarrier.arrive(empty.index((count + STAGES - 1) % STAGES), count=1)
        out = _gated(gate, up, IS_GELU).to(out_tiles.dtype)
        tma.store_wait(0)  # until the copy of the last result has left `out_tile`
        out_tile.store(out)
        fence_async_shared()
        first_row = row * (2 * ROWS) + CONSUMER * ROWS
        store_tile(out_desc, [first_row, column * COLUMNS], out_tile)
    tma.store_wait(0)


@gluon.jit
def _gate_up_kernel(
    x_desc,
    weight_desc,
    out_desc,
    num_row_tiles,
    num_column_tiles,
    SIZE: gl.constexpr,
    INNER: gl.constexpr,
    IS_GELU: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program computes a tile of the result, then another one as many further on as there are
    programs, and so on.
    """
    # The three tiles of a stage are copied and read together: one pair of barriers serves them all.
    x_ring, full, empty = make_ring(x_desc, STAGES, 2)
    shape: gl.constexpr = [STAGES] + weight_desc.block_shape
    gate_ring = gl.allocate_shared_memory(weight_desc.dtype, shape, weight_desc.layout)
    up_ring = gl.allocate_shared_memory(weight_desc.dtype, shape, weight_desc.layout)
    out_shape: gl.constexpr = [2] + out_desc.block_shape
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, out_shape, out_desc.layout)
    fence_async_shared()
    rings = (x_ring, gate_ring, up_ring, full, empty)
    rows = num_row_tiles
    columns = num_column_tiles
    gl.warp_specialize(
        [
            (_consume, (out_desc, out_tiles, rings, rows, columns, INNER, IS_GELU, 0)),
            (_consume, (out_desc, out_tiles, rings, rows, columns, INNER, IS_GELU, 1)),
            (_produce, (x_desc, weight_desc, rings, rows, columns, SIZE, INNER)),
        ],
        WARPS,
        REGISTERS,
    )


def can_fuse_gate(x: Tensor, weight: Tensor, in_graph: bool) -> bool:
    """Whether `gate_up_gemm` serves this input and is faster than two kernels.

    in_graph: a CUDA graph launches the kernels.
    """
    num_tokens, inner = x.shape
    return (
        num_tokens >= (MIN_TOKENS if in_graph else MIN_TOKENS_EAGER)
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[0] % (2 * TILE_COLUMNS) == 0
        and inner % 8 == 0  # rows begin at multiples of 16 bytes, as TMA needs them
        and x.is_contiguous()
        and can_run_gluon()
    )


def gate_up_gemm(x: Tensor, weight: Tensor, activation: str = "silu") -> Tensor:
    """Return `act(x W_gate^T) * (x W_up^T)`, `[n, size]`; sums and activation are in float32.

    x: `[n, in]`, bf16 or fp16, contiguous.
    weight: `[2 * size, in]`, contiguous: the gate's, and up's below it.
    activation: as in `gate_mul`. The reference is `gate_mul_torch(F.linear(x, weight))`.
    """
    num_tokens, inner = x.shape
    size = weight.shape[0] // 2
    assert size % TILE_COLUMNS == 0 and weight.is_contiguous()
    out = padded_empty(num_tokens, size, x)
    num_row_tiles = triton.cdiv(num_tokens, TILE_ROWS)
    num_column_tiles = size // TILE_COLUMNS
    num_multiprocessors, _ = device_limits(x.device)
    _gate_up_kernel[(min(num_row_tiles * num_column_tiles, num_multiprocessors),)](
        describe(x, TILE_ROWS, BLOCK_K),
        describe(weight, TILE_COLUMNS, BLOCK_K),
        describe(out, CONSUMER_ROWS, TILE_COLUMNS),
        num_row_tiles,
        num_column_tiles,
        SIZE=size,
        INNER=inner,
        IS_GELU=activation == "gelu_tanh",
        num_warps=4,
    )
    return out
