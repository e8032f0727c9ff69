"""Shared prefixes in decode: which sequences form groups, the work list, and the kernels."""

import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_backend import TRITON, AttentionOptions
from nanovllm.kernels.decode_config import DecodeConfig
from nanovllm.kernels.paged_decode import paged_decode_torch
from nanovllm.kernels.prefix_groups import (
    CostModel,
    Groups,
    TileLimits,
    find_groups,
    make_prefix_tiles,
)
from nanovllm.kernels.prefix_sharing import PrefixSharing
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.shared_prefix import (
    PrefixConfig,
    shared_prefix_decode,
    shared_prefix_decode_torch,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


# --- which sequences form groups, and the work list -----------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The block tables of a decode step."""

    tables: np.ndarray  # [columns, rows of the tables]
    table_rows: np.ndarray  # [n]
    context_lens: np.ndarray  # [n]
    block_size: int

    @property
    def num_full(self) -> np.ndarray:
        return (self.context_lens - 1) // self.block_size

    def table_of(self, row: int) -> list[int]:
        """The blocks before the one with the newest token."""
        return self.tables[: self.num_full[row], self.table_rows[row]].tolist()


def make_batch(r: random.Random) -> Batch:
    """Sequences that go on from some block of an earlier one, or, seldom, share a later block only.

    Behind a context, the tables hold what an earlier sequence had there.
    """
    block_size = r.choice([16, 48, 100, 256])
    num_seqs = r.randint(4, 30)
    columns = r.randint(1, 7)
    num_ancestors = r.choice([1, 3, 30])  # that a sequence may go on from
    tables = np.zeros((columns, num_seqs), np.int32)
    fresh = itertools.count(1)
    for row in range(num_seqs):
        tables[:, row] = [next(fresh) for _ in range(columns)]
        if row and r.random() < 0.95:
            parent = r.randrange(min(row, num_ancestors))
            depth = r.randint(0, columns)
            tables[:depth, row] = tables[:depth, parent]
            if depth and r.random() < 0.1:
                tables[r.randrange(depth), row] = next(fresh)
    table_rows = np.array(r.sample(range(num_seqs), r.randint(3, num_seqs)))
    longest = columns * block_size
    context_lens = np.array(
        [longest if r.random() < 0.7 else r.randint(1, longest) for _ in table_rows]
    )
    return Batch(tables, table_rows, context_lens, block_size)


BATCHES = st.integers(0, 10**6).map(random.Random).map(make_batch)


def best_saving(tables: list[list[int]], depth: int, block_size: int, cost: CostModel) -> int:
    """The most that groups can save, of sequences that share their first `depth` blocks."""
    together = int(cost.saving(np.array(len(tables)), depth * block_size))
    branches: dict[int, list[list[int]]] = {}
    for table in tables:
        if len(table) > depth:
            branches.setdefault(table[depth], []).append(table)
    apart = [
        best_saving(branch, depth + 1, block_size, cost)
        for branch in branches.values()
        if len(branch) >= cost.min_members
    ]
    return max(together, sum(apart))


COSTS = [
    CostModel(0, 0, members_to_outweigh=1, min_prefix=1),
    CostModel(0, 60, members_to_outweigh=2, min_members=3, min_prefix=90),
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(batch=BATCHES, cost=st.sampled_from(COSTS))
def test_groups_save_as_much_as_any(batch: Batch, cost: CostModel) -> None:
    tables = [batch.table_of(row) for row in range(len(batch.table_rows))]
    # A sequence with a copy of its own in front of a shared block may be left out of a group.
    parents: dict[int, set[tuple[int, ...]]] = {}
    for table in tables:
        for column, block in enumerate(table):
            parents.setdefault(block, set()).add(tuple(table[:column]))
    has_copies = any(len(prefixes) > 1 for prefixes in parents.values())
    groups = find_groups(batch.tables, batch.table_rows, batch.num_full, batch.block_size, cost)
    saved = 0
    if groups is not None:
        prefix_lens = groups.prefix_blocks * batch.block_size
        saved = int(cost.saving(groups.num_members, prefix_lens).sum())
    best = best_saving(tables, 0, batch.block_size, cost)
    assert saved <= best if has_copies else saved == best


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    batch=BATCHES,
    cost=st.sampled_from(COSTS),
    members_per_tile=st.sampled_from([1, 3, 32]),
    key_step=st.sampled_from([16, 64]),
    num_tiles=st.sampled_from([1, 5, 40]),
    max_parts=st.sampled_from([1, 4, 32]),
)
def test_every_pair_is_in_exactly_one_tile(
    batch: Batch,
    cost: CostModel,
    members_per_tile: int,
    key_step: int,
    num_tiles: int,
    max_parts: int,
) -> None:
    """Each pair of a sequence and a key, in a tile of its group or in the rest of its context."""
    groups = find_groups(batch.tables, batch.table_rows, batch.num_full, batch.block_size, cost)
    if groups is None:
        return
    limits = TileLimits(members_per_tile, key_step, 1, max_parts, num_tiles)
    tiles, num_parts = make_prefix_tiles(groups, batch.block_size, limits)
    num_seqs = len(batch.table_rows)
    times_seen = np.zeros((num_seqs, batch.tables.shape[0] * batch.block_size), int)
    parts_of = [[] for _ in range(num_seqs)]
    for first_member, num_members, first_key, num_keys, part in tiles.tolist():
        assert 1 <= num_members <= members_per_tile and num_keys > 0 and 0 <= part < max_parts
        assert first_key % key_step == 0
        members = groups.members[first_member : first_member + num_members]
        columns = np.arange(first_key, first_key + num_keys) // batch.block_size
        for row in members.tolist():
            times_seen[row, first_key : first_key + num_keys] += 1
            parts_of[row].append(part)
            # The kernel reads the first member's blocks.
            own = batch.tables[columns, batch.table_rows[row]]
            assert np.array_equal(own, batch.tables[columns, batch.table_rows[members[0]]])
    prefix_lens = np.zeros(num_seqs, int)
    prefix_lens[groups.members] = np.repeat(
        groups.prefix_blocks * batch.block_size, groups.num_members
    )
    all_parts = np.zeros(num_seqs, int)
    all_parts[groups.members] = np.repeat(num_parts, groups.num_members)
    for row, context_len in enumerate(batch.context_lens.tolist()):
        assert prefix_lens[row] < context_len  # the newest token is never in a prefix
        times_seen[row, prefix_lens[row] : context_len] += 1
        assert (times_seen[row, :context_len] == 1).all()
        assert not times_seen[row, context_len:].any()
        assert sorted(parts_of[row]) == list(range(all_parts[row]))
    assert len({*groups.members.tolist()}) == len(groups.members)


def test_the_example_of_prefix_groups() -> None:
    """The one in the docstring of prefix_groups.py."""
    own = iter(range(100, 200))
    tables = [[7, 8, 9, 20], [7, 8, 9, 21], [30, 31], [7, 8, 22], [7, 8, 9, 23]]
    padded = np.array([table + [next(own)] * (5 - len(table)) for table in tables])
    num_full = np.array([len(table) for table in tables])
    cost = CostModel(step_cost=0, group_cost=0)
    groups = find_groups(padded.T, np.arange(5), num_full, 256, cost)
    assert groups is not None
    assert groups.members.tolist() == [0, 1, 3, 4]
    limits = TileLimits(members=2, key_step=64, min_keys=64, max_parts=8, num_tiles=4)
    tiles, num_parts = make_prefix_tiles(groups, 256, limits)
    assert tiles.tolist() == [
        [0, 2, 0, 256, 0],
        [0, 2, 256, 256, 1],
        [2, 2, 0, 256, 0],
        [2, 2, 256, 256, 1],
    ]
    assert num_parts.tolist() == [2]


def test_groups_that_do_not_pay_are_none() -> None:
    """Too few members, too short a prefix, or less to save than the step costs."""
    tables = np.array([[1, 2, own] for own in range(10, 18)]).T
    rows = np.arange(8)

    def find(members: int, num_full: int, step_cost: int, block_size: int = 256) -> Groups | None:
        full = np.full(members, num_full)
        return find_groups(tables, rows[:members], full, block_size, CostModel(step_cost, 50))

    saved = (8 - 3) * 512 - 50
    assert find(8, 2, step_cost=saved - 1) is not None
    assert find(8, 2, step_cost=saved) is None
    assert find(4, 1, step_cost=0) is not None
    assert find(3, 1, step_cost=0) is None
    assert find(8, 0, step_cost=0) is None
    assert find(8, 2, step_cost=0, block_size=128) is not None
    assert find(8, 2, step_cost=0, block_size=127) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6))
