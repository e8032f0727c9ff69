"""What the engine did, step by step and request by request.

The engine calls `Trace.scheduled` and `Trace.completed`; what they record becomes figures
(`summary`), a picture (`plot`) and a file for the trace viewer Perfetto (`save`).
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = dict[str, Any]  # of the Trace Event Format, which Chrome introduced

# The two processes that a viewer shows. (Process 0 is the system's idle process for Perfetto.)
ENGINE = 1
REQUESTS = 2


@dataclass(slots=True)
class StepRecord:
    """One forward pass."""

    kind: str  # "prefill" or "decode"
    request_ids: list[int]
    num_tokens: int  # that it computes
    # Tokens of completions that it yields. On a GPU also one for each sequence that had just ended
    # by a token which the engine had not read yet when it launched the step.
    num_sampled: int
    preempted: list[int]  # requests that gave back their blocks to make room for it
    blocks: dict[str, int]  # `BlockManager.usage` when it was scheduled
    # Of a prefill: request -> positions of the first token it computes, and behind the last.
    chunks: dict[int, tuple[int, int]] = field(default_factory=dict)
    # Of requests that it admitted: request -> number of tokens found in the prefix cache.
    prefix_hits: dict[int, int] = field(default_factory=dict)
    # Seconds of `perf_counter`, around the `LLM.step` call that returned it: the wall time.
    start: float = 0.0
    end: float = 0.0
    # Seconds. On a GPU between CUDA events around its launch, which was in the call before; on a
    # CPU the launch itself.
    device_time: float = 0.0


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

    # --- recording, while the engine runs ---------------------------------------------------------

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
        """Record the end of a step, of which the engine knows the tokens now.

        `finished` are the sequences that it ended; `start`, in seconds of `perf_counter`, is when
        the call of `LLM.step` began that is about to return.
        """
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

    # --- figures ----------------------------------------------------------------------------------

    def summary(self) -> dict[str, float]:
        """Print and return figures of the steps and of the requests that finished.

        `ttft` is the time from being queued to the first token, `tpot` the time for each token
        after the first; of both there are the mean and the 50th and 99th percentile, in ms.
        """
        finished = [seq for seq in self.requests.values() if seq.first_token_at and seq.finished_at]
        figures = {
            "requests_finished": len(finished),
            **self._step_figures(),
            **latency_figures(finished),
        }
        for name, value in figures.items():
            text = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
            print(f"{name:20}{text:>12}")
        return figures

    def _step_figures(self) -> dict[str, float]:
        steps = self.steps
        prefill_tokens = sum(step.num_tokens for step in steps if step.kind == "prefill")
        completion_tokens = sum(step.num_sampled for step in steps)
        hits = sum(sum(step.prefix_hits.values()) for step in steps)
        seconds = steps[-1].end - steps[0].start if steps else 0.0
        return {
            "prefill_tokens": prefill_tokens,
            "completion_tokens": completion_tokens,
            "seconds": seconds,
            "device_seconds": sum(step.device_time for step in steps),
            "tokens_per_second": completion_tokens / (seconds or 1),
            "prefix_hit_tokens": hits,
            "prefix_hit_rate": hits / max(hits + prefill_tokens, 1),
            "preemptions": sum(len(step.preempted) for step in steps),
        }

    # --- a file for a viewer ----------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write Chrome trace-event JSON, which ui.perfetto.dev opens."""
        Path(path).write_text(json.dumps({"traceEvents": self.events()}), encoding="utf-8")

    def events(self) -> list[Event]:
        """All that was recorded, in Chrome's Trace Event Format.

        Process 1 is the engine, with a span for each step and a counter of the cache's blocks;
        process 2 the requests, each with a row ("thread") of spans.
        """
        names = [
            {"ph": "M", "pid": ENGINE, "name": "process_name", "args": {"name": "engine"}},
            {"ph": "M", "pid": REQUESTS, "name": "process_name", "args": {"name": "requests"}},
        ]
        return names + self._engine_events() + self._request_events()

    def _engine_events(self) -> list[Event]:
        events = []
        for step in self.steps:
            span = self._span(ENGINE, 1, step.kind, step.start, step.end)
            span["args"] = asdict(step)
            counter = self._span(ENGINE, 1, "cache", step.start, step.end)
            counter["ph"] = "C"
            counter["args"] = dict(step.blocks)
            events += [span, counter]
        return events

    def _request_events(self) -> list[Event]:
        """Spans of each request: it waits, is prefilled, decodes; and so again if it is preempted.

        Steps of one kind in a row make one span.
        """
        events: list[Event] = []
        waiting_since = {request_id: seq.queued_at for request_id, seq in self.requests.items()}
        latest_span: dict[int, Event] = {}  # request id -> its latest span
        latest_step: dict[int, int] = {}  # request id -> index of the last step in that span
        for index, step in enumerate(self.steps):
            for request_id in step.preempted:
                waiting_since[request_id] = step.start
            for request_id in step.request_ids:
                since = waiting_since.pop(request_id, None)
                if since is not None:
                    events.append(self._request_span(request_id, "waiting", since, step.start))
                span = latest_span.get(request_id)
                follows = latest_step.get(request_id) == index - 1
                if span is not None and follows and span["name"] == step.kind:
                    span["dur"] = self._microseconds(step.end) - span["ts"]
                else:
                    span = self._request_span(request_id, step.kind, step.start, step.end)
                    events.append(span)
                latest_span[request_id] = span
                latest_step[request_id] = index
        return events

    def _request_span(self, request_id: int, name: str, start: float, end: float) -> Event:
        span = self._span(REQUESTS, request_id + 1, name, start, end)
        span["args"] = {"request_id": request_id}
        return span

    def _span(self, process: int, row: int, name: str, start: float, end: float) -> Event:
        """An event from `start` to `end`, in seconds of `perf_counter`; "X" is such a phase."""
        start = max(start, self.began)  # a request may have been queued before
        return {
            "ph": "X",
            "pid": process,
            "tid": row,
            "name": name,
            "ts": self._microseconds(start),
            "dur": 1e6 * (end - start),
        }

    def _microseconds(self, time: float) -> float:
        return 1e6 * (time - self.began)

    # --- a picture --------------------------------------------------------------------------------

    def plot(self) -> "Figure":
        """Draw the requests, one row each, above the use of the cache (needs extra `notebook`)."""
        from matplotlib import pyplot  # here: the library runs without it

        figure, (requests, cache) = pyplot.subplots(
            2, sharex=True, figsize=(10, 6), height_ratios=(3, 1), layout="tight"
        )
        self._draw_requests(requests)
        self._draw_cache(cache)
        for axes in (requests, cache):
            axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        return figure

    def _draw_requests(self, axes: "Axes") -> None:
        spans = self._request_events()
        for name, color in (
            ("waiting", "lightgrey"),
            ("prefill", "tab:orange"),
            ("decode", "tab:blue"),
        ):
            chosen = [span for span in spans if span["name"] == name]
            axes.barh(
                [span["args"]["request_id"] for span in chosen],
                [span["dur"] / 1e6 for span in chosen],
                left=[span["ts"] / 1e6 for span in chosen],
                color=color,
                label=name,
            )
        bottom, top = axes.get_ylim()
        axes.set_ylim(top, bottom)  # the first request on top
        axes.set(ylabel="request id", xlabel="gap: a step without the request")

    def _draw_cache(self, axes: "Axes") -> None:
        times = [step.start - self.began for step in self.steps]
        for key, label, color in (
            ("blocks_in_use", "in use", "black"),
            ("blocks_cached", "can be shared", "green"),
        ):
            numbers = [step.blocks[key] for step in self.steps]
            axes.step(times, numbers, where="post", label=label, color=color)
        axes.set(xlabel="time since the trace began (s)", ylabel="cache blocks", ylim=(0, None))


def latency_figures(finished: list[Sequence]) -> dict[str, float]:
    """Statistics of the times to the first token and for each later one, over finished requests."""
    times_to_first: list[float] = []
    times_per_token: list[float] = []
    for seq in finished:
        assert seq.first_token_at is not None and seq.finished_at is not None
        times_to_first.append(seq.first_token_at - seq.queued_at)
        num_later = len(seq.completion_token_ids) - 1
        if num_later > 0:
            times_per_token.append((seq.finished_at - seq.first_token_at) / num_later)
    return {**statistics_ms("ttft", times_to_first), **statistics_ms("tpot", times_per_token)}


def statistics_ms(name: str, seconds: list[float]) -> dict[str, float]:
    """Mean, median and 99th percentile, in ms; 0 of nothing."""
    if not seconds:
        return {f"{name}_mean_ms": 0.0, f"{name}_p50_ms": 0.0, f"{name}_p99_ms": 0.0}
    median, p99 = np.percentile(seconds, (50, 99))
    return {
        f"{name}_mean_ms": 1e3 * float(np.mean(seconds)),
        f"{name}_p50_ms": 1e3 * float(median),
        f"{name}_p99_ms": 1e3 * float(p99),
    }
