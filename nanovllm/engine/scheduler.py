"""Which sequences run in the next step: continuous batching, chunked prefill, preemption."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus

if (
    TYPE_CHECKING
):  # Config imports torch; the scheduler can be read, tested and simulated without it
    from nanovllm.config import Config


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass."""

    seqs: list[Sequence]
    yields: list[
        bool
    ]  # for each, whether the step computes its last token and so samples the next one
    num_tokens: int  # that it computes
    is_prefill: bool  # of prompts (or chunks of them), not one token of each sequence


class Scheduler:
    """Two queues and a block manager.

    `waiting` holds sequences in arrival order; a preempted one returns to its head, and one whose prompt is computed
    in chunks stays there, with its blocks, until its last chunk. `running` holds those that decode, oldest first.

    A step may be scheduled before the tokens of the one before it are known: only their number matters here.
    """

    def __init__(self, config: Config, counters: Counter[str] | None = None) -> None:
        self.max_num_seqs, self.max_num_batched_tokens = (
            config.max_num_seqs,
            config.max_num_batched_tokens,
        )
        self.eos = (config.eos,) if isinstance(config.eos, int) else config.eos
        num_blocks, block_size = config.num_kvcache_blocks, config.kvcache_block_size
        self.block_manager = BlockManager(num_blocks, block_size, config.enable_prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: deque[Sequence] = deque()
        self.free_rows = list(reversed(range(self.max_num_seqs)))
        self.num_pending = self.num_preemptions = (
            0  # pending: scheduled and not yet postprocessed steps
        )
        self.preempted: list[Sequence] = []  # by the last `schedule`
        self.counters = (
            Counter() if counters is None else counters
        )  # the engine's outlive this scheduler

    def is_finished(self) -> bool:
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        eos = () if seq.params.ignore_eos else self.eos
        seq.end_ids = {
            token_id: token_id for token_id in seq.params.stop_token_ids
        } | dict.fromkeys(eos)
        self.counters["requests"] += 1
        self.counters["prompt_tokens"] += seq.num_prompt_tokens
        self.waiting.append(seq)

    def abort(self, seqs: list[Sequence]) -> None:
        """End those of `seqs` that have not finished. Their blocks are free; tokens under way will be dropped."""
        for seq in (seq for seq in seqs if not seq.is_finished):
            if seq.block_table:
                self._release(seq)
            seq.finish("abort")
        self.waiting = deque(seq for seq in self.waiting if not seq.is_finished)
        self.running = deque(seq for seq in self.running if not seq.is_finished)

    def schedule(self) -> Step | None:
        """Pick the sequences of the next step and give them their blocks; None if a pending step must end first."""
        self.preempted = []
        # Prefill goes first: it fills the batch that later decode steps share the cost of reading the weights over.
        step = self._schedule_prefill() or self._schedule_decode()
        self.num_pending += step is not None
        assert self.num_pending or self.is_finished(), "work is left and none can be scheduled"
        return step

    def _schedule_prefill(self) -> Step | None:
        seqs, yields, budget = [], [], self.max_num_batched_tokens
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            seq = self.waiting[0]
            if not seq.block_table:
                if not self.block_manager.can_allocate(seq):
                    break
                self.block_manager.allocate(seq)
                seq.row = self.free_rows.pop()
                self.counters["prefix_hit_tokens"] += seq.num_cached_tokens
                if seq.num_cached_prompt_tokens is None:
                    seq.num_cached_prompt_tokens = seq.num_cached_tokens
            # Only after allocate is it known how many tokens the prefix cache leaves to compute.
            num_new = min(seq.num_tokens - seq.num_computed_tokens, budget)
            budget -= num_new
            seqs.append(seq)
            yields.append(seq.schedule(num_new, is_prefill=True))
            # Its full blocks can be shared from now on, in this step too: a layer stores all K and V, then reads.
            self.block_manager.register(seq)
            if not yields[-1]:
                break  # the budget is spent; the rest of this prompt comes first in the next step
            seq.status = SequenceStatus.RUNNING
            self.running.append(self.waiting.popleft())
        return Step(seqs, yields, self.max_num_batched_tokens - budget, True) if seqs else None

    def _schedule_decode(self) -> Step | None:
        block_manager, seqs, queue = self.block_manager, [], self.running.copy()
        while queue:
            seq = queue.popleft()
            if seq.is_exhausted:
                continue  # its last token is under way
            while not block_manager.can_append(seq):
                if self.num_pending:
                    return None  # it may end a sequence; and one whose tokens are not all known cannot start again
                # The newest has the least work to lose. The oldest is never chosen while another one runs, and
                # alone it always fits (the engine checks the size of the cache), so there is always progress.
                if self._preempt_newest() is seq:
                    break
                queue.pop()
            else:
                block_manager.may_append(seq)
                seqs.append(seq)
        for seq in seqs:
            seq.schedule(1)
        # Attention goes through them in this order: a long one among the last would be alone on the GPU at the end.
        seqs.sort(key=attrgetter("num_computed_tokens"), reverse=True)
        return Step(seqs, [True] * len(seqs), len(seqs), False) if seqs else None

    def _preempt_newest(self) -> Sequence:
        seq = self.running.pop()
        self._release(seq)
        seq.status = SequenceStatus.WAITING
        self.waiting.appendleft(seq)
        self.num_preemptions += 1
        self.preempted.append(seq)
        self.counters["preemptions"] += 1
        return seq

    def _release(self, seq: Sequence) -> None:
        self.block_manager.deallocate(seq)
        self.free_rows.append(seq.row)

    def postprocess(
        self,
        step: Step,
        token_ids: list[int],
        logprobs: list[tuple[list[int], list[float]]] | None = None,
    ) -> list[Sequence]:
        """Account for the oldest pending step, given a token of each sequence, and `logprobs` of each that asked.

        An unfinished chunk's token is ignored. Returns the sequences that finished; their blocks are free again.
        """
        self.num_pending -= 1
        self.counters["completion_tokens"] += len(token_ids)  # less those skipped below
        finished, entries = [], iter(logprobs or ())
        for seq, yields, token_id in zip(step.seqs, step.yields, token_ids, strict=True):
            entry = None if seq.logprobs is None else next(entries)
            if (
                not yields or seq.is_finished
            ):  # finished: the step was launched before its end was known
                self.counters["completion_tokens"] -= 1
                continue
            is_last = seq.append(token_id, entry)
            self.block_manager.register(seq)
            if is_last:
                self._release(seq)
                finished.append(seq)
        if finished:  # one pass a step; deque.remove would be one pass a finished sequence
            self.running = deque(seq for seq in self.running if not seq.is_finished)
        return finished
