"""Which sequences run in the next step: continuous batching, chunked prefill, preemption."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:  # Config imports torch; the scheduler can be read, tested and simulated without it
    from nanovllm.config import Config


class Scheduler:
    """Two queues and a block manager.

    `waiting` holds sequences in arrival order; a preempted one returns to its head, and one whose prompt is
    computed in chunks stays there, with its blocks, until its last chunk. `running` holds those that decode,
    oldest first.
    """

    def __init__(self, config: Config) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.eos = config.eos
        self.block_manager = BlockManager(
            config.num_kvcache_blocks, config.kvcache_block_size, config.enable_prefix_caching
        )
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.num_preemptions = 0

    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self) -> tuple[list[Sequence], bool]:
        """Pick the sequences of the next step and give them their blocks.

        Returns:
            The sequences, with `num_scheduled_tokens` set, and whether this is a prefill step. Prefill goes
            first: it fills the batch that later decode steps share the cost of reading the weights over.
        """
        assert not self.is_finished()
        if scheduled := self._schedule_prefill():
            return scheduled, True
        return self._schedule_decode(), False

    def _schedule_prefill(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        budget = self.max_num_batched_tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not seq.block_table:
                if not self.block_manager.can_allocate(seq):
                    break
                self.block_manager.allocate(seq)
            # Only after allocate is it known how many tokens the prefix cache leaves to compute.
            start = seq.num_computed_tokens
            seq.num_scheduled_tokens = min(seq.num_tokens - start, budget)
            budget -= seq.num_scheduled_tokens
            # From now on the blocks can be shared, in this very step too: every layer stores the K and V of the
            # whole batch before it reads any.
            self.block_manager.register(seq, start, start + seq.num_scheduled_tokens)
            scheduled.append(seq)
            if not seq.is_sampled:
                break  # the budget is spent; the rest of this prompt comes first in the next step
            seq.status = SequenceStatus.RUNNING
            self.running.append(self.waiting.popleft())
        return scheduled

    def _schedule_decode(self) -> list[Sequence]:
        scheduled: list[Sequence] = []
        while self.running:
            seq = self.running.popleft()
            while not self.block_manager.can_append(seq):
                # The newest has the least work to lose. The oldest is never chosen while another one runs, and
                # alone it always fits (the engine checks the size of the cache), so there is always progress.
                victim = self.running.pop() if self.running else seq
                self._preempt(victim)
                if victim is seq:
                    break
            else:
                self.block_manager.may_append(seq)
                seq.num_scheduled_tokens = 1
                self.block_manager.register(seq, seq.num_computed_tokens, seq.num_tokens)
                scheduled.append(seq)
        assert scheduled, "a lone sequence found no block: the cache is smaller than max_model_len"
        self.running.extend(scheduled)
        return scheduled

    def _preempt(self, seq: Sequence) -> None:
        self.block_manager.deallocate(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def postprocess(self, seqs: list[Sequence], token_ids: list[int]) -> list[Sequence]:
        """Account for a step that has run.

        Args:
            seqs: what `schedule` returned.
            token_ids: one sampled token for each; that of an unfinished chunk is ignored.

        Returns:
            The sequences that finished. Their blocks are free again.
        """
        finished: list[Sequence] = []
        for seq, token_id in zip(seqs, token_ids, strict=True):
            is_sampled = seq.is_sampled
            seq.num_computed_tokens += seq.num_scheduled_tokens
            seq.num_scheduled_tokens = 0
            if not is_sampled:
                continue
            seq.append_token(token_id)
            if token_id == self.eos and not seq.ignore_eos:
                seq.finish_reason = "stop"
            elif seq.num_completion_tokens == seq.max_tokens:
                seq.finish_reason = "length"
            else:
                continue
            seq.status = SequenceStatus.FINISHED
            self.block_manager.deallocate(seq)
            finished.append(seq)
        if finished:  # one pass a step; deque.remove would be one pass a finished sequence
            self.running = deque(seq for seq in self.running if not seq.is_finished)
        return finished
