"""The paged KV cache's book-keeping: who holds which block, and which blocks can be shared."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

import xxhash

from nanovllm.engine.sequence import Sequence
from nanovllm.sharing.copy_on_write import SharedTails

NO_PREFIX = 0  # prefix_id of the empty prefix, and of a block that is not full (yet)

# Two prompts that share a block, with blocks of four tokens and a letter for each token:
#
#     prompt 1  A B C D | E F G H | I      its block table: [0, 1, 2]
#     prompt 2  A B C D | W X Y Z | V      its block table: [0, 3, 4]
#
#     block_id  ref_count  token_ids  hash                   prefix_id  parent_prefix_id
#            0          2  A B C D    h0 = xxh64(ABCD)       1          0, the empty prefix
#            1          1  E F G H    h1 = xxh64(h0, EFGH)   2          1
#            2          1  -          None: not full         0          0
#            3          1  W X Y Z    h3 = xxh64(h0, WXYZ)   3          1
#            4          1  -          None: not full         0          0
#
# K and V of a token depend on all tokens before it, so a block may be shared only where the whole
# prefix up to its end is equal. That is why a hash covers the hash of the block before. The hash
# finds a block. Its tokens, and the number of the prefix that they continue, prove that it is the
# right one: prefix_id 1 stands for "A B C D", 2 for "A B C D E F G H", 3 for "A B C D W X Y Z".


@dataclass(slots=True, eq=False)
class Block:
    """`block_size` token slots of the cache. Contents are known when they are full and computed."""

    block_id: int  # its index in the KV cache, which block tables list
    ref_count: int = 0  # number of block tables that it is in
    hash: int | None = None  # where `cached_blocks` has it; None: nowhere
    token_ids: list[int] = field(default_factory=list)
    parent_prefix_id: int = NO_PREFIX  # prefix_id of the block before it
    prefix_id: int = NO_PREFIX  # two blocks have the same only if all tokens up to their ends agree


class BlockManager:
    """Hands out blocks, counts holders, finds prefixes; nothing takes longer in a larger cache."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        # Ids of the blocks nobody holds: first those that hold nothing that could be reused, then
        # cached ones, least recently freed first. A prefix hit takes one out of the middle of this
        # queue, which an OrderedDict does in constant time.
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.cached_blocks: dict[int, Block] = {}  # hash -> a full block, held or free
        self.tails = SharedTails(self)  # partial blocks with several holders
        self._shared_tails = self.tails.block_ids  # looked at for each sequence in each step
        # Never used again, so that a block whose parent was evicted matches nothing.
        self._prefix_ids = count(NO_PREFIX + 1)

    def usage(self) -> dict[str, int]:
        """How many blocks are free, held by sequences, and (of both kinds) in the prefix cache."""
        num_free = len(self.free_block_ids)
        return {
            "blocks_free": num_free,
            "blocks_in_use": len(self.blocks) - num_free,
            "blocks_cached": len(self.cached_blocks),
        }

    def num_missing(self, seq: Sequence) -> int:
        """How many more blocks all tokens of a sequence need."""
        return -(-seq.num_tokens // self.block_size) - len(seq.block_table)

    def can_allocate(self, seq: Sequence) -> bool:
        """Whether there are enough blocks, free or with its prefix, for all tokens of a waiting
        sequence, and for the copies that running ones will need.
        """
        hits = self._find_cached_prefix(seq)
        num_held = sum(block.ref_count > 0 for block in hits)  # the other hits are free blocks
        num_left = len(self.free_block_ids) - self.tails.num_due()
        return self.num_missing(seq) - num_held <= num_left

    def allocate(self, seq: Sequence) -> None:
        """Give a waiting sequence shared blocks for its cached prefix and new ones for the rest."""
        assert not seq.block_table
        for block in self._find_cached_prefix(seq):
            self.free_block_ids.pop(block.block_id, None)
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        num_hits = len(seq.block_table)
        seq.num_registered_blocks = num_hits
        seq.num_cached_tokens = num_hits * self.block_size
        seq.num_computed_tokens = seq.num_cached_tokens
        seq.block_table += [self.take_free_block() for _ in range(self.num_missing(seq))]

    def _find_cached_prefix(self, seq: Sequence) -> list[Block]:
        """The cached blocks that `seq` begins with; a token is left to compute, for its logits."""
        hits: list[Block] = []
        if seq.needs_whole_prompt:
            return hits
        parent_prefix_id = NO_PREFIX
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self._find_block(seq, index, parent_prefix_id)
            if block is None:
                break
            hits.append(block)
            parent_prefix_id = block.prefix_id
        return hits

    def _find_block(self, seq: Sequence, index: int, parent_prefix_id: int) -> Block | None:
        """The cached block that equals the full block `index` of `seq`, in tokens and prefix."""
        block = self.cached_blocks.get(self._block_hash(seq, index))
        if block is None or block.parent_prefix_id != parent_prefix_id:
            return None
        # Equal hashes are no proof. Equal tokens after an equal prefix are.
        return block if block.token_ids == self._block_tokens(seq, index) else None

    def can_append(self, seq: Sequence) -> bool:
        """Whether the last token of a running sequence has a slot, or can be given one."""
        if self.free_block_ids:
            return True
        return self.num_missing(seq) <= 0 and not self.tails.needs_copy(seq)

    def may_append(self, seq: Sequence) -> None:
        """Before it writes its last token: give a running sequence a new block if the token is the
        first of one, or its own copy of its last block if others hold that, too.
        """
        if self.num_missing(seq) > 0:
            seq.block_table.append(self.take_free_block())
        elif self._shared_tails:
            self.tails.prepare_write(seq)

    def register(self, seq: Sequence) -> None:
        """Make shareable those full blocks of `seq` whose tokens are known and computed.

        Computed means that the step which computes them is scheduled: later steps run after it.
        """
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if not self.enable_prefix_caching or num_full <= seq.num_registered_blocks:
            return
        for index in range(seq.num_registered_blocks, num_full):
            block = self.blocks[seq.block_table[index]]
            if index > 0:
                block.parent_prefix_id = self.blocks[seq.block_table[index - 1]].prefix_id
            known = self._find_block(seq, index, block.parent_prefix_id)
            if known is not None:  # the first copy stays the shared one
                block.prefix_id = known.prefix_id
                continue
            block.hash = self._block_hash(seq, index)
            block.token_ids = self._block_tokens(seq, index)
            block.prefix_id = next(self._prefix_ids)
            self.cached_blocks[block.hash] = block
        seq.num_registered_blocks = num_full

    def deallocate(self, seq: Sequence) -> None:
        """Take back a sequence's blocks. Their contents can be found until they are reused."""
        # Backwards, so that the tail is evicted before the head, without which it is not found.
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_block_ids[block_id] = None
                if not self._is_cached(block):
                    self.free_block_ids.move_to_end(block_id, last=False)
        seq.block_table.clear()
        seq.num_computed_tokens = 0
        seq.num_registered_blocks = 0

    def forget_prefixes(self) -> None:
        """Let no sequence find what is cached. Those that hold blocks keep them."""
        self.cached_blocks.clear()

    def take_free_block(self) -> int:
        """Take the first free block; whatever it holds can no longer be found."""
        block_id, _ = self.free_block_ids.popitem(last=False)
        self._shared_tails.discard(block_id)
        block = self.blocks[block_id]
        if block.hash is not None and self._is_cached(block):
            del self.cached_blocks[block.hash]
        self.blocks[block_id] = Block(block_id, ref_count=1)
        return block_id

    def _is_cached(self, block: Block) -> bool:
        """Whether a prefix can find it; a copy, or one that a collision displaced, is not found."""
        return block.hash is not None and self.cached_blocks.get(block.hash) is block

    @staticmethod
    def compute_hash(token_ids: list[int] | array[int], parent_hash: int | None = None) -> int:
        """Hash of a full block: xxh64 of the hash of the block before it (8 bytes; none at all if
        this is the first block of a sequence, with None) and of its token ids (4 bytes each).
        """
        prefix = b"" if parent_hash is None else parent_hash.to_bytes(8, "little")
        return xxhash.xxh64_intdigest(prefix + array("i", token_ids).tobytes())

    def _block_hash(self, seq: Sequence, index: int) -> int:
        """Hash of a full block, kept in `seq`: one that waits is looked up in every step."""
        hashes = seq.block_hashes
        while len(hashes) <= index:
            start = len(hashes) * self.block_size
            end = start + self.block_size
            is_packed = end <= len(seq.packed_prompt)  # a list takes ten times as long to hash
            tokens = seq.packed_prompt[start:end] if is_packed else seq.token_ids[start:end]
            hashes.append(self.compute_hash(tokens, hashes[-1] if hashes else None))
        return hashes[index]

    def _block_tokens(self, seq: Sequence, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
