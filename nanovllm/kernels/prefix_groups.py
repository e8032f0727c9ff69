"""Which sequences of a decode step share a prefix, and the work list of attention to it.

Sequences belong to one *group* if their block tables begin with the same blocks. Example, with
blocks of 256 tokens, of five sequences:

    sequence  block table
        0     7 8 9 20       0, 1, 3 and 4 share the blocks 7 and 8, which are 512 tokens
        1     7 8 9 21       (0, 1 and 4 share block 9, too: there is one level of groups only)
        2     30 31
        3     7 8 22
        4     7 8 9 23

The members of a group, times the query heads of a KV head, are the rows of *tiles*, and the prefix
is cut into *parts*. With 2 query heads a KV head, tiles of 4 rows, and parts of 256 keys:

    first_member  num_members  first_key  num_keys  part      members: 0 1 3 4
         0             2            0        256      0       sequences 0 and 1
         0             2          256        256      1
         2             2            0        256      0       sequences 3 and 4
         2             2          256        256      1
         0             0            0          0      0       not in use
"""

from dataclasses import dataclass, replace

import numpy as np

FIELDS = 5  # of a tile, as above


@dataclass(frozen=True, slots=True)
class CostModel:
    """What sharing saves, in tokens of K and V that a layer need not read; as measured."""

    step_cost: int  # of the kernels that attention has more of, whatever there is to share
    group_cost: int = 256  # of a group's own tiles, and of adding up their results
    # Reading a prefix once takes as long as reading it for so many members in the usual way: a tile
    # goes through more of it, one key after the other.
    members_to_outweigh: int = 3
    min_members: int = 4
    min_prefix: int = 256  # tokens

    def saving(self, num_members: np.ndarray, prefix_len: np.ndarray | int) -> np.ndarray:
        """The saving of groups; 0 for those that are too small to be one."""
        saved = (num_members - self.members_to_outweigh) * prefix_len - self.group_cost
        is_group = (num_members >= self.min_members) & (saved > 0)
        return saved * (is_group & (prefix_len >= self.min_prefix))


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a step."""

    members: np.ndarray  # rows of the step, one group after the other
    num_members: np.ndarray  # [groups]
    prefix_blocks: np.ndarray  # [groups]: so many blocks they share


def find_groups(
    block_tables: np.ndarray,
    table_rows: np.ndarray,
    num_full: np.ndarray,
    block_size: int,
    cost: CostModel,
) -> Groups | None:
    """Find the groups that save the most; None where sharing does not pay.

    block_tables: `[columns, rows]`, of all sequences, with any numbers behind a sequence's blocks.
    table_rows: `[n]`, of the sequences of the step.
    num_full: `[n]`: so many blocks of each may be shared, which are those before its newest token.
    """
    min_blocks = -(-cost.min_prefix // block_size)
    rows = np.flatnonzero(num_full >= min_blocks)
    least = cost.min_members
    if len(rows) < least:
        return None
    table_rows = table_rows[rows]
    # Nearly every step without groups ends here.
    blocks = np.sort(block_tables[min_blocks - 1].take(table_rows))
    if not (blocks[least - 1 :] == blocks[: 1 - least]).any():
        return None
    num_full = num_full[rows]
    tables = block_tables[: num_full.max()].take(table_rows, axis=1)
    leaders = _find_leaders(tables, num_full)
    depths = _choose_depths(leaders, block_size, cost)
    groups = _collect(tables, leaders, depths, block_size, cost)
    return None if groups is None else replace(groups, members=rows[groups.members])


def _find_leaders(tables: np.ndarray, num_full: np.ndarray) -> np.ndarray:
    """For each column and row the first row that has the same block there: `[columns, n]`."""
    columns, num_rows = tables.shape
    row_numbers = np.arange(num_rows)
    num_blocks = int(tables.max()) + 1
    # Behind its full blocks, a row has a block of its own number, which nobody shares.
    is_full = np.arange(columns)[:, None] < num_full
    blocks = np.where(is_full, tables, num_blocks + row_numbers)
    first_holder = np.empty(num_blocks + num_rows, np.int32)
    # Of several rows with the same block, the one that is assigned last stays: the first row.
    first_holder[blocks[:, ::-1]] = row_numbers[::-1]
    return first_holder.take(blocks)


def _choose_depths(leaders: np.ndarray, block_size: int, cost: CostModel) -> np.ndarray:
    """How many blocks the group of each row shares; 0: it is in none. `[n]`.

    From the deepest column up: do those who share the blocks so far save more as one group, or as
    the groups that were found among them, which share more?
    """
    num_rows = leaders.shape[1]
    depths = np.zeros(num_rows, np.int64)
    best: np.ndarray = np.zeros(num_rows)  # of a leader: what the groups among its followers save
    # Only where the next column divides the rows in another way, and at the deepest.
    divides = (leaders[1:] != leaders[:-1]).any(axis=1)
    for column in reversed(np.flatnonzero(np.append(divides, True))):
        leader = leaders[column]
        num_members = np.bincount(leader, minlength=num_rows)
        saved = cost.saving(num_members, int(column + 1) * block_size)
        best = np.bincount(leader, weights=best, minlength=num_rows)
        is_better = saved > best
        if is_better.any():
            best = np.maximum(saved, best)
            depths[is_better[leader]] = column + 1
    return depths


def _collect(
    tables: np.ndarray, leaders: np.ndarray, depths: np.ndarray, block_size: int, cost: CostModel
) -> Groups | None:
    """The groups of these depths, without rows whose block tables differ from their leaders'."""
    num_rows = len(depths)
    leader = leaders[depths - 1, np.arange(num_rows)]  # of any depth, where there is no group
    # The same block in the last column does not prove that those before it are the same: a sequence
    # may have its own copy of a block, and share one after it.
    is_behind = np.arange(len(tables))[:, None] >= depths
    is_equal = (is_behind | (tables == tables.take(leader, axis=1))).all(axis=0)
    is_member = is_equal & (depths > 0)
    num_members = np.bincount(leader[is_member], minlength=num_rows)
    saved = cost.saving(num_members, depths * block_size)
    if saved.sum() <= cost.step_cost:
        return None
    members = np.flatnonzero(is_member & (saved[leader] > 0))
    group_leaders = np.flatnonzero(saved)
    return Groups(
        members=members[np.argsort(leader[members], kind="stable")],
        num_members=num_members[group_leaders],
        prefix_blocks=depths[group_leaders],
    )