def test_what_a_graph_reads(seed: int) -> None:
    """There is room for every batch, and nothing that an earlier step has left is read."""
    r = random.Random(seed)
    kv_heads = r.choice([1, 2, 8])
    layer = SimpleNamespace(
        num_heads=kv_heads * r.choice([1, 2, 7, 64]),
        num_kv_heads=kv_heads,
        head_dim=128,
        options=AttentionOptions(scale=1.0),
        backend=TRITON,
    )
    config = SimpleNamespace(
        max_num_seqs=r.choice([4, 9, 256]),
        max_model_len=4096,
        kvcache_block_size=r.choice([16, 48, 256]),
        dtype=r.choice([torch.bfloat16, torch.float32]),
        kv_cache_dtype=torch.bfloat16,
        enforce_eager=False,
    )
    limits = (r.choice([1, 20, 132]), 0)
    with patch("nanovllm.kernels.prefix_sharing.device_limits", lambda device: limits):
        sharing = PrefixSharing(config, [layer], torch.device("cpu"))  # type: ignore
    sharing.numbers.fill_(10**6)
    size = r.randint(4, config.max_num_seqs)
    largest = r.choice([4, 9, 256])
    num_members = []
    while sum(num_members) + 4 <= size and (not num_members or r.random() < 0.98):
        num_members.append(min(r.randint(4, max(4, largest)), size - sum(num_members)))
    rows = r.sample(range(size), sum(num_members))
    groups = Groups(
        members=np.array(rows),
        num_members=np.array(num_members),
        prefix_blocks=np.array([r.randint(1, 60) for _ in num_members]),
    )
    sharing.groups = groups
    sharing.upload(size)
    context_lens = torch.full((size,), 10**5, dtype=torch.int32)
    sent = sharing.on_device(size, context_lens)
    prefix_lens = (groups.prefix_blocks * config.kvcache_block_size).repeat(num_members)
    assert sent.members[: len(rows)].tolist() == rows
    assert sent.prefix_lens[rows].tolist() == prefix_lens.tolist()
    assert int(sent.prefix_lens.sum()) == prefix_lens.sum()
    assert torch.equal(sent.suffix_lens, context_lens - sent.prefix_lens)
    assert int(sent.num_parts[rows].min()) >= 1 and int(sent.num_parts.max()) <= sent.max_parts
    # Together, the tiles hold each member's prefix once; those that are not in use hold no keys.
    _, num_in_tile, _, num_keys, parts = sent.tiles.T
    assert int((num_in_tile * num_keys).sum()) == prefix_lens.sum()
    assert int(parts.max()) == int(sent.num_parts.max()) - 1


