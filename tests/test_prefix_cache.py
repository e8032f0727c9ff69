"""BlockManager alone: what is found in the prefix cache, what is evicted first, what is touched."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import xxhash
from conftest import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

BLOCK_SIZE = 4


def admit(manager: BlockManager, token_ids: list[int]) -> Sequence:
    """Allocate and "compute" a whole prompt."""
    seq = make_sequence(token_ids)
    assert manager.can_allocate(seq)
    manager.allocate(seq)
    assert seq.schedule(seq.num_tokens - seq.num_computed_tokens)
    manager.register(seq)
    return seq


def decode(manager: BlockManager, seq: Sequence) -> None:
    """Schedule the step that computes the newest token, be it known or not."""
    assert manager.can_append(seq)
    manager.may_append(seq)
    assert seq.schedule(1)
    manager.register(seq)


def append(manager: BlockManager, seq: Sequence, token_id: int) -> None:
    """Learn the sampled token, then schedule the decode step that computes it."""
    seq.token_ids.append(token_id)
    decode(manager, seq)


def prompt(first: int, num_blocks: int, rest: int = 1) -> list[int]:
    """`num_blocks` whole blocks and `rest` tokens more; no other `first` shares a block with it."""
    return list(range(first * 100, first * 100 + num_blocks * BLOCK_SIZE + rest))


def test_a_hash_is_xxh64_of_the_previous_hash_and_the_tokens() -> None:
    first = xxhash.xxh64(b"".join(t.to_bytes(4, "little") for t in [1, 2, 70_000, 4])).intdigest()
    assert BlockManager.compute_hash([1, 2, 70_000, 4]) == first
    data = first.to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in [5, 6, 7, 8])
    assert BlockManager.compute_hash([5, 6, 7, 8], first) == xxhash.xxh64(data).intdigest()


def test_only_full_blocks_are_shared_and_one_token_is_left_to_compute() -> None:
    manager = BlockManager(20, BLOCK_SIZE)
    tokens = prompt(1, 3, rest=0)
    first = admit(manager, tokens)
    for length, hits in [(3, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2), (11, 2), (12, 2)]:
        seq = make_sequence(tokens[:length])
        manager.allocate(seq)
        assert seq.num_cached_tokens == seq.num_computed_tokens == hits * BLOCK_SIZE
        assert seq.block_table[:hits] == first.block_table[:hits]
        assert not set(seq.block_table[hits:]) & set(first.block_table)
        manager.deallocate(seq)
    longer = make_sequence(tokens + [1])
    manager.allocate(longer)
    assert longer.block_table[:3] == first.block_table and longer.num_cached_tokens == 12


def test_equal_tokens_after_another_prefix_are_not_shared() -> None:
    manager = BlockManager(20, BLOCK_SIZE)
    first = admit(manager, [1, 1, 1, 1, 5, 6, 7, 8, 9])
    second = admit(manager, [2, 2, 2, 2, 5, 6, 7, 8, 9])
    third = admit(manager, [5, 6, 7, 8, 9])
    assert not set(first.block_table) & set(second.block_table)
    assert not set(third.block_table) & set(first.block_table + second.block_table)


def test_nothing_is_shared_before_it_is_registered() -> None:
    manager = BlockManager(20, BLOCK_SIZE)
    tokens = prompt(1, 3)
    first = make_sequence(tokens)
    manager.allocate(first)
    assert not first.schedule(6)  # a chunk: one full block, and half of the second
    manager.register(first)
    second = make_sequence(tokens)
    manager.allocate(second)
    assert second.num_cached_tokens == 4
    assert first.schedule(7)
    manager.register(first)
    third = make_sequence(tokens)
    manager.allocate(third)
    assert third.num_cached_tokens == 12 and third.block_table[:3] == first.block_table[:3]


def test_blocks_filled_by_decoding_are_shared() -> None:
    manager = BlockManager(20, BLOCK_SIZE)
    seq = admit(manager, [1, 2, 3])
    for token in [4, 5, 6, 7]:
        append(manager, seq, token)
    other = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])
    manager.allocate(other)
    assert other.num_cached_tokens == 4
    append(manager, seq, 8)
    manager.deallocate(other)
    manager.allocate(other)
    assert other.num_cached_tokens == 8


def test_blocks_are_shared_when_their_tokens_are_known_and_their_computation_is_launched() -> None:
    """Steps run ahead of the tokens: neither alone is enough, in whichever order they come."""
    manager = BlockManager(20, BLOCK_SIZE)
    other = make_sequence([1, 2, 3, 4, 5, 6, 7, 8, 9])

    def num_shared() -> int:
        manager.allocate(other)
        shared = other.num_cached_tokens
        manager.deallocate(other)
        return shared

    seq = admit(manager, [1, 2, 3])
    decode(manager, seq)  # computes position 3, whose token is not known yet
    decode(manager, seq)  # and position 4
    assert (seq.num_computed_tokens, seq.num_tokens, len(seq.token_ids)) == (5, 6, 3)
    assert num_shared() == 0
    seq.token_ids.append(4)
    manager.register(seq)
    assert num_shared() == 4
    seq.token_ids += [5, 6, 7, 8]  # known, but position 7 is not computed
    seq.num_tokens = 8
    seq.schedule(2)
    manager.register(seq)
    assert seq.num_computed_tokens == 7 and num_shared() == 4
    seq.schedule(1)
    manager.register(seq)
    assert num_shared() == 8


def test_least_recently_freed_goes_first_and_the_tail_before_the_head() -> None:
    manager = BlockManager(9, BLOCK_SIZE)
    old, new = admit(manager, prompt(1, 2)), admit(manager, prompt(2, 2))
    old_table, new_table = list(old.block_table), list(new.block_table)
    manager.deallocate(old)
    manager.deallocate(new)
    third = make_sequence(prompt(3, 8))
    manager.allocate(third)  # takes all: first the five of which nothing can be reused
    assert set(third.block_table[:2]) == {old_table[2], new_table[2]}
    assert third.block_table[5:] == old_table[1::-1] + new_table[1::-1]


def test_a_hit_on_a_freed_block_takes_it_out_of_the_queue() -> None:
    manager = BlockManager(6, BLOCK_SIZE)
    old, new = admit(manager, prompt(1, 2)), admit(manager, prompt(2, 2))
    old_table, new_table = list(old.block_table), list(new.block_table)
    manager.deallocate(old)
    manager.deallocate(new)
    again = admit(manager, prompt(1, 2))
    assert again.num_cached_tokens == 8 and again.block_table == [*old_table[:2], new_table[2]]
    manager.deallocate(again)  # used again, so now `new` is the older one
    third = admit(manager, prompt(3, 2))
    assert third.block_table == [new_table[2], old_table[2], new_table[1]]
    assert admit(manager, prompt(1, 2)).num_cached_tokens == 8


def test_the_head_of_an_evicted_tail_is_still_found() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    old = admit(manager, prompt(1, 3))
    manager.deallocate(old)
    manager.deallocate(admit(manager, prompt(2, 1)))  # evicts the partial block and the third
    assert admit(manager, prompt(1, 2)).num_cached_tokens == 8


def test_a_block_whose_head_was_evicted_is_not_found() -> None:
    manager = BlockManager(7, BLOCK_SIZE)
    owner = admit(manager, prompt(1, 2))
    head, second, _ = owner.block_table
    manager.deallocate(owner)
    del manager.free_block_ids[second]  # as if somebody else held it, so that it outlives its head
    manager.blocks[second].ref_count += 1
    other = admit(manager, prompt(2, 5))
    assert head in other.block_table
    manager.deallocate(other)
    again = admit(manager, prompt(1, 2))
    assert again.num_cached_tokens == 0 and second not in again.block_table


def test_can_allocate_counts_hits_on_free_blocks_once() -> None:
    manager = BlockManager(4, BLOCK_SIZE)
    manager.deallocate(admit(manager, prompt(1, 2)))
    held = admit(manager, [7])
    # Three blocks are free. Three are needed, of which two are hits, on blocks that are free, too.
    assert manager.can_allocate(make_sequence(prompt(1, 2)))
    assert manager.can_allocate(make_sequence(prompt(1, 2, rest=BLOCK_SIZE)))
    assert not manager.can_allocate(make_sequence(prompt(1, 3)))
    manager.deallocate(held)
    assert manager.can_allocate(make_sequence(prompt(1, 3)))
    assert not manager.can_allocate(make_sequence(prompt(1, 4)))


def test_can_append_needs_a_block_only_at_a_border() -> None:
    manager = BlockManager(2, BLOCK_SIZE)
    seq = admit(manager, [1, 2, 3])
    other = admit(manager, [9])
    append(manager, seq, 4)
    assert not manager.can_append(seq)  # the next token counts before it is known
    seq.token_ids.append(5)
    assert not manager.can_append(seq)
    manager.deallocate(other)
    assert manager.can_append(seq)
    manager.may_append(seq)
    manager.may_append(seq)  # it has one now
    assert len(seq.block_table) == 2


def test_caching_off_shares_nothing() -> None:
    manager = BlockManager(20, BLOCK_SIZE, enable_prefix_caching=False)
    first, second = admit(manager, prompt(1, 3)), admit(manager, prompt(1, 3))
    assert not set(first.block_table) & set(second.block_table)
    assert first.num_cached_tokens == second.num_cached_tokens == 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
)
def test_shared_blocks_are_exactly_the_common_whole_blocks(one: list[int], two: list[int]) -> None:
    manager = BlockManager(40, BLOCK_SIZE)
    first, second = admit(manager, one), admit(manager, two)
    common = 0
    while common < min(len(one), len(two)) and one[common] == two[common]:
        common += 1
    assert second.num_cached_tokens == min(common, len(two) - 1) // BLOCK_SIZE * BLOCK_SIZE
    num_shared = second.num_cached_tokens // BLOCK_SIZE
    assert second.block_table[:num_shared] == first.block_table[:num_shared]
    assert not set(second.block_table[num_shared:]) & set(first.block_table)


class WatchedList(list):
    """Notes which items are read, and refuses to be walked through."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.touched: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        self.touched.add(index)
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("walks through all blocks")


class WatchedQueue(OrderedDict):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("walks through all free blocks")


def test_operations_touch_only_the_blocks_they_are_about() -> None:
    manager = BlockManager(1000, BLOCK_SIZE)
    manager.deallocate(admit(manager, prompt(1, 20)))
    others = [admit(manager, prompt(i, 3)) for i in range(2, 50)]
    watched = WatchedList(manager.blocks)
    manager.blocks = watched
    manager.free_block_ids = WatchedQueue(list(manager.free_block_ids.items()))
    seq = admit(manager, prompt(1, 10) + [7] * 20)
    for token in range(9):
        append(manager, seq, token)
    table = set(seq.block_table)
    manager.deallocate(seq)
    assert watched.touched <= table and len(table) > 10
    assert not table & {block_id for other in others for block_id in other.block_table}
    with pytest.raises(AssertionError, match="walks"):
        list(manager.free_block_ids)
