"""What the engine did, step by step and request by request; trace_views.py shows it."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from nanovllm import trace_views
from nanovllm.trace_views import StepRecord

if TYPE_CHECKING:
    from nanovllm.engine.pending_tokens import PendingTokens
    from nanovllm.engine.scheduler import Scheduler, Step
    from nanovllm.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class _Launch:
    """A step between its launch and its completion."""

    step: Step  # kept, so that no later step can have its id
    record: StepRecord
    launched_at: float  # s of `perf_counter`
    event: torch.cuda.Event | None  # recorded on the device just before the step; None on a CPU


class Trace:
    """The steps and requests inside `with llm.trace() as trace:`.

    `steps` are in order. `requests` are those that were first admitted inside, by id. A request
    (with n > 1, each completion) is its `Sequence`, with the times `queued_at`, `first_token_at`
    and `finished_at`, which are None until then.
    """

    def __init__(self, is_cuda: bool) -> None:
        self.steps: list[StepRecord] = []
        self.requests: dict[int, Sequence] = {}
        self.began = perf_counter()
        self._is_cuda = is_cuda
        self._launches: dict[int, _Launch] = {}  # by id(step)

    def scheduled(self, step: Step, scheduler: Scheduler) -> None:
        """Record a step that the engine is about to launch."""
        record = StepRecord(
            kind="prefill" if step.is_prefill else "decode",
            request_ids=[seq.seq_id for seq in step.seqs],
            num_tokens=step.num_tokens,
            num_sampled=sum(step.yields),
            preempted=[seq.seq_id for seq in scheduler.preempted],
            blocks=scheduler.block_manager.usage(),
        )
        if step.is_prefill:
            for seq in step.seqs:
                self._record_chunk(record, seq)
        event = None
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self._launches[id(step)] = _Launch(step, record, perf_counter(), event)

    def _record_chunk(self, record: StepRecord, seq: Sequence) -> None:
        end = seq.num_computed_tokens
        start = end - seq.num_scheduled_tokens
        record.chunks[seq.seq_id] = (start, end)
        if start == seq.num_cached_tokens:  # the first chunk: it begins where the prefix hit ends
            record.prefix_hits[seq.seq_id] = start
        if len(seq.token_ids) == seq.num_prompt_tokens:  # no completion yet: it was not preempted
            self.requests[seq.seq_id] = seq

    def completed(
        self, step: Step, tokens: PendingTokens, finished: list[Sequence], start: float
    ) -> None:
        """Record the end of a step and of its `finished` sequences; `start` as in StepRecord."""
        launch = self._launches.pop(id(step), None)
        if launch is None:
            return  # it was launched before the trace began
        record = launch.record
        record.start = start
        record.end = perf_counter()
        if launch.event is None:
            record.device_time = tokens.launched_at - launch.launched_at
        else:  # both events have passed, since the tokens are here
            assert tokens.copied is not None
            record.device_time = launch.event.elapsed_time(tokens.copied) / 1e3  # from ms
        self.steps.append(record)
        if step.is_prefill:
            for seq, yields in zip(step.seqs, step.yields, strict=True):
                if yields and seq.first_token_at is None:
                    seq.first_token_at = record.end
        for seq in finished:
            seq.finished_at = record.end

    # Views of what was recorded: `trace.summary()`, `trace.save("trace.json")` and so on.
    summary = trace_views.summary
    events = trace_views.events
    save = trace_views.save
    plot = trace_views.plot
