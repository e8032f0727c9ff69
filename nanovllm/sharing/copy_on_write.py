"""Blocks that several sequences share before they are full, and who gets a copy of them when.

Full blocks are shared for good, since nobody writes to them. Sequences that are forked from one
another share its last, partial block, too, until one of them is about to write to it. That one gets
a copy, and so do the others, but for the last holder, which writes in place. For example, three
completions of the prompt "A B C D E F", with blocks of four tokens:

    prefill   the first computes the prompt in the blocks 0 and 1; all three tables are [0, 1]
    decode    the first is to write to block 1, which has three holders: it gets block 2, and
              "E F" is copied there; the second gets block 3 in the same way; the third is the
              only holder by now. The tables are [0, 2], [0, 3] and [0, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from nanovllm.engine.block_manager import BlockManager
    from nanovllm.engine.sequence import Sequence


class BlockCopy(NamedTuple):
    """What the device does before a step: it gives a block the first tokens of another one."""

    source: int  # id of a block
    target: int  # id of a block
    num_tokens: int


class SharedTails:
    """The partial blocks of a BlockManager that may have several holders."""

    def __init__(self, manager: BlockManager) -> None:
        self._manager = manager
        # Ids of the blocks. Empty, at no cost to any step, unless something was forked. Some may
        # have one holder by now: it finds that out when it is to write.
        self.block_ids: set[int] = set()
        # They have to be made in this order: a block can be a target, be freed, and be a target
        # again, all before the next step.
        self._copies: list[BlockCopy] = []

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give `child`, which has no blocks, all those of `parent`, the partial one included.

        Their tokens agree as far as `parent` has computed them.
        """
        assert not child.block_table
        for block_id in parent.block_table:
            self._manager.blocks[block_id].ref_count += 1
        if parent.num_computed_tokens % self._manager.block_size > 0:
            self.block_ids.add(parent.block_table[-1])
        child.block_table = list(parent.block_table)
        child.num_registered_blocks = parent.num_registered_blocks
        child.num_cached_tokens = parent.num_computed_tokens
        child.num_computed_tokens = parent.num_computed_tokens

    def num_due(self) -> int:
        """How many copies are to come, each of which needs a block: of all holders but the last."""
        blocks = self._manager.blocks
        return sum(max(blocks[block_id].ref_count - 1, 0) for block_id in self.block_ids)

    def needs_copy(self, seq: Sequence) -> bool:
        """Whether others hold the last block of a sequence, too."""
        return self._manager.blocks[seq.block_table[-1]].ref_count > 1

    def prepare_write(self, seq: Sequence) -> None:
        """Make a sequence that is about to write to its last block the only holder of it."""
        tail = seq.block_table[-1]
        if tail not in self.block_ids:
            return
        if not self.needs_copy(seq):
            self.block_ids.remove(tail)
            return
        self._manager.blocks[tail].ref_count -= 1
        seq.block_table[-1] = self._manager.take_free_block()
        num_tokens = seq.num_computed_tokens % self._manager.block_size
        self._copies.append(BlockCopy(tail, seq.block_table[-1], num_tokens))

    def take_copies(self) -> list[BlockCopy]:
        """The copies to be made before the next step, whichever it is; they are forgotten here.

        A step may fail to be scheduled after some copies were found to be necessary. The next one
        makes them: until then nothing writes to the cache.
        """
        copies = self._copies
        if copies:
            self._copies = []
        return copies
