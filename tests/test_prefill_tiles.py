"""The work list of prefill attention, and the kernel that takes its work from it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels import prefill_parts
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.prefill_config import PrefillConfig
from nanovllm.kernels.prefill_parts import cut_keys, make_arrivals
from nanovllm.kernels.prefill_tiles import (
    make_tiles,
    max_tiles,
    tiled_prefill,
    tiled_prefill_torch,
)
from nanovllm.kernels.torch_attention import varlen_prefill_torch

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


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5000)), min_size=1, max_size=6),
    padding=st.integers(0, 200),
    wanted=st.integers(1, 40),
)
def test_each_key_of_a_tile_is_in_exactly_one_part(
    batch: list[tuple[int, int]], padding: int, wanted: int
) -> None:
    num_new = np.array([new for new, _ in batch])
    num_total = np.array([new + earlier for new, earlier in batch])
    tiles = make_tiles(num_new, num_total, int(num_new.sum()) + padding, 128)
    parts = cut_keys(tiles, wanted)
    assert len(tiles) <= len(parts) <= max(len(tiles), wanted)
    keys: dict[tuple[int, ...], list[tuple[int, int]]] = {
        tuple(tile): [] for tile in tiles.tolist()
    }
    sizes = []
    rows: list[int] = []
    for *tile, part, num_parts, keys_per_part, first_row in parts.tolist():
        num_keys = tile[1] + tile[2]
        begin = part * keys_per_part
        end = min(begin + keys_per_part, num_keys)
        assert begin % prefill_parts.KEY_STEP == 0
        keys[tuple(tile)].append((begin, end))
        sizes.append(end - begin)
        if num_parts > 1:
            row = first_row + part * tile[1]
            rows += range(row, row + tile[1])
    for tile, ranges in keys.items():
        borders = sorted(ranges)
        assert [begin for begin, _ in borders[1:]] == [end for _, end in borders[:-1]]
        assert borders[0][0] == 0 and borders[-1][1] == tile[1] + tile[2]
        assert len(borders) == 1 or all(end > begin for begin, end in borders)
    assert sorted(rows) == [*range(len(rows))]  # no two parts leave their results in one place
    assert len(rows) <= prefill_parts.MAX_ROWS
    assert sizes == sorted(sizes, reverse=True)  # the programs that run longest begin first


def test_few_queries_behind_a_long_prefix_are_cut_and_many_are_not() -> None:
    def count(num_new: list[int], earlier: int, wanted: int) -> int:
        new = np.array(num_new)
        return len(cut_keys(make_tiles(new, new + earlier, sum(num_new), 128), wanted))

    assert count([16], 8192, 17) == 6
    assert count([16], 1024, 17) == 1  # combining would take what the parts save
    assert count([16] * 4, 8192, 17) == 16
    assert count([16] * 9, 8192, 17) == 9  # two parts each would be more than the GPU runs at once
    assert count([128], 8192, 17) == 3  # combining 128 queries takes longer
    assert count([200], 0, 17) == 2


@needs_triton
@pytest.mark.parametrize(
    "dtype, options",
    [(torch.float32, {}), (torch.float16, dict(window=150, softcap=2.0))],
    ids=["plain", "window-and-cap"],
)
def test_tiles_in_parts(dtype, options, monkeypatch) -> None:
    """The attention of whole tiles; twice, as the second launch finds what the first has left."""
    torch.manual_seed(0)
    monkeypatch.setattr(prefill_parts, "KEY_STEP", 64)
    monkeypatch.setattr(prefill_parts, "KEY_US", 10.0)  # even short tiles are cut
    heads, kv_heads, head_dim, block_size, padding = 2, 1, 16, 64, 7
    batch = [(3, 700), (20, 250), (5, 0), (1, 64)]
    num_new = np.array([new for new, _ in batch])
    num_total = np.array([new + earlier for new, earlier in batch])
    num_tokens = int(num_new.sum()) + padding
    config = PrefillConfig(16, 32, 4, 2)
    parts = cut_keys(make_tiles(num_new, num_total, num_tokens, config.block_m), 40)
    assert parts[:, 5].max() > 5 and parts[:, 5].min() == 1
    tiles = torch.zeros(len(parts) + 3, 8, dtype=torch.int32, device=DEVICE)
    tiles[: len(parts)] = torch.from_numpy(parts)
    q = torch.randn(num_tokens, heads, head_dim).to(DEVICE, dtype)
    caches = [torch.randn(44, block_size, kv_heads, head_dim).to(DEVICE, dtype) for _ in range(2)]
    tables = torch.randperm(44).int().view(4, 11).to(DEVICE)
    whole = tiled_prefill_torch(
        q.double(),
        *[cache.double() for cache in caches],
        torch.from_numpy(make_tiles(num_new, num_total, num_tokens, config.block_m)),
        tables,
        0.3,
        **options,
    )
    arrivals = make_arrivals(heads, q.device)
    for _ in range(2):
        out = tiled_prefill(
            q, *caches, tiles, tables, 0.3, **options, arrivals=arrivals, config=config
        )
        assert (out.double() - whole).abs().max() < TOLERANCE[dtype]
        assert not arrivals.any()
    assert not out[-padding:].any()


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
