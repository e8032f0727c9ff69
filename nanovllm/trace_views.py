"""What a trace shows: its steps, figures, a file for the trace viewer Perfetto, and a picture.

`Trace`, in trace.py, makes the records of steps; the views here are its methods.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # a leaf imports nothing of the engine when it runs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nanovllm.engine.sequence import Sequence
    from nanovllm.trace import Trace

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
    # Seconds: on a CPU of the launch, on a GPU between CUDA events around it, in the call before.
    device_time: float = 0.0


# --- figures --------------------------------------------------------------------------------------


def summary(trace: Trace) -> dict[str, float]:
    """Print and return figures of the steps and of the requests that finished.

    `ttft` is the time from being queued to the first token, `tpot` the time for each token after
    the first; of both there are the mean and the 50th and 99th percentile, in ms.
    """
    finished = [seq for seq in trace.requests.values() if seq.first_token_at and seq.finished_at]
    figures = {
        "requests_finished": len(finished),
        **step_figures(trace.steps),
        **latency_figures(finished),
    }
    for name, value in figures.items():
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
        print(f"{name:20}{text:>12}")
    return figures


def step_figures(steps: list[StepRecord]) -> dict[str, float]:
    """Totals of tokens, times (in seconds), prefix hits and preemptions."""
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


# --- a file for a viewer --------------------------------------------------------------------------


def save(trace: Trace, path: str | Path) -> None:
    """Write Chrome trace-event JSON, which ui.perfetto.dev opens."""
    Path(path).write_text(json.dumps({"traceEvents": events(trace)}), encoding="utf-8")


def events(trace: Trace) -> list[Event]:
    """All that was recorded, in Chrome's Trace Event Format.

    Process 1 is the engine, with a span for each step and a counter of the cache's blocks; process
    2 the requests, each with a row ("thread") of spans.
    """
    names = [
        {"ph": "M", "pid": ENGINE, "name": "process_name", "args": {"name": "engine"}},
        {"ph": "M", "pid": REQUESTS, "name": "process_name", "args": {"name": "requests"}},
    ]
    return names + engine_events(trace) + request_events(trace)


def engine_events(trace: Trace) -> list[Event]:
    """For each step a span, with its record, and the numbers of the cache's blocks."""
    engine: list[Event] = []
    for step in trace.steps:
        span = make_span(trace, ENGINE, 1, step.kind, step.start, step.end)
        span["args"] = asdict(step)
        counter = make_span(trace, ENGINE, 1, "cache", step.start, step.end)
        counter["ph"] = "C"
        counter["args"] = dict(step.blocks)
        engine += [span, counter]
    return engine


def request_events(trace: Trace) -> list[Event]:
    """Spans of each request: it waits, is prefilled, decodes; and so again if it is preempted.

    Steps of one kind in a row make one span.
    """
    spans: list[Event] = []
    waiting_since = {request_id: seq.queued_at for request_id, seq in trace.requests.items()}
    latest_span: dict[int, Event] = {}  # request id -> its latest span
    latest_step: dict[int, int] = {}  # request id -> index of the last step in that span
    for index, step in enumerate(trace.steps):
        for request_id in step.preempted:
            waiting_since[request_id] = step.start
        for request_id in step.request_ids:
            since = waiting_since.pop(request_id, None)
            if since is not None:
                spans.append(make_request_span(trace, request_id, "waiting", since, step.start))
            span = latest_span.get(request_id)
            follows = latest_step.get(request_id) == index - 1
            if span is not None and follows and span["name"] == step.kind:
                span["dur"] = microseconds(trace, step.end) - span["ts"]
            else:
                span = make_request_span(trace, request_id, step.kind, step.start, step.end)
                spans.append(span)
            latest_span[request_id] = span
            latest_step[request_id] = index
    return spans


def make_request_span(trace: Trace, request_id: int, name: str, start: float, end: float) -> Event:
    """A phase of a request, from `start` to `end`, in seconds of `perf_counter`."""
    span = make_span(trace, REQUESTS, request_id + 1, name, start, end)
    span["args"] = {"request_id": request_id}
    return span


def make_span(trace: Trace, process: int, row: int, name: str, start: float, end: float) -> Event:
    """An event from `start` to `end`, in seconds of `perf_counter`; "X" is such a phase."""
    start = max(start, trace.began)  # a request may have been queued before
    return {
        "ph": "X",
        "pid": process,
        "tid": row,
        "name": name,
        "ts": microseconds(trace, start),
        "dur": 1e6 * (end - start),
    }


def microseconds(trace: Trace, time: float) -> float:
    """Microseconds between the trace's beginning and a time of `perf_counter`."""
    return 1e6 * (time - trace.began)


# --- a picture ------------------------------------------------------------------------------------


def plot(trace: Trace) -> Figure:
    """Draw the requests, one row each, above the use of the cache (needs extra `notebook`)."""
    from matplotlib import pyplot  # here: the library runs without it

    figure, (requests, cache) = pyplot.subplots(
        2, sharex=True, figsize=(10, 6), height_ratios=(3, 1), layout="tight"
    )
    draw_requests(trace, requests)
    draw_cache(trace, cache)
    for axes in (requests, cache):
        axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return figure


def draw_requests(trace: Trace, axes: Axes) -> None:
    """Draw a row of bars for each request: grey while it waits, coloured in its steps."""
    spans = request_events(trace)
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


def draw_cache(trace: Trace, axes: Axes) -> None:
    """Draw how many blocks of the cache are in use, and how many can be shared, over time."""
    times = [step.start - trace.began for step in trace.steps]
    for key, label, color in (
        ("blocks_in_use", "in use", "black"),
        ("blocks_cached", "can be shared", "green"),
    ):
        numbers = [step.blocks[key] for step in trace.steps]
        axes.step(times, numbers, where="post", label=label, color=color)
    axes.set(xlabel="time since the trace began (s)", ylabel="cache blocks", ylim=(0, None))
