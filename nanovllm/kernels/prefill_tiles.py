"""Prefill attention from a work list, for CUDA graphs: another batch is another list.

A graph fixes the launch grid, and so the grid cannot be made of the batch's sequences and lengths.
Instead each program takes a *tile* from a list: up to `tile_rows` consecutive new tokens of one
sequence, the queries of the tile. Example, of tiles of 2 queries, a step padded to 8 tokens, and a
list with room for 6 tiles. Sequence 0 computes its tokens 4 to 6; the first 4 were in the cache.
Sequence 1 computes tokens 0 and 1.

    first_row  num_queries  position  sequence
        2           1          6         0      query 6 of sequence 0 sees the keys 0 to 6
        0           2          4         0      queries 4 and 5: keys 0 to 4, and 0 to 5
        3           2          0         1
        5           2         -2         0      padding sees no keys: its result is zeros
        7           1         -1         0
        0           0          0         0      not in use: the program returns at once

Tiles that see the most keys come first, since programs that run longest should begin first. All
keys are read from the paged cache, where the new ones already are: so nothing depends on whether
any earlier ones are.
"""

import numpy as np
from torch import Tensor

from nanovllm.kernels.fp8_cache import read_slots
from nanovllm.kernels.prefill_config import PrefillConfig, prefill_config
from nanovllm.kernels.prefill_parts import PART_FIELDS, PartResults
from nanovllm.kernels.torch_attention import causal_mask, masked_attention
from nanovllm.kernels.varlen_prefill import launch_prefill

FIELDS = 4  # of a tile, as above


def max_tiles(num_tokens: int, max_seqs: int, tile_rows: int) -> int:
    """Return the most tiles that a step of `num_tokens`, with padding, can be cut into."""
    # Each sequence, and the padding, may leave its last tile with a single query.
    num_partial = min(max_seqs + 1, num_tokens)
    return num_partial + (num_tokens - num_partial) // tile_rows


def make_tiles(
    num_new: np.ndarray, num_total: np.ndarray, num_tokens: int, tile_rows: int
) -> np.ndarray:
    """Cut a step into tiles: `[tiles, 4]` int32, as in the example above.

    num_new, num_total: `[n]`, the tokens of each sequence that the step computes, and these with
        the earlier ones.
    num_tokens: of the step, with padding behind the last sequence.
    """
    num_padding = num_tokens - num_new.sum()
    # The padding is one more sequence, as far as the cutting is concerned.
    lengths = np.append(num_new, num_padding)
    earlier = np.append(num_total - num_new, 0)
    num_tiles = -(-lengths // tile_rows)
    seqs = np.repeat(np.arange(len(lengths)), num_tiles)
    tiles_before = np.cumsum(num_tiles) - num_tiles  # those of the sequences before
    first_query = (np.arange(len(seqs)) - tiles_before[seqs]) * tile_rows
    tiles = np.empty((len(seqs), FIELDS), np.int32)
    tiles[:, 0] = (np.cumsum(lengths) - lengths)[seqs] + first_query
    tiles[:, 1] = np.minimum(lengths[seqs] - first_query, tile_rows)
    tiles[:, 2] = earlier[seqs] + first_query
    tiles[:, 3] = seqs
    is_padding = seqs == len(num_new)
    tiles[is_padding, 2] = -tiles[is_padding, 1]
    tiles[is_padding, 3] = 0
    num_keys = tiles[:, 1] + tiles[:, 2]
    return tiles[np.argsort(-num_keys, kind="stable")]


def tiled_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: float | None = None,
    arrivals: Tensor | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Return causal attention of the queries in `tiles`: a tensor like q, contiguous.

    The launch does not depend on the contents of `tiles` and `block_tables`. Rows of q that are in
    no tile have no result.

    q: `[num_tokens, heads, head_dim]`; it may be a slice of the QKV output.
    k_cache, v_cache: as in `paged_decode`.
    tiles: `[max_tiles, 4]` int32, contiguous, of `make_tiles` with `prefill_config`'s block_m, and
        zeros behind them. With `arrivals`: `[max_tiles, 8]`, of `cut_keys`.
    block_tables: `[max_seqs, max_blocks]` int32, of any strides; entries past the last key of a
        sequence are never used.
    scale, window, softcap, v_scale: as in `varlen_prefill`.
    arrivals: of `make_arrivals`, for tiles that may have parts; None: all are whole.
    config: overrides `prefill_config`, for tests and tuning.
    """
    assert tiles.is_contiguous()
    assert tiles.shape[1] == (FIELDS if arrivals is None else PART_FIELDS)
    block_size, kv_heads, head_dim = k_cache.shape[1:]
    config = config or prefill_config(head_dim, q.dtype, q.device, block_size)
    return launch_prefill(
        q,
        k_cache.view(-1, kv_heads, head_dim),
        v_cache.view(-1, kv_heads, head_dim),
        grid=(q.shape[1], len(tiles)),
        tiles=tiles,
        parts=None if arrivals is None else PartResults.make(q, arrivals),
        block_tables=block_tables,
        block_size=block_size,
        scale=scale,
        window=window,
        softcap=softcap,
        v_scale=v_scale,
        config=config,
    )


def tiled_prefill_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tiles: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: float | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """`tiled_prefill` in PyTorch, one tile at a time: the reference. All tiles are whole to it."""
    block_size, kv_heads = k_cache.shape[1:3]
    group = q.shape[1] // kv_heads
    out = q.new_zeros(q.shape)
    for first_row, num_queries, position, seq, *part in tiles.tolist():
        num_keys = position + num_queries
        if num_keys == 0 or (part and part[0] > 0):
            continue
        rows = slice(first_row, first_row + num_queries)
        blocks = block_tables[seq, : -(-num_keys // block_size)].long()
        # [batch, heads, tokens, head_dim], with as many KV heads as query heads
        queries = q[rows].transpose(0, 1)[None]
        keys = read_slots(k_cache, blocks, q.dtype).flatten(0, 1)[:num_keys].transpose(0, 1)[None]
        values = read_slots(v_cache, blocks, q.dtype).flatten(0, 1)[:num_keys].transpose(0, 1)[None]
        keys = keys.repeat_interleave(group, dim=1)
        values = values.repeat_interleave(group, dim=1)
        mask = causal_mask(num_queries, num_keys, window, q.device)
        is_causal = mask is None and num_queries > 1
        attended = masked_attention(queries, keys, values, mask, scale, softcap, is_causal)
        out[rows] = attended[0].transpose(0, 1)
    return out if v_scale is None else out * v_scale
