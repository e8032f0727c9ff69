"""What the Gluon kernels share. Gluon is Triton's lower level; these kernels are for Hopper only.

In Triton a program is a tile of numbers, and the compiler decides which threads do what and when.
Gluon leaves that to us: it has layouts, shared memory, barriers, and *warp specialization*: the
warps of a program do different things. On Hopper that is what a GEMM or attention needs to keep the
tensor cores busy:

- A group of four warps, the **producer**, only starts copies from global memory to a ring of tiles
  in shared memory. The hardware does the copying (TMA).
- Two more groups, the **consumers**, multiply what has arrived. While one of them waits or computes
  anything else, the tensor cores work for the other.

They meet at *mbarriers*, counters in shared memory. Each tile of a ring has two. `full` completes a
phase when the tile's bytes have arrived, `empty` when both consumers have read it. A wait names the
phase by its parity; the barrier of tile number `count` is in phase `count // STAGES`, and of a new
barrier the phase before the first counts as complete, so the producer finds every tile empty.
"""

from typing import Any
from unittest.mock import Mock

import torch
from torch import Tensor

from nanovllm.kernels._triton import HAS_TRITON, is_hopper, triton_version

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    # Before 3.6 `warp_specialize` took other arguments.
    HAS_GLUON = triton_version() >= (3, 6)
    # Newer versions of Triton call these two otherwise.
    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
except (ImportError, AttributeError):  # an older Triton, or none
    gluon = gl = fence_async_shared = mbarrier = tma = Mock()
    warpgroup_mma = warpgroup_mma_wait = load_tile = store_tile = GluonDescriptor = Mock()
    HAS_GLUON = False

CONSUMER_ROWS = 64  # of a tile: what the tensor cores take at a time from four warps
TILE_ROWS = 2 * CONSUMER_ROWS
# Of the second consumer and of the producer: their warps, and the registers of a thread. Consumers
# hold the sums, and have the registers that the producer leaves.
WARPS = gl.constexpr([4, 4])
REGISTERS = gl.constexpr([240, 24])


def can_run_gluon() -> bool:
    """Whether there is a Hopper GPU, and a Triton whose Gluon these kernels are written in."""
    return HAS_TRITON and HAS_GLUON and is_hopper()


@gluon.jit
def make_ring(desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    """Allocate a ring of tiles in shared memory, and for each the barriers `full` and `empty`."""
    tiles = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_shape, desc.layout)
    full, empty = make_barriers(STAGES, READERS)
    return tiles, full, empty


@gluon.jit
def make_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Allocate the barriers `full` and `empty` of each stage of a ring."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty


@gluon.jit
def clear_behind(tile, num_valid):
    """Clear the rows of a tile of values from `num_valid` on: they may be NaN, and 0 * NaN is NaN.

    Both consumers do that, each for itself, and write the same.
    """
    PIECE: gl.constexpr = tile.shape[0] // 4
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for i in gl.static_range(4):
        piece = tile.slice(i * PIECE, PIECE, 0)
        rows = i * PIECE + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
        values = piece.load(layout)
        piece.store(gl.where((rows < num_valid)[:, None], values, gl.zeros_like(values)))
    fence_async_shared()


def describe(x: Tensor, rows: int, columns: int) -> Any:
    """Describe a matrix `[n, m]` of 16-bit numbers to TMA, in tiles of `rows` x `columns`."""
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)
    return GluonDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