@dataclass(frozen=True, slots=True)
class TileLimits:
    """How groups are cut into tiles."""

    members: int  # of a tile, at most
    key_step: int  # the keys of a part are a multiple of it, but in the last part
    min_keys: int  # of a part; with fewer, adding the parts takes longer than their tiles
    max_parts: int  # of a prefix
    num_tiles: int  # so many should there be, to occupy the GPU


def make_prefix_tiles(
    groups: Groups, block_size: int, limits: TileLimits
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the groups into tiles, `[tiles, 5]` int32, as in the example above.

    Also return the number of parts of each group's prefix.
    """
    prefix_lens = groups.prefix_blocks * block_size
    row_tiles = -(-groups.num_members // limits.members)
    keys_in_part = max((row_tiles * prefix_lens).sum() / limits.num_tiles, limits.min_keys)
    keys_in_part = np.maximum(keys_in_part, prefix_lens / limits.max_parts)  # of each group
    steps_in_part = np.ceil(keys_in_part / limits.key_step).astype(np.int64)
    keys_in_part = steps_in_part * limits.key_step
    num_parts = -(-prefix_lens // keys_in_part)

    # A tile for each group, each part of its prefix and each tile of its rows.
    tiles_of_group = row_tiles * num_parts
    group = np.repeat(np.arange(len(tiles_of_group)), tiles_of_group)
    number = np.arange(len(group)) - (np.cumsum(tiles_of_group) - tiles_of_group)[group]
    row_tile, part = np.divmod(number, num_parts[group])
    first_in_group = row_tile * limits.members
    first_key = part * keys_in_part[group]
    group_starts = np.cumsum(groups.num_members) - groups.num_members
    tiles = np.empty((len(group), FIELDS), np.int32)
    tiles[:, 0] = group_starts[group] + first_in_group
    tiles[:, 1] = np.minimum(groups.num_members[group] - first_in_group, limits.members)
    tiles[:, 2] = first_key
    tiles[:, 3] = np.minimum(prefix_lens[group] - first_key, keys_in_part[group])
    tiles[:, 4] = part
    return tiles, num_parts
