"""What the engine did, step by step and request by request: figures, a picture, and a file for Perfetto."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class StepRecord:
    """One forward pass."""

    kind: str  # "prefill" or "decode"
    request_ids: list[int]
    num_tokens: int  # that it computes
    num_sampled: (
        int  # tokens of completions that it yields; on a GPU, the one after an unforeseen end too
    )
    preempted: list[int]  # requests that gave back their blocks to make room for it
    blocks: dict[str, int]  # `BlockManager.usage` when it was scheduled
    chunks: dict[int, tuple[int, int]] = field(
        default_factory=dict
    )  # prefill: request -> first position and end
    prefix_hits: dict[int, int] = field(
        default_factory=dict
    )  # request it admitted -> tokens found in the cache
    start: float = 0.0  # s of `perf_counter`, of the `LLM.step` call that returned it; the wall time is end - start
    end: float = 0.0
    device_time: float = (
        0.0  # s; by CUDA events around its launch, which was in the call before; on a CPU, launch
    )


class Trace:
    """The steps, in order, and the requests first admitted, by id, inside `with llm.trace() as trace:`.

    A request (with n > 1, each completion) is its `Sequence`: see its `queued_at`, `first_token_at`, `finished_at`.
    """

    def __init__(self, is_cuda: bool) -> None:
        self.steps: list[StepRecord] = []
        self.requests: dict[int, Sequence] = {}
        self.began, self._is_cuda = perf_counter(), is_cuda
        self._launched: dict[
            int, tuple[StepRecord, float, Any]
        ] = {}  # by id(step); when, and the event before it

    def scheduled(self, step: Step, scheduler: Scheduler) -> None:
        """The engine is about to launch a step."""
        victims = [seq.seq_id for seq in scheduler.preempted]
        kind, ids = "prefill" if step.is_prefill else "decode", [seq.seq_id for seq in step.seqs]
        record = StepRecord(
            kind, ids, step.num_tokens, sum(step.yields), victims, scheduler.block_manager.usage()
        )
        for seq in step.seqs if step.is_prefill else ():
            start = seq.num_computed_tokens - seq.num_scheduled_tokens
            record.chunks[seq.seq_id] = start, seq.num_computed_tokens
            if start == seq.num_cached_tokens:  # admitted just now: later chunks start behind that
                record.prefix_hits[seq.seq_id] = start
            if len(seq.token_ids) == seq.num_prompt_tokens:  # else it was preempted
                self.requests[seq.seq_id] = seq
        event = self._is_cuda and torch.cuda.current_stream().record_event(
            torch.cuda.Event(enable_timing=True)
        )
        self._launched[id(step)] = record, perf_counter(), event

    def completed(
        self, step: Step, tokens: PendingTokens, finished: list[Sequence], start: float
    ) -> None:
        """The engine knows a step's tokens, and is about to return from the call that began at `start`."""
        if id(step) not in self._launched:
            return  # launched before the trace began
        record, launch, event = self._launched.pop(id(step))
        record.start, record.end = start, perf_counter()
        # Both events have passed, since the tokens were waited for; CUDA counts milliseconds.
        record.device_time = (
            event.elapsed_time(tokens.copied) / 1e3 if event else tokens.launched_at - launch
        )
        self.steps.append(record)
        for seq, yields in zip(step.seqs, step.yields) if step.is_prefill else ():
            if yields and seq.first_token_at is None:
                seq.first_token_at = record.end
        for seq in finished:
            seq.finished_at = record.end

    def summary(self) -> dict[str, float]:
        """Print and return figures; `ttft`: time from being queued to the first token, `tpot`: per token after it."""
        steps, done = (
            self.steps,
            [seq for seq in self.requests.values() if seq.finished_at and seq.first_token_at],
        )
        computed = sum(step.num_tokens for step in steps if step.kind == "prefill")
        hits = sum(sum(step.prefix_hits.values()) for step in steps)
        made = sum(step.num_sampled for step in steps)
        seconds = steps[-1].end - steps[0].start if steps else 0.0
        result = {
            "requests_finished": len(done),
            "prefill_tokens": computed,
            "completion_tokens": made,
            "seconds": seconds,
            "device_seconds": sum(step.device_time for step in steps),
            "tokens_per_second": made / (seconds or 1),
            "prefix_hit_tokens": hits,
            "prefix_hit_rate": hits / (hits + computed or 1),
            "preemptions": sum(len(step.preempted) for step in steps),
        }
        ttft = [seq.first_token_at - seq.queued_at for seq in done]
        tpot = [
            (s.finished_at - s.first_token_at) / (n - 1)
            for s in done
            if (n := len(s.completion_token_ids)) > 1
        ]
        for name, times in (("ttft", ttft), ("tpot", tpot)):
            values = (np.mean(times), *np.percentile(times, (50, 99))) if times else (0.0,) * 3
            result |= {
                f"{name}_{what}_ms": 1e3 * float(value)
                for what, value in zip(("mean", "p50", "p99"), values)
            }
        for name, value in result.items():
            print(f"{name:20}{value:12,.{0 if isinstance(value, int) else 3}f}")
        return result

    def events(self) -> list[dict[str, Any]]:
        """Chrome trace events: process 1 is the engine, 2 the requests, whose steps of a kind in a row are one."""
        names = enumerate(
            ("engine", "requests"), start=1
        )  # 0 is the system's idle process, for Perfetto
        events = [
            {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
            for pid, name in names
        ]

        def add(pid: int, tid: int, name: str, start: float, end: float, args=(), ph="X") -> dict:
            start = max(start, self.began)  # a request may have been queued before
            times = {"ts": 1e6 * (start - self.began), "dur": 1e6 * (end - start)}  # microseconds
            events.append(
                {"ph": ph, "pid": pid, "tid": tid, "name": name, **times, "args": dict(args)}
            )
            return events[-1]

        waiting, latest = {i: seq.queued_at for i, seq in self.requests.items()}, {}
        for index, step in enumerate(self.steps):
            add(1, 1, step.kind, step.start, step.end, asdict(step))
            add(1, 1, "cache", step.start, step.end, step.blocks, "C")
            waiting |= dict.fromkeys(step.preempted, step.start)
            for i in step.request_ids:
                if i in waiting:
                    add(2, i + 1, "waiting", waiting.pop(i), step.start, {"request_id": i})
                event, last_index = latest.get(i, (None, None))
                if last_index == index - 1 and event["name"] == step.kind:
                    event["dur"] = 1e6 * (step.end - self.began) - event["ts"]
                else:
                    event = add(2, i + 1, step.kind, step.start, step.end, {"request_id": i})
                latest[i] = event, index
        return events

    def save(self, path: str | Path) -> None:
        """Write Chrome trace-event JSON, which ui.perfetto.dev opens."""
        Path(path).write_text(json.dumps({"traceEvents": self.events()}), encoding="utf-8")

    def plot(self) -> Any:
        """Draw the requests, one row each, above the use of the cache; a matplotlib Figure (extra `notebook`)."""
        from matplotlib import pyplot  # here: the library runs without it

        figure, (rows, cache) = pyplot.subplots(
            2, sharex=True, figsize=(10, 6), height_ratios=(3, 1), layout="tight"
        )
        of_requests = [event for event in self.events() if event["pid"] == 2]
        for what, color in (
            ("waiting", "lightgrey"),
            ("prefill", "tab:orange"),
            ("decode", "tab:blue"),
        ):
            events = [event for event in of_requests if event["name"] == what]
            tids, starts, widths = (
                np.array([event[key] for event in events]) for key in ("tid", "ts", "dur")
            )
            rows.barh(tids - 1, widths / 1e6, left=starts / 1e6, color=color, label=what)
        rows.set(
            ylabel="request id",
            xlabel="gap: a step without the request",
            ylim=rows.get_ylim()[::-1],
        )
        times = [step.start - self.began for step in self.steps]
        for key, label, color in (
            ("blocks_in_use", "in use", "black"),
            ("blocks_cached", "can be shared", "green"),
        ):
            cache.step(
                times,
                [step.blocks[key] for step in self.steps],
                where="post",
                label=label,
                color=color,
            )
        cache.set(xlabel="time since the trace began (s)", ylabel="cache blocks", ylim=(0, None))
        for axes in (rows, cache):
            axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        return figure
