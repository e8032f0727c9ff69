"""The work list of prefill attention, and the kernel that takes its work from it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.prefill_config import PrefillConfig
from nanovllm.kernels.prefill_tiles import (
    make_tiles,
    max_tiles,
    tiled_prefill,
    tiled_prefill_torch,
)
from nanovllm.kernels.varlen_prefill import varlen_prefill_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def tiles_of(batch: list[tuple[int, int]], padding: int, tile_rows: int) -> torch.Tensor:
    """The list of a batch of (new, earlier) tokens, with some rows behind it not in use."""
    num_new = torch.tensor([new for new, _ in batch]).numpy()
    num_total = torch.tensor([new + earlier for new, earlier in batch]).numpy()
    num_tokens = int(num_new.sum()) + padding
    made = torch.from_numpy(make_tiles(num_new, num_total, num_tokens, tile_rows))
    tiles = torch.zeros(max_tiles(num_tokens, len(batch) + 2, tile_rows), 4, dtype=torch.int32)
    assert len(made) <= len(tiles)
    tiles[: len(made)] = made
    return tiles.to(DEVICE)


# A sequence with the same tokens as the one before it has no new ones.
BATCHES = st.lists(
    st.tuples(st.one_of(st.just(0), st.integers(1, 40)), st.integers(0, 40)),
    min_size=1,
    max_size=6,
).filter(lambda batch: batch[0][0] > 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batch=BATCHES, padding=st.integers(0, 40), tile_rows=st.sampled_from([1, 2, 8, 16]))
def test_every_pair_is_in_exactly_one_tile(
    batch: list[tuple[int, int]], padding: int, tile_rows: int
) -> None:
    """Each pair of query row and key that attention must see, and no other; padding is in tiles,
    too.
    """
    expected = []
    row = 0
    for seq, (new, earlier) in enumerate(batch):
        for query in range(new):
            expected += [(row + query, seq, key) for key in range(earlier + query + 1)]
        row += new
    pairs = []
    rows = []
    num_keys = []
    for first_row, num_queries, position, seq in tiles_of(batch, padding, tile_rows).tolist():
        assert 0 <= num_queries <= tile_rows
        num_keys.append(position + num_queries)
        for query in range(num_queries):
            rows.append(first_row + query)
            pairs += [(first_row + query, seq, key) for key in range(position + query + 1)]
    assert sorted(pairs) == expected
    assert sorted(rows) == list(range(row + padding))
    assert num_keys == sorted(num_keys, reverse=True)  # the programs that run longest begin first


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batch=BATCHES, padding=st.integers(0, 200), tile_rows=st.sampled_from([1, 2, 8, 16]))
def test_there_is_room_for_every_batch(
    batch: list[tuple[int, int]], padding: int, tile_rows: int
) -> None:
    num_new = torch.tensor([new for new, _ in batch]).numpy()
    num_tokens = int(num_new.sum()) + padding
    tiles = make_tiles(num_new, num_new, num_tokens, tile_rows)
    assert len(tiles) <= max_tiles(num_tokens, len(batch), tile_rows)


def test_the_example_of_the_docstring() -> None:
    tiles = tiles_of([(3, 4), (2, 0)], 3, 2).tolist()[:6]
    assert tiles == [
        [2, 1, 6, 0],
        [0, 2, 4, 0],
        [3, 2, 0, 1],
        [5, 2, -2, 0],
        [7, 1, -1, 0],
        [0, 0, 0, 0],
    ]
    assert max_tiles(8, 2, 2) == 5  # so the list has no row to spare


@pytest.mark.parametrize(
    "prefill", [tiled_prefill_torch, pytest.param(tiled_prefill, marks=needs_triton)]
)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size, options",
    [
        (4, 2, 16, 16, {}),
        (3, 1, 24, 12, {}),  # blocks that tiles cross, and no power of two
        (4, 2, 16, 32, dict(window=21)),
        (4, 2, 16, 32, dict(softcap=0.5)),
        (2, 2, 32, 16, dict(window=5, softcap=2.0)),
    ],
    ids=["plain", "odd", "window", "softcap", "both"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_tiled_prefill(
    prefill, heads, kv_heads, head_dim, block_size, options, dtype, monkeypatch
) -> None:
    """What `varlen_prefill` computes of the same batch, for random lengths and block tables."""
    torch.manual_seed(0)
    empty = torch.empty
    # Fresh memory is NaN, so that an element that is not written shows.
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    batch = [(17, 0), (1, 70), (40, 33), (5, 5), (1, 0)]
    padding = 20
    num_new = [new for new, _ in batch]
    num_total = [new + earlier for new, earlier in batch]
    blocks_per_seq = -(-max(num_total) // block_size)
    num_blocks = len(batch) * blocks_per_seq + 1

    def randn(*shape):
        return torch.randn(*shape).to(DEVICE, dtype)

    qkv = randn(sum(num_new) + padding, heads + 2 * kv_heads, head_dim)
    q = qkv[:, :heads]  # of another stride than the result
    caches = [randn(num_blocks, block_size, kv_heads, head_dim) for _ in range(2)]
    blocks = torch.randperm(num_blocks - 1).int()[: len(batch) * blocks_per_seq]
    tables = blocks.view(len(batch), blocks_per_seq).to(DEVICE)
    for seq, length in enumerate(num_total):  # what nobody stored must not be looked at
        used = torch.arange(blocks_per_seq * block_size).view(blocks_per_seq, block_size) < length
        for cache in caches:
            cache[tables[seq].long()] = torch.where(
                used.to(DEVICE)[:, :, None, None], cache[tables[seq].long()], float("nan")
            )
        tables[seq, -(-length // block_size) :] = 10**6
    borders = [torch.tensor([0, *lens]).cumsum(0).int().to(DEVICE) for lens in (num_new, num_total)]
    expected = varlen_prefill_torch(
        q[: sum(num_new)].double(),
        None,
        None,
        *[cache.double().nan_to_num() for cache in caches],
        *borders,
        max(num_new),
        max(num_total),
        0.3,
        tables,
        **options,
    )
    config = PrefillConfig(16, 16, 4, 2)
    configured = {} if prefill is tiled_prefill_torch else {"config": config}
    tiles = tiles_of(batch, padding, config.block_m)
    # Column by column, as the engine's buffers have them, and row by row.
    for strided in (tables.t().contiguous().t(), tables):
        out = prefill(q, *caches, tiles, strided, 0.3, **options, **configured)
        assert out.shape == q.shape and out.is_contiguous()
        error = (out[: sum(num_new)].double() - expected).abs().max().item()
        assert error < TOLERANCE[dtype], error
        assert not out[sum(num_new) :].any()  # zeros, of padding
