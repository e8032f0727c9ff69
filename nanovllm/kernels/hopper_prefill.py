"""Attention of large prefills on Hopper: `tiled_prefill`, with the tensor cores busy all the time.

In `varlen_prefill` the tensor cores wait while a program computes exponentials. Here, as in
FlashAttention-3 (Shah et al. 2024), softmax and matrix products overlap twice:

- A program's two consumers (see _gluon.py), each with 64 of the tile's 128 queries, take turns at
  the tensor cores: the products of one run while the other computes its softmax.
- Within a consumer, the scores of the next keys are computed while the weights of these keys are
  multiplied with V: `scores = q K[i + 1]` and `acc += weights V[i]` are under way at the same time,
  and the softmax of those scores begins while the second product runs.

There are as many programs as multiprocessors, and each goes through a share of the list, so that
the end of one tile overlaps with the beginning of the next one. The keys of a tile are read from
the last to the first: those that need a mask come first, and the long rest does without.
"""

import math

import torch
from torch import Tensor

from nanovllm.kernels._gluon import (
    CONSUMER_ROWS,
    REGISTERS,
    WARPS,
    can_run_gluon,
    clear_behind,
    describe,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    make_ring,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from nanovllm.kernels._triton import device_limits

BLOCK_N = 128  # keys in a tile
STAGES = gl.constexpr(2)  # tiles of keys, and as many of values


@gluon.jit
def _read_item(work, turn, HEADS: gl.constexpr, FIELDS: gl.constexpr):
    """What a program computes in its turn: a tile of the list and a head.

    The list begins with the tiles that have the most keys. So that all programs have as much to do,
    they take the items in rows, one forwards and one backwards: 0 1 2 3, then 7 6 5 4.
    """
    tiles_ptr, num_items = work
    num_programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = num_programs - 1 - place
    item = turn * num_programs + place
    # There may be fewer items in the last turn. No queries: nothing to do.
    existing = gl.minimum(item, num_items - 1)
    tile_ptr = tiles_ptr + existing // HEADS * FIELDS
    first_row = gl.load(tile_ptr)
    num_queries = gl.load(tile_ptr + 1)
    position = gl.load(tile_ptr + 2)
    seq = gl.load(tile_ptr + 3)
    num_queries = gl.where(item < num_items, num_queries, 0)
    return existing % HEADS, first_row, num_queries, position, seq


@gluon.jit
def _count_turns(work):
    """How many items a program computes at most."""
    tiles_ptr, num_items = work
    return gl.cdiv(num_items, gl.num_programs(0))


@gluon.jit
def _count_key_tiles(position, num_queries, BLOCK_N: gl.constexpr):
    """How many tiles of keys the queries see; of padding one, which is masked."""
    return gl.maximum(gl.cdiv(position + num_queries, BLOCK_N), 1)


@gluon.jit
def _produce(
    tensors,
    work,
    memory,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    FIELDS: gl.constexpr,
):
    """Copy queries, keys and values to shared memory."""
    q_desc, k_desc, v_desc, block_tables_ptr, table_stride, column_stride = tensors
    queries, keys, values, turns = memory
    q_tiles, q_full, q_empty = queries
    k_ring, k_full, k_empty = keys
    v_ring, v_full, v_empty = values
    ROWS: gl.constexpr = q_tiles.shape[1]
    HEAD_DIM: gl.constexpr = q_tiles.shape[2]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    count = 0  # of tiles of keys so far
    num_done = 0
    for turn in range(_count_turns(work)):
        head, first_row, num_queries, position, seq = _read_item(work, turn, HEADS, FIELDS)
        if num_queries > 0:
            for consumer in gl.static_range(2):
                arrived = q_full.index(consumer)
                mbarrier.wait(q_empty.index(consumer), (num_done & 1) ^ 1)
                mbarrier.expect(arrived, ROWS * HEAD_DIM * 2)
                rows = [first_row + consumer * ROWS, head * HEAD_DIM]
                load_tile(q_desc, rows, arrived, q_tiles.index(consumer))
            num_tiles = _count_key_tiles(position, num_queries, BLOCK_N)
            kv_column = head // (HEADS // KV_HEADS) * HEAD_DIM
            for i in range(num_tiles):
                start = (num_tiles - 1 - i) * BLOCK_N
                # Without tables, all keys are new, and lie where the queries do.
                row = first_row - position + start
                if block_tables_ptr is not None:
                    column = start // BLOCK_SIZE * column_stride
                    block = gl.load(block_tables_ptr + seq.to(gl.int64) * table_stride + column)
                    row = block * BLOCK_SIZE + start % BLOCK_SIZE
                stage = count % STAGES
                phase = (count // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), BLOCK_N * HEAD_DIM * 2)
                load_tile(k_desc, [row, kv_column], k_full.index(stage), k_ring.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), BLOCK_N * HEAD_DIM * 2)
                load_tile(v_desc, [row, kv_column], v_full.index(stage), v_ring.index(stage))
                count += 1
            num_done += 1


@gluon.jit
def _softmax(scores, row_max, row_sum, scale_log2, first_key, positions, MASKED: gl.constexpr):
    """Online softmax, as in `_varlen_prefill_kernel`. It also returns the factor for `acc`."""
    if MASKED:
        in_row: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
        keys = first_key + gl.arange(0, scores.shape[1], layout=in_row)
        scores = gl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    scaled_max = new_max * scale_log2
    if MASKED:  # a query may have seen no key yet
        scaled_max = gl.where(new_max == float("-inf"), 0.0, scaled_max)
    weights = gl.exp2(scores * scale_log2 - scaled_max[:, None])
    alpha = gl.exp2(row_max * scale_log2 - scaled_max)
    row_sum = row_sum * alpha + gl.sum(weights, 1)
    return weights, new_max, row_sum, alpha


@gluon.jit
def _start_scores(q, keys, turns, count, CONSUMER: gl.constexpr):
    """Start `q K^T` with tile number `count` of the keys, when it is there and it is our turn."""
    k_ring, k_full, k_empty = keys
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    registers: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), count // STAGES & 1)
    # Consumer 0 begins. Afterwards each waits until the other has started its products.
    mbarrier.wait(turns.index(CONSUMER), (count & 1) ^ (1 - CONSUMER))
    ROWS: gl.constexpr = q.shape[0]
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, registers)
    transposed = k_ring.index(stage).permute((1, 0))
    return warpgroup_mma(q, transposed, zeros, use_acc=False, is_async=True)