@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 64), (torch.float32, 16)])
def test_a_member_fits_into_a_tile(dtype: torch.dtype, most: int) -> None:
    """With more query heads a KV head than a tile has rows, nothing is shared."""
    config = SimpleNamespace(
        max_num_seqs=256,
        max_model_len=4096,
        kvcache_block_size=256,
        dtype=dtype,
        kv_cache_dtype=dtype,
        enforce_eager=False,
    )
    for group in (most, 2 * most):
        layer = SimpleNamespace(
            num_heads=group,
            num_kv_heads=1,
            head_dim=128,
            options=AttentionOptions(scale=1.0),
            backend=TRITON,
        )
        with patch("nanovllm.kernels.prefix_sharing.device_limits", lambda device: (132, 0)):
            sharing = PrefixSharing(config, [layer], torch.device("cpu"))  # type: ignore
        assert sharing.is_on == (group == most)


# --- the kernels ----------------------------------------------------------------------------------


def upload(
    groups: Groups, context_lens: list[int], block_size: int, limits: TileLimits
) -> SharedPrefixes:
    """The groups as the kernels take them, with some tiles that are not in use."""
    tiles, num_parts = make_prefix_tiles(groups, block_size, limits)
    num_seqs = len(context_lens)
    fields = {name: np.zeros(num_seqs, np.int32) for name in ("members", "lens", "parts")}
    fields["members"][: len(groups.members)] = groups.members
    fields["lens"][groups.members] = np.repeat(
        groups.prefix_blocks * block_size, groups.num_members
    )
    fields["parts"][groups.members] = np.repeat(num_parts, groups.num_members)
    on_device = {name: torch.from_numpy(values).to(DEVICE) for name, values in fields.items()}
    all_tiles = torch.zeros(len(tiles) + 2, 5, dtype=torch.int32)
    all_tiles[: len(tiles)] = torch.from_numpy(tiles)
    return SharedPrefixes(
        tiles=all_tiles.to(DEVICE),
        members=on_device["members"],
        prefix_lens=on_device["lens"],
        num_parts=on_device["parts"],
        suffix_lens=torch.tensor(context_lens, device=DEVICE).int() - on_device["lens"],
        max_parts=limits.max_parts,
    )


