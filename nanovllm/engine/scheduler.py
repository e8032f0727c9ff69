"""Which sequences run in the next step: continuous batching, chunked prefill, preemption."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.sharing.copy_on_write import BlockCopy
from nanovllm.sharing.prefill_groups import PrefillGroups

# Config imports torch; the scheduler can be read, tested and simulated without it.
if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.results import TokenLogprobs

NO_NUMBERS = (
    "the model's logits are NaN or infinite; check the checkpoint's weights, or try a wider dtype"
)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes: prompts or parts of them, or a token of each sequence."""

    seqs: list[Sequence]  # each knows which of its tokens: see Sequence.scheduled_token_ids
    yields: list[bool]  # for each: whether its last token is computed and so the next one sampled
    num_tokens: int  # that are computed, of all sequences together
    is_prefill: bool  # else it is a decode step
    copies: list[BlockCopy]  # of cache blocks, which the device makes before it, in this order


class Scheduler:
    """Two queues and a block manager.

    `waiting` holds sequences in arrival order; a preempted one returns to its head, and one whose
    prompt is computed in chunks stays there, with its blocks, until its last chunk. `running` holds
    those that decode, oldest first.

    A step may be scheduled before the last one's tokens are known: only their number matters here.
    """

    def __init__(self, config: Config, counters: Counter[str] | None = None) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.eos = (config.eos,) if isinstance(config.eos, int) else config.eos
        self.block_manager = BlockManager(
            config.num_kvcache_blocks, config.kvcache_block_size, config.enable_prefix_caching
        )
        # Its keys are the queue, since an aborted one can be anywhere in it, among any number.
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        self.running: deque[Sequence] = deque()
        # Rows of the model runner's arrays that no sequence has; row 0 is handed out first.
        self.free_rows = list(reversed(range(self.max_num_seqs)))
        self.num_pending = 0  # steps that are scheduled and not postprocessed
        self.preempted: list[Sequence] = []  # by the last `schedule`, for a Trace
        self.counters = Counter() if counters is None else counters  # the engine's outlive this

    def is_finished(self) -> bool:
        """Whether no sequence is waiting or running."""
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence."""
        seq.end_ids = {token_id: token_id for token_id in seq.params.stop_token_ids or ()}
        seq.early_ids = (*seq.end_ids, *self.eos)
        if not seq.params.ignore_eos:
            seq.end_ids |= dict.fromkeys(self.eos)  # no stop_reason, even if it was asked for
        self.counters["requests"] += 1
        self.counters["prompt_tokens"] += seq.num_prompt_tokens
        self.waiting[seq] = None

    def abort(self, seqs: list[Sequence]) -> None:
        """End those of `seqs` that have not finished; their blocks are free at once."""
        for seq in seqs:
            if seq.block_table:
                self._release(seq)
            if not seq.is_finished:
                seq.finish("abort")
            if seq in self.waiting:
                del self.waiting[seq]
            elif seq in self.running:  # there are at most max_num_seqs
                self.running.remove(seq)

    def schedule(self) -> Step | None:
        """Pick the next step and give it its blocks; None if a pending one has to end before it."""
        self.preempted = []
        # Prefill goes first: it fills the batch of the decode steps that follow. They read all
        # weights once, for however many sequences.
        step = self._schedule_prefill() or self._schedule_decode()
        if step is not None:
            self.num_pending += 1
        assert self.num_pending or self.is_finished(), "work is left and none can be scheduled"
        return step

    def _schedule_prefill(self) -> Step | None:
        """Waiting sequences, oldest first, while rows, blocks and the budget of tokens last.

        Of those with the same tokens the first computes them. The others, its followers, compute
        nothing: they come behind it in `Step.seqs`, share its blocks, and draw from its logits.
        """
        groups = PrefillGroups(only_siblings=not self.block_manager.enable_prefix_caching)
        budget = self.max_num_batched_tokens  # tokens that the step may still compute
        is_complete = True
        while self.waiting and is_complete and len(self.running) < self.max_num_seqs:
            seq = next(iter(self.waiting))
            group = groups.find(seq)  # those with the same tokens that are in this step already
            if group:
                if not self._admit_follower(seq, group[0]):
                    break
            elif budget == 0 or not (seq.block_table or self._admit(seq)):
                break  # (one that has blocks was admitted by an earlier step, for a chunk)
            group.append(seq)
            # Only now is it known how many tokens are left to compute; of a follower none are.
            num_new = min(seq.num_tokens - seq.num_computed_tokens, budget)
            budget -= num_new
            seq.sampling_options = seq.make_sampling_options()
            # If not, the budget is spent; the rest of this prompt comes first in the next step.
            is_complete = seq.schedule(num_new)
            if seq.readout is not None:
                seq.reading = seq.readout.plan(seq)
            # Its full blocks can be shared from now on, even by sequences of this step: each layer
            # stores the K and V of all of them before it reads any.
            self.block_manager.register(seq)
            if is_complete:
                seq.status = SequenceStatus.RUNNING
                del self.waiting[seq]
                self.running.append(seq)
        seqs = groups.members()
        if not seqs:
            return None
        return Step(
            seqs=seqs,
            yields=[True] * (len(seqs) - 1) + [is_complete],  # a chunk comes last
            num_tokens=self.max_num_batched_tokens - budget,
            is_prefill=True,
            copies=self.block_manager.tails.take_copies(),
        )

    def _admit(self, seq: Sequence) -> bool:
        """Give a waiting sequence its blocks and a row; False if there are not enough blocks."""
        if not self.block_manager.can_allocate(seq):
            return False
        self.block_manager.allocate(seq)
        self._seat(seq)
        return True

    def _admit_follower(self, seq: Sequence, leader: Sequence) -> bool:
        """Let a waiting sequence share all blocks of one with the same tokens, which this step
        computes; False if no block would be left for its own copy of the last, partial one.
        """
        tails = self.block_manager.tails
        if tails.num_due() >= len(self.block_manager.free_block_ids):
            return False
        tails.fork(leader, seq)
        self._seat(seq)
        return True

    def _seat(self, seq: Sequence) -> None:
        """Give a sequence that now has its blocks a row, and note what it need not compute."""
        seq.row = self.free_rows.pop()
        self.counters["prefix_hit_tokens"] += seq.num_cached_tokens
        if seq.num_cached_prompt_tokens is None:  # else it was preempted
            seq.num_cached_prompt_tokens = seq.num_cached_tokens

    def _schedule_decode(self) -> Step | None:
        """All running sequences; None also if one needs a block that only a pending step frees."""
        block_manager = self.block_manager
        seqs: list[Sequence] = []
        # A copy, because preemption takes sequences off the end of `running`.
        for seq in list(self.running):
            if seq.is_exhausted:
                continue  # its last token is under way
            if not seq.block_table:
                break  # it was preempted for an older one, and so were all behind it
            if not block_manager.can_append(seq):
                # The pending steps may end a sequence and free its blocks. And a preempted one can
                # only start again when all its tokens are known.
                if self.num_pending:
                    return None
                if not self._make_room(seq):
                    break
            block_manager.may_append(seq)
            seqs.append(seq)
        if not seqs:
            return None
        for seq in seqs:  # only now, since a step that is not scheduled may count nothing
            seq.schedule(1)
            seq.sampling_options = None  # only a prefill step sends them
        # Attention works through the sequences in this order. Long ones come first, because a long
        # one among the last would leave most of the GPU idle at the end.
        seqs.sort(key=attrgetter("num_computed_tokens"), reverse=True)
        return Step(
            seqs=seqs,
            yields=[True] * len(seqs),
            num_tokens=len(seqs),
            is_prefill=False,
            copies=block_manager.tails.take_copies(),
        )

    def _make_room(self, seq: Sequence) -> bool:
        """Preempt the newest sequences until `seq` can have a block; False if it was one of them.

        The newest have the least work to lose. There is always progress: the oldest is never
        preempted while another runs, and alone it fits (the engine checks the size of the cache).
        """
        while not self.block_manager.can_append(seq):
            newest = self.running.pop()
            self._release(newest)
            newest.status = SequenceStatus.WAITING
            self.waiting[newest] = None
            self.waiting.move_to_end(newest, last=False)  # to be prefilled again, before any other
            self.preempted.append(newest)
            self.counters["preemptions"] += 1
            if newest is seq:
                return False
        return True

    def _release(self, seq: Sequence) -> None:
        if not seq.keeps_blocks:  # else another sequence goes on with them: see beam_search/
            self.block_manager.deallocate(seq)
        self.free_rows.append(seq.row)

    def postprocess(
        self, step: Step, token_ids: list[int], logprobs: list[TokenLogprobs] | None = None
    ) -> list[Sequence]:
        """Account for the oldest pending step, whose tokens are now known.

        `token_ids` has one for each sequence of the step, -1 where its logits were no numbers;
        after an unfinished chunk it is ignored. `logprobs` has an entry for each sequence that asks
        for them, in that order. Returns the sequences that finished; their blocks are free again.
        """
        self.num_pending -= 1
        finished: list[Sequence] = []
        num_ignored = 0
        entries = iter(logprobs or ())
        for seq, yields, token_id in zip(step.seqs, step.yields, token_ids, strict=True):
            entry = None if seq.logprobs is None else next(entries)
            # Finished already: this step was launched before the end of the sequence was known.
            if not yields or seq.is_finished:
                num_ignored += 1
                continue
            if token_id < 0:
                seq.fail(NO_NUMBERS)
                num_ignored += 1
            else:
                seq.append(token_id, entry)
                self.block_manager.register(seq)
            if seq.is_finished:
                finished.append(seq)
        for seq in reversed(finished):  # so that the next sequences get blocks in ascending order
            self._release(seq)
        self.counters["completion_tokens"] += len(token_ids) - num_ignored
        if finished:  # one pass for all of them; deque.remove would be one for each
            self.running = deque(seq for seq in self.running if not seq.is_finished)
        return finished
