"""Tiles of prefill attention in parts: several programs share the keys of one tile.

A few new tokens behind a long context are one tile of queries. A single program for each head would
go through all keys, one after the other, while the rest of the GPU has nothing to do. So where
there are too few tiles, their keys are cut into parts, which are tiles of the list themselves. Each
program leaves its part's result and log-sum-exp in memory, and counts itself as arrived. The one
that arrives last combines them all ("Flash-Decoding", Dao et al. 2023). Decode attention has a
second kernel for that; here it would cost a launch in each step and layer, even where no tile has
parts.

Example: 2 queries behind 1,100 keys, in parts of 512. A tile has the four fields of
prefill_tiles.py, and behind them

    part  num_parts  keys_per_part  first_row
     0        3           512           0       keys 0 to 511; its results are the rows 0 and 1
     1        3           512           0       keys 512 to 1023; rows 2 and 3
     2        3           512           0       keys 1024 to 1101; rows 4 and 5
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels._triton import device_limits, tl, triton

PART_FIELDS = 8  # of a tile that may be a part
KEY_STEP = 128  # parts begin at multiples of this, which is a multiple of every `block_n`
MAX_PARTS = 16  # of a tile
MAX_ROWS = 2048  # of the parts' results in memory
# As measured on an H100: what a program takes for a key, and what combining takes for a part, and
# for each query of it. Microseconds.
KEY_US = 0.024
PART_US = 3.0
PART_QUERY_US = 0.094


class PartResults(NamedTuple):
    """What the parts of tiles leave for the program that combines them."""

    out: Tensor  # [rows, heads, head_dim] float32
    lse: Tensor  # [rows, heads] float32, to the base 2; -inf: the query sees no key of the part
    # [MAX_ROWS, heads] int32: how many parts of a tile have arrived, at the row of its first part;
    # zeros before and after each launch.
    arrivals: Tensor

    @classmethod
    def make(cls, q: Tensor, arrivals: Tensor) -> "PartResults":
        """Memory for the results of one launch with these queries `[n, heads, head_dim]`."""
        num_rows = min(MAX_ROWS, MAX_PARTS * len(q))
        if 2 * len(q) > MAX_ROWS:  # not even two parts have room, so `cut_keys` makes none
            num_rows = 0
        out = torch.empty(num_rows, *q.shape[1:], dtype=torch.float32, device=q.device)
        return cls(out, torch.empty(out.shape[:2], dtype=torch.float32, device=q.device), arrivals)


def make_arrivals(heads: int, device: torch.device) -> Tensor:
    """Return the counters of `PartResults`, for all launches of one engine."""
    return torch.zeros(MAX_ROWS, heads, dtype=torch.int32, device=device)


def wanted_tiles(heads: int, device: torch.device) -> int:
    """Return how many tiles, parts included, give the whole GPU work."""
    num_multiprocessors, _ = device_limits(device)
    return -(-2 * num_multiprocessors // heads)


def cut_keys(tiles: np.ndarray, wanted: int) -> np.ndarray:
    """Cut the keys of long tiles into parts if there are few tiles: `[n, 8]` int32.

    tiles: `[tiles, 4]`, of `make_tiles`.
    wanted: see `wanted_tiles`. With parts, the list is no longer than that.
    """
    num_queries = tiles[:, 1]
    num_keys = num_queries + tiles[:, 2]
    # No more than give the GPU work, and than there is memory for.
    most = min(MAX_PARTS, wanted // len(tiles), MAX_ROWS // int(num_queries.sum()))
    if most > 1:
        # With p parts, going through the keys takes 1/p of the time, and combining them p times as
        # long as one. So the best p is the root of the ratio. It is worth it if it saves a fifth.
        ratio = num_keys * KEY_US / (PART_US + num_queries * PART_QUERY_US)
        best = np.clip(np.sqrt(ratio), 1, most).astype(np.int64)
        is_worth_it = ratio / best + best < 0.8 * ratio
        if is_worth_it.any():
            return _cut(tiles, num_keys, np.where(is_worth_it, best, 1))
    whole = np.zeros((len(tiles), PART_FIELDS), np.int32)
    whole[:, :4] = tiles
    whole[:, 5] = 1
    whole[:, 6] = num_keys
    return whole


def _cut(tiles: np.ndarray, num_keys: np.ndarray, wanted_parts: np.ndarray) -> np.ndarray:
    """Cut each tile into so many parts, or fewer, as parts begin at multiples of KEY_STEP."""
    steps_per_part = np.maximum(-(-num_keys // (wanted_parts * KEY_STEP)), 1)
    keys_per_part = np.where(wanted_parts > 1, steps_per_part * KEY_STEP, num_keys)
    num_parts = np.where(wanted_parts > 1, -(-num_keys // (steps_per_part * KEY_STEP)), 1)
    num_rows = np.where(num_parts > 1, num_parts * tiles[:, 1], 0)
    tile = np.repeat(np.arange(len(tiles)), num_parts)
    parts_before = np.cumsum(num_parts) - num_parts
    parts = np.empty((len(tile), PART_FIELDS), np.int32)
    parts[:, :4] = tiles[tile]
    parts[:, 4] = np.arange(len(tile)) - parts_before[tile]
    parts[:, 5] = num_parts[tile]
    parts[:, 6] = keys_per_part[tile]
    parts[:, 7] = (np.cumsum(num_rows) - num_rows)[tile]
    # Programs that run longest should begin first.
    keys_left = num_keys[tile] - parts[:, 4] * parts[:, 6]
    return parts[np.argsort(-np.minimum(keys_left, parts[:, 6]), kind="stable")]


@triton.jit
def leave_part(
    out,
    lse,
    out_ptr,
    part_out_ptr,
    part_lse_ptr,
    arrivals_ptr,
    first_row,
    part,
    num_parts,
    q_start,
    queries,
    num_queries,
    dims,
    head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Leave a part's result in memory. The program that arrives last stores the tile's result.

    out: `[queries, dims]` float32. lse: `[queries]`.
    """
    in_tile = queries < num_queries
    rows = ((first_row + part * num_queries + queries) * HEADS + head).to(tl.int64)
    mask = in_tile[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(part_out_ptr + rows[:, None] * HEAD_DIM + dims[None, :], out, mask=mask)
    tl.store(part_lse_ptr + rows, lse, mask=in_tile)
    # One thread counts, and what all threads have stored must be seen by whoever sees the count.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + first_row * HEADS + head, 1, sem="acq_rel")
    if arrived == num_parts - 1:
        tl.store(arrivals_ptr + first_row * HEADS + head, 0)  # for the next launch
        # In the order of the parts, whoever was last: the result is the same each time.
        largest = tl.full(lse.shape, float("-inf"), tl.float32)
        for index in range(num_parts):
            rows = ((first_row + index * num_queries + queries) * HEADS + head).to(tl.int64)
            part_lse = tl.load(part_lse_ptr + rows, mask=in_tile, other=0.0)
            largest = tl.maximum(largest, part_lse)
        out_rows = (q_start + queries).to(tl.int64) * HEADS + head
        SLICE: tl.constexpr = 16  # columns at a time; more would not fit into the registers
        for start in range(0, BLOCK_D, SLICE):
            columns = start + tl.arange(0, SLICE)
            slice_mask = in_tile[:, None] & (columns < HEAD_DIM)[None, :]
            summed = tl.zeros((lse.shape[0], SLICE), tl.float32)
            total = tl.zeros(lse.shape, tl.float32)
            for index in range(num_parts):
                rows = ((first_row + index * num_queries + queries) * HEADS + head).to(tl.int64)
                part_lse = tl.load(part_lse_ptr + rows, mask=in_tile, other=0.0)
                weight = tl.exp2(part_lse - largest)
                offsets = rows[:, None] * HEAD_DIM + columns[None, :]
                part_out = tl.load(part_out_ptr + offsets, mask=slice_mask, other=0.0)
                summed += part_out * weight[:, None]
                total += weight
            summed = (summed / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(
                out_ptr + out_rows[:, None] * HEAD_DIM + columns[None, :], summed, mask=slice_mask
            )