@pytest.mark.parametrize(
    "decode", [shared_prefix_decode_torch, pytest.param(shared_prefix_decode, marks=needs_triton)]
)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size, splits, softcap, dtype",
    [
        (4, 2, 16, 16, 1, None, torch.float32),
        (4, 2, 16, 16, 1, None, torch.float16),
        (3, 1, 24, 12, 1, None, torch.float16),  # blocks that tiles cross, and no power of two
        (4, 2, 16, 16, 4, None, torch.float16),
        (5, 1, 32, 32, 2, 2.0, torch.float32),
    ],
    ids=["fp32", "fp16", "odd", "splits", "softcap"],
)
def test_shared_prefix_decode(
    decode, heads, kv_heads, head_dim, block_size, splits, softcap, dtype, monkeypatch
) -> None:
    """What `paged_decode` computes of the same batch."""
    torch.manual_seed(0)
    empty = torch.empty
    # Fresh memory is NaN, so that an element that is not written shows.
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    groups = Groups(
        members=np.array([1, 3, 4, 6, 7, 9, 0, 2, 5, 8]),
        num_members=np.array([6, 4]),
        prefix_blocks=np.array([5, 3]),
    )
    suffix_lens = [1, 2, 30, 17, block_size, 1, 5, 40, 3, 2, 130, 0]  # the last two are in no group
    shared = np.zeros(12, np.int64)
    shared[groups.members] = np.repeat(groups.prefix_blocks, groups.num_members)
    context_lens = [int(s) * block_size + n for s, n in zip(shared, suffix_lens, strict=True)]
    columns = -(-max(context_lens) // block_size) + 1
    num_blocks = 12 * columns
    tables = torch.randperm(num_blocks).int().view(12, columns)
    for members, depth in ((groups.members[:6], 5), (groups.members[6:], 3)):
        tables[members, :depth] = tables[members[0], :depth]

    def randn(*shape):
        return torch.randn(*shape).to(DEVICE, dtype)

    q = randn(12, heads + 2 * kv_heads, head_dim)[:, :heads]
    caches = [randn(num_blocks, block_size, kv_heads, head_dim) for _ in range(2)]
    stored = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    for seq, length in enumerate(context_lens):
        positions = torch.arange(length)
        stored[tables[seq, positions // block_size].long(), positions % block_size] = True
        tables[seq, -(-length // block_size) :] = 10**6
    tables[11] = 0
    for cache in caches:  # what nobody stored must not be looked at
        cache[~stored.to(DEVICE)] = float("nan")
    tables = tables.to(DEVICE)
    lens = torch.tensor(context_lens, device=DEVICE).int()
    expected = paged_decode_torch(
        q.double(),
        *[cache.double().nan_to_num() for cache in caches],
        lens,
        tables.clamp(max=num_blocks - 1),
        0.3,
        softcap=softcap,
    )
    config = PrefixConfig(16, 16, 4, 2)
    options: dict[str, Any] = {}
    if decode is shared_prefix_decode:
        options = dict(config=DecodeConfig(16, splits), tiles=config)
    members_per_tile = config.block_m // (heads // kv_heads)
    # Column by column, as the engine's buffers have them, and row by row.
    for num_tiles, strided in ((1, tables), (6, tables.t().contiguous().t())):
        limits = TileLimits(members_per_tile, config.block_n, 1, 4, num_tiles)
        prefixes = upload(groups, context_lens, block_size, limits)
        out = decode(q, *caches, prefixes, strided, 0.3, softcap=softcap, **options)
        assert out.shape == q.shape and out.is_contiguous()
        error = (out.double() - expected).abs().max().item()
        assert error < TOLERANCE[dtype], error
        assert not out[11].any()
