"""The paged KV cache's book-keeping: who holds which block, and which blocks can be shared."""

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

import xxhash

from nanovllm.engine.sequence import Sequence

NO_CONTENT = 0  # content id of a block that is not (yet) full, and of the empty prefix


@dataclass(slots=True, eq=False)
class Block:
    """One block of `block_size` token slots. Its contents are known once it is full and computed."""

    block_id: int
    ref_count: int = 0
    key: int = -1
    token_ids: list[int] = field(default_factory=list)
    parent_id: int = NO_CONTENT  # content_id of the block before it
    content_id: int = (
        NO_CONTENT  # equal for two blocks exactly when their tokens and all tokens before are equal
    )


class BlockManager:
    """Hands out blocks, counts their holders, finds cached prefixes, in time independent of the cache's size."""

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        self.block_size, self.enable_prefix_caching = block_size, enable_prefix_caching
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        # Ids of the blocks nobody holds, least recently freed first. A prefix hit takes one out of the middle of this
        # queue, which an OrderedDict does in constant time.
        self.free_block_ids: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.cached_blocks: dict[int, Block] = {}  # key -> a full block, held or free
        self._content_ids = count(
            NO_CONTENT + 1
        )  # never reused, so a stale parent_id matches nothing

    def usage(self) -> dict[str, int]:
        """Blocks that nobody holds, that sequences hold, and, of both kinds, that a prompt could share."""
        free, num_cached = len(self.free_block_ids), len(self.cached_blocks)
        return {
            "blocks_free": free,
            "blocks_in_use": len(self.blocks) - free,
            "blocks_cached": num_cached,
        }

    def num_missing(self, seq: Sequence) -> int:
        """How many more blocks all tokens of a sequence need."""
        return -(-seq.num_tokens // self.block_size) - len(seq.block_table)

    def can_allocate(self, seq: Sequence) -> bool:
        """Whether the free blocks suffice for all tokens of a waiting sequence, after prefix hits."""
        num_held = sum(
            block.ref_count > 0 for block in self._find_cached_prefix(seq)
        )  # the other hits are free ones
        return self.num_missing(seq) - num_held <= len(self.free_block_ids)

    def allocate(self, seq: Sequence) -> None:
        """Fill the block table of a waiting sequence: shared blocks for its cached prefix, new ones for the rest."""
        assert not seq.block_table
        for block in self._find_cached_prefix(seq):
            self.free_block_ids.pop(block.block_id, None)
            block.ref_count += 1
            seq.block_table.append(block.block_id)
        seq.num_registered_blocks = len(seq.block_table)
        seq.num_cached_tokens = seq.num_computed_tokens = len(seq.block_table) * self.block_size
        seq.block_table += [self._take_free_block() for _ in range(self.num_missing(seq))]

    def _find_cached_prefix(self, seq: Sequence) -> list[Block]:
        """The longest run of cached blocks that `seq` begins with, always leaving a token to compute."""
        hits: list[Block] = []
        for index in range((seq.num_tokens - 1) // self.block_size):
            block = self._find_block(seq, index, hits[-1].content_id if hits else NO_CONTENT)
            if block is None:
                break
            hits.append(block)
        return hits

    def _find_block(self, seq: Sequence, index: int, parent_id: int) -> Block | None:
        """The cached block that equals a full one of `seq`, given the content id of the block before it."""
        block = self.cached_blocks.get(self._block_key(seq, index))
        # The key is only a hash. Equal tokens after an equal prefix are a proof.
        is_same = (
            block
            and block.parent_id == parent_id
            and block.token_ids == self._block_tokens(seq, index)
        )
        return block if is_same else None

    def can_append(self, seq: Sequence) -> bool:
        """Whether the last token of a running sequence has a slot, or can be given one."""
        return bool(self.free_block_ids) or self.num_missing(seq) <= 0

    def may_append(self, seq: Sequence) -> None:
        """Give a running sequence a new block if its last token is the first of one."""
        if self.num_missing(seq) > 0:
            seq.block_table.append(self._take_free_block())

    def register(self, seq: Sequence) -> None:
        """Make shareable those full blocks of `seq` whose tokens are known and whose computation is launched."""
        num_full = min(seq.num_computed_tokens, len(seq.token_ids)) // self.block_size
        if not self.enable_prefix_caching or num_full <= seq.num_registered_blocks:
            return
        for index in range(seq.num_registered_blocks, num_full):
            block = self.blocks[seq.block_table[index]]
            block.parent_id = (
                self.blocks[seq.block_table[index - 1]].content_id if index else NO_CONTENT
            )
            known = self._find_block(seq, index, block.parent_id)
            if known is not None:
                block.content_id = (
                    known.content_id
                )  # a second copy: the first one stays the shared one
                continue
            block.key, block.token_ids = self._block_key(seq, index), self._block_tokens(seq, index)
            block.content_id = next(self._content_ids)
            self.cached_blocks[block.key] = block
        seq.num_registered_blocks = num_full

    def deallocate(self, seq: Sequence) -> None:
        """Take back all blocks of a sequence. Their contents stay findable until they are handed out again."""
        for block_id in reversed(
            seq.block_table
        ):  # the tail is evicted before the head it depends on
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free_block_ids[block_id] = None
        seq.block_table.clear()
        seq.num_computed_tokens = seq.num_registered_blocks = 0

    def _take_free_block(self) -> int:
        block_id, _ = self.free_block_ids.popitem(last=False)
        block = self.blocks[block_id]
        if self.cached_blocks.get(block.key) is block:
            del self.cached_blocks[block.key]
        self.blocks[block_id] = Block(block_id, ref_count=1)  # with nothing known of its contents
        return block_id

    @staticmethod
    def compute_hash(token_ids: list[int], previous_key: int | None = None) -> int:
        """Key of a full block: xxh64 of the previous block's key (8 bytes, none for the first) and its token ids."""
        prefix = b"" if previous_key is None else previous_key.to_bytes(8, "little")
        return xxhash.xxh64_intdigest(prefix + array("i", token_ids).tobytes())

    def _block_key(self, seq: Sequence, index: int) -> int:
        keys = (
            seq.block_keys
        )  # kept with the sequence: one that waits for blocks is looked up in every step
        while len(keys) <= index:
            keys.append(
                self.compute_hash(self._block_tokens(seq, len(keys)), keys[-1] if keys else None)
            )
        return keys[index]

    def _block_tokens(self, seq: Sequence, index: int) -> list[int]:
        return seq.token_ids[index * self.block_size : (index + 1) * self.block_size]