@gluon.jit
def _start_output(weights, acc, values, count):
    """Start `acc += weights V` with tile number `count` of the values, when it has arrived."""
    v_ring, v_full, v_empty = values
    stage = count % STAGES
    operand: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    weights = gl.convert_layout(weights.to(v_ring.dtype), operand)
    mbarrier.wait(v_full.index(stage), count // STAGES & 1)
    return warpgroup_mma(weights, v_ring.index(stage), acc, is_async=True)


@gluon.jit
def _next_keys(
    weights,
    acc,
    row_max,
    row_sum,
    q,
    keys,
    values,
    turns,
    count,
    first_key,
    positions,
    scale_log2,
    CONSUMER: gl.constexpr,
    MASKED: gl.constexpr,
):
    """Multiply the weights of the keys before with their values, and compute the next weights.

    `count` is the number of the next keys' tile.
    """
    k_ring, k_full, k_empty = keys
    v_ring, v_full, v_empty = values
    scores = _start_scores(q, keys, turns, count, CONSUMER)
    acc_async = _start_output(weights, acc, values, count - 1)
    mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
    scores = warpgroup_mma_wait(1, deps=(scores,))  # the older of the two products
    mbarrier.arrive(k_empty.index(count % STAGES), count=1)
    weights, row_max, row_sum, alpha = _softmax(
        scores, row_max, row_sum, scale_log2, first_key, positions, MASKED
    )
    acc = warpgroup_mma_wait(0, deps=(acc_async,))
    mbarrier.arrive(v_empty.index((count - 1) % STAGES), count=1)
    alpha = gl.convert_layout(alpha, gl.SliceLayout(1, acc.type.layout))
    return weights, acc * alpha[:, None], row_max, row_sum


@gluon.jit
def _consume(
    out_ptr,
    work,
    memory,
    scale_log2,
    v_scale,
    HEADS: gl.constexpr,
    FIELDS: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    """Attend with the queries of one consumer, in all items of the program."""
    queries, keys, values, turns = memory
    q_tiles, q_full, q_empty = queries
    k_ring, k_full, k_empty = keys
    v_ring, v_full, v_empty = values
    ROWS: gl.constexpr = q_tiles.shape[1]
    HEAD_DIM: gl.constexpr = q_tiles.shape[2]
    BLOCK_N: gl.constexpr = k_ring.shape[1]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    q = q_tiles.index(CONSUMER)
    count = 0
    num_done = 0
    for turn in range(_count_turns(work)):
        head, first_row, num_queries, position, seq = _read_item(work, turn, HEADS, FIELDS)
        if num_queries > 0:
            num_keys = position + num_queries
            num_tiles = _count_key_tiles(position, num_queries, BLOCK_N)
            last = num_tiles - 1
            positions = position + CONSUMER * ROWS + gl.arange(0, ROWS, layout=row_layout)
            # This and the earlier tiles see every key: those up to the first query's own.
            first_masked = gl.maximum(position + CONSUMER * ROWS + 1, 0) // BLOCK_N
            num_masked = gl.maximum(gl.minimum(num_tiles - first_masked, num_tiles), 1)
            row_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
            row_sum = gl.zeros([ROWS], gl.float32, row_layout)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, acc_layout)

            mbarrier.wait(q_full.index(CONSUMER), num_done & 1)
            scores = _start_scores(q, keys, turns, count, CONSUMER)
            mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(k_empty.index(count % STAGES), count=1)
            weights, row_max, row_sum, alpha = _softmax(
                scores, row_max, row_sum, scale_log2, last * BLOCK_N, positions, True
            )
            if num_keys < num_tiles * BLOCK_N:
                mbarrier.wait(v_full.index(count % STAGES), count // STAGES & 1)
                clear_behind(v_ring.index(count % STAGES), num_keys - last * BLOCK_N)
            for MASKED in gl.static_range(1, -1, -1):
                begin = 1 if MASKED else num_masked
                end = num_masked if MASKED else num_tiles
                for i in range(begin, end):
                    weights, acc, row_max, row_sum = _next_keys(
                        weights,
                        acc,
                        row_max,
                        row_sum,
                        q,
                        keys,
                        values,
                        turns,
                        count + i,
                        (last - i) * BLOCK_N,
                        positions,
                        scale_log2,
                        CONSUMER,
                        MASKED,
                    )
            mbarrier.arrive(q_empty.index(CONSUMER), count=1)
            acc_async = _start_output(weights, acc, values, count + last)
            acc = warpgroup_mma_wait(0, deps=(acc_async,))
            mbarrier.arrive(v_empty.index((count + last) % STAGES), count=1)
            count += num_tiles
            num_done += 1

            row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)  # of padding, whose result is zeros
            row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, acc_layout))
            if v_scale is not None:
                acc *= v_scale
            out = (acc / row_sum[:, None]).to(q_tiles.dtype)
            out = gl.convert_layout(out, store_layout)  # so that a thread stores 16 bytes in a row
            rows = CONSUMER * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
            dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
            places = ((first_row + rows).to(gl.int64) * HEADS + head) * HEAD_DIM
            mask = (rows < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
            gl.store(out_ptr + places[:, None] + dims[None, :], out, mask=mask)


@gluon.jit(do_not_specialize=["tiles_ptr", "block_tables_ptr", "num_items", "table_stride"])
def _hopper_prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    out_ptr,
    tiles_ptr,
    block_tables_ptr,
    num_items,
    table_stride,
    column_stride,
    scale_log2,
    v_scale,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    FIELDS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """A program computes its share of the items: each is a tile of the list, and a head."""
    queries = make_ring(q_desc, 2, 1)  # no ring: a tile for each consumer
    keys = make_ring(k_desc, STAGES, 2)
    values = make_ring(v_desc, STAGES, 2)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(turns.index(0), count=1)
    mbarrier.init(turns.index(1), count=1)
    fence_async_shared()
    memory = (queries, keys, values, turns)
    tensors = (q_desc, k_desc, v_desc, block_tables_ptr, table_stride, column_stride)
    work = (tiles_ptr, num_items)
    gl.warp_specialize(
        [
            (_consume, (out_ptr, work, memory, scale_log2, v_scale, HEADS, FIELDS, 0)),
            (_consume, (out_ptr, work, memory, scale_log2, v_scale, HEADS, FIELDS, 1)),
            (_produce, (tensors, work, memory, HEADS, KV_HEADS, BLOCK_SIZE, FIELDS)),
        ],
        WARPS,
        REGISTERS,
    )


def serves_hopper_prefill(block_size: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `hopper_prefill` serves this GPU, cache and model."""
    is_16_bits = dtype in (torch.bfloat16, torch.float16)
    return is_16_bits and head_dim in (64, 128) and block_size % BLOCK_N == 0 and can_run_gluon()


def hopper_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Tensor,
    block_tables: Tensor | None,
    block_size: int,
    scale: float,
    v_scale: float | None = None,
) -> Tensor:
    """`tiled_prefill` on Hopper, for bf16 and fp16: the same tiles, all of them whole.

    k, v: with block tables all slots of the cache, `[num_slots, kv_heads, head_dim]`. Without, all
        tokens of the step are new, and these are their keys and values `[num_tokens, ...]`. In
        either case in 16 bits.
    v_scale: the scale of V where the cache is FP8, see fp8_cache.py.
    """
    num_tokens, heads, head_dim = q.shape
    num_items = len(tiles) * heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    num_multiprocessors, _ = device_limits(q.device)
    _hopper_prefill_kernel[(min(num_items, num_multiprocessors),)](
        describe(q.flatten(1), CONSUMER_ROWS, head_dim),
        describe(k.flatten(1), BLOCK_N, head_dim),
        describe(v.flatten(1), BLOCK_N, head_dim),
        out,
        tiles,
        block_tables,
        num_items,
        0 if block_tables is None else block_tables.stride(0),
        0 if block_tables is None else block_tables.stride(1),
        scale * math.log2(math.e),
        v_scale,
        HEADS=heads,
        KV_HEADS=k.shape[1],
        BLOCK_SIZE=block_size,
        FIELDS=tiles.shape[1],
        num_warps=4,
    )
    return out
