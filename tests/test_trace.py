"""A trace says what the scheduler did, costs nothing when off, and its figures, file and picture
follow from it.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Checkpoint,
    assert_idle,
    check_step_loop,
    generate_ids,
    greedy,
    make_llm,
    random_prompts,
)

from nanovllm import LLM, SamplingParams
from nanovllm.trace import StepRecord, Trace

NUM_TOKENS = 24
# Chunks, prefix hits and preemptions: prompts of up to 90 tokens with a budget of 40, and too few
# blocks.
OPTIONS: dict[str, Any] = dict(max_num_batched_tokens=40, max_model_len=128, num_kvcache_blocks=9)


@pytest.fixture(params=[0, 1])
def llm(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> LLM:
    """An engine whose steps are launched so many ahead (0: as on a CPU, 1: as on a GPU)."""
    return make_llm(checkpoint.path, request.param, **OPTIONS)


@pytest.fixture
def prompts() -> list[list[int]]:
    prompts = random_prompts(3, [90, 20, 50, 5, 33])
    return prompts + [prompts[0][:40] + tail for tail in random_prompts(4, [1, 9])]


def traced(llm: LLM, prompts: list[list[int]]) -> tuple[Trace, list[list[int]]]:
    with llm.trace() as trace:
        tokens = generate_ids(llm, prompts, [greedy(NUM_TOKENS - i) for i in range(len(prompts))])
    return trace, tokens


def test_every_step_is_recorded(
    llm: LLM, prompts: list[list[int]], record_hits: Callable[[], list[int]]
) -> None:
    untraced = generate_ids(llm, prompts, [greedy(NUM_TOKENS - i) for i in range(len(prompts))])
    llm.reset()
    num_preemptions = llm.stats()["preemptions"]
    record_hits()
    trace, tokens = traced(llm, prompts)
    assert tokens == untraced

    steps = trace.steps
    hits = [cached for step in steps for cached in step.prefix_hits.values()]
    assert hits == record_hits() and max(hits) >= 32
    num_preempted = sum(len(step.preempted) for step in steps)
    assert num_preempted == llm.stats()["preemptions"] - num_preemptions > 0
    assert all(set(step.preempted).isdisjoint(step.request_ids) for step in steps)
    for step in steps:
        assert step.blocks["blocks_free"] + step.blocks["blocks_in_use"] == 9
        assert 0 <= step.blocks["blocks_cached"] <= 9 and step.blocks["blocks_in_use"] > 0
        if step.kind == "prefill":
            assert list(step.chunks) == step.request_ids
            assert step.num_tokens == sum(end - start for start, end in step.chunks.values()) <= 40
            assert set(step.prefix_hits) <= set(step.chunks)
            assert all(step.chunks[i][0] == hit for i, hit in step.prefix_hits.items())
        else:
            assert step.kind == "decode" and step.num_tokens == len(step.request_ids)
            assert not step.chunks and not step.prefix_hits
    # Each request: chunks that follow one another from the prefix hit on, then one token a step,
    # until it is preempted and begins anew, or ends.
    for request_id, prompt, completion in zip(sorted(trace.requests), prompts, tokens, strict=True):
        position, made = None, 0
        for step in steps:
            if request_id in step.preempted:
                position = None
            if request_id not in step.request_ids:
                continue
            if step.kind == "decode":
                start, end = position, position + 1
            else:
                start, end = step.chunks[request_id]
            assert start == (step.prefix_hits[request_id] if position is None else position)
            position = end
            made += end == len(prompt) + made
        assert made == len(completion) == len(trace.requests[request_id].completion_token_ids)


def test_times_are_in_order(llm: LLM, prompts: list[list[int]]) -> None:
    trace, _ = traced(llm, prompts)
    clock = trace.began
    for step in trace.steps:
        assert clock <= step.start < step.end
        clock = step.end
        if llm._max_pending == 0:
            assert 0 < step.device_time < step.end - step.start
    for request in trace.requests.values():
        assert trace.began <= request.queued_at < request.first_token_at < request.finished_at
        own = [step for step in trace.steps if request.seq_id in step.request_ids]
        first_tokens = [
            step.end
            for step in own
            if step.chunks.get(request.seq_id, (0, 0))[1] >= request.num_prompt_tokens
        ]
        assert request.first_token_at == first_tokens[0]
        assert request.finished_at in [
            step.end for step in own[-2:]
        ]  # the last may have been launched in vain


def test_summary(llm: LLM, prompts: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    before = llm.stats()
    trace, tokens = traced(llm, prompts)
    figures = trace.summary()
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert list(printed) == list(figures)
    assert figures["requests_finished"] == len(prompts)
    assert figures["completion_tokens"] == sum(map(len, tokens))
    assert printed["completion_tokens"] == str(sum(map(len, tokens)))
    assert figures["tokens_per_second"] == pytest.approx(
        figures["completion_tokens"] / figures["seconds"]
    )
    assert figures["preemptions"] == llm.stats()["preemptions"] - before["preemptions"] > 0
    assert figures["prefix_hit_tokens"] == llm.stats()["prefix_hit_tokens"] > 0
    assert 0 < figures["prefix_hit_rate"] < 1
    for name in ("ttft", "tpot"):
        assert 0 < figures[f"{name}_p50_ms"] <= figures[f"{name}_p99_ms"]
        assert figures[f"{name}_mean_ms"] <= figures[f"{name}_p99_ms"]
    last = max(request.finished_at for request in trace.requests.values())
    assert last <= trace.steps[-1].end


def test_an_empty_trace(llm: LLM) -> None:
    with llm.trace() as trace:
        assert llm.generate([], use_tqdm=False) == []
    assert trace.summary()["tokens_per_second"] == 0 and not trace.steps and not trace.requests


def test_chrome_trace_events(llm: LLM, prompts: list[list[int]], tmp_path: Path) -> None:
    trace, _ = traced(llm, prompts)
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert all({"ph", "pid", "name", "args"} <= set(event) for event in events)
    assert all(isinstance(event["pid"], int) for event in events)
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"engine", "requests"}
    steps = [e for e in events if e["ph"] == "X" and e["pid"] == 1]
    assert [e["args"]["request_ids"] for e in steps] == [step.request_ids for step in trace.steps]
    counters = [e["args"] for e in events if e["ph"] == "C"]
    assert counters == [step.blocks for step in trace.steps]
    for request_id in trace.requests:
        spans = [e for e in events if e["pid"] == 2 and e["args"].get("request_id") == request_id]
        assert [e["name"] for e in spans[:2]] == ["waiting", "prefill"]
        ends = [e["ts"] + e["dur"] for e in spans]
        assert all(e["dur"] >= 0 for e in spans)
        assert all(
            end <= e["ts"] + 1e-3 for end, e in zip(ends[:-1], spans[1:], strict=True)
        )  # no two at once
        # As much time as the steps that it had a part in.
        busy = sum(e["dur"] for e in spans if e["name"] != "waiting")
        own = sum(step.end - step.start for step in trace.steps if request_id in step.request_ids)
        assert 1e6 * own <= busy * (1 + 1e-6)
    preempted = {i for step in trace.steps for i in step.preempted}
    waits = [e["args"]["request_id"] for e in events if e["name"] == "waiting"]
    assert preempted and all(waits.count(i) > 1 for i in preempted)


def test_plot(
    llm: LLM, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    trace, _ = traced(llm, prompts)
    figure = trace.plot()
    rows, cache = figure.axes
    assert [text.get_text() for text in rows.get_legend().get_texts()] == [
        "waiting",
        "prefill",
        "decode",
    ]
    assert cache.get_xlabel().endswith("(s)") and cache.get_ylabel() and rows.get_ylabel()
    num_bars = sum(e["pid"] == 2 and e["ph"] == "X" for e in trace.events())
    assert len(rows.patches) == num_bars
    figure.savefig(tmp_path / "timeline.png")


def test_matplotlib_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, nanovllm, nanovllm.trace; sys.exit('matplotlib' in sys.modules)"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_off_nothing_is_recorded(
    llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("called without a trace")

    for method in ("__init__", "scheduled", "completed"):
        monkeypatch.setattr(Trace, method, fail)
    monkeypatch.setattr(StepRecord, "__init__", fail)
    generate_ids(llm, prompts, greedy(4))
    check_step_loop(
        llm, [[1, 2, 3], [4, 5]], generate_ids(llm, [[1, 2, 3], [4, 5]], greedy(3)), [2, 3]
    )


def test_a_trace_begins_and_ends_between_any_two_steps(llm: LLM, prompts: list[list[int]]) -> None:
    ids = [llm.add_request(prompt, greedy(8)) for prompt in prompts]
    untraced = [llm.step()[1] for _ in range(3)]
    launched_before = len(llm._pending)
    with llm.trace() as trace:
        num_tokens = [llm.step()[1] for _ in range(6)]
    expected = num_tokens[launched_before:]  # one that was launched before the trace is not its own
    assert [s.num_tokens if s.kind == "prefill" else -s.num_tokens for s in trace.steps] == expected
    assert untraced and set(trace.requests) <= set(ids)
    trace.summary()
    trace.events()
    while not llm.is_finished():
        llm.step()
    assert len(trace.steps) == len(expected)
    assert_idle(llm)


def test_one_trace_in_another_has_the_steps_to_itself(llm: LLM) -> None:
    with llm.trace() as outer:
        generate_ids(llm, [[1, 2, 3]], greedy(3))
        with llm.trace() as inner:
            generate_ids(llm, [[4, 5, 6]], greedy(4))
        generate_ids(llm, [[7, 8, 9]], greedy(5))
    assert (len(outer.steps), len(inner.steps)) == (8, 4)
    assert (len(outer.requests), len(inner.requests)) == (2, 1)
    assert llm._trace is None


def test_a_trace_outlives_an_error_and_a_reset(
    llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with llm.trace() as trace:
        generate_ids(llm, prompts, greedy(NUM_TOKENS))
        assert llm.scheduler.counters["preemptions"] > 0
        num_steps, launch = len(trace.steps), llm.model_runner.launch
        monkeypatch.setattr(llm.model_runner, "launch", None)
        with pytest.raises(TypeError):
            llm.generate(prompts, greedy(4), use_tqdm=False)
        monkeypatch.setattr(llm.model_runner, "launch", launch)
        assert len(trace.steps) == num_steps
        generate_ids(llm, prompts, greedy(NUM_TOKENS))
    assert sum(step.kind == "decode" for step in trace.steps[num_steps:]) >= NUM_TOKENS - 1
    assert sum(request.finished_at is None for request in trace.requests.values()) <= len(prompts)
    with pytest.raises(KeyError), llm.trace():
        raise KeyError
    assert llm._trace is None


def test_completions_streams_and_aborted_requests(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, 1)
    params = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, n=3)
    with llm.trace() as trace:
        llm.generate([[1, 2, 3]], params, use_tqdm=False)
        aborted = llm.add_request([4, 5, 6], greedy(50))
        for _ in range(5):
            llm.step()
        llm.abort(aborted)
        while not llm.is_finished():
            llm.step()
        for _ in llm.stream([[7, 8, 9]], greedy(4)):
            pass
    assert len(trace.requests) == 3 + 1 + 1
    lengths = [len(request.completion_token_ids) for request in trace.requests.values()]
    assert lengths[:3] == [6, 6, 6] and 0 < lengths[3] < 50 and lengths[4] == 4
    unfinished = [i for i, request in trace.requests.items() if request.finished_at is None]
    assert unfinished == [aborted]
    assert trace.requests[aborted].finish_reason == "abort"
    assert trace.summary()["requests_finished"] == 4
    assert llm.stats()["requests"] == 5 and llm.stats()["completion_tokens"] == sum(lengths)
    assert_idle(llm)


def test_stats_count_since_the_start(llm: LLM, prompts: list[list[int]]) -> None:
    zero = dict.fromkeys(
        ("requests", "prompt_tokens", "completion_tokens", "prefix_hit_tokens", "preemptions"), 0
    )
    assert llm.stats() == {**zero, "blocks_free": 9, "blocks_in_use": 0, "blocks_cached": 0}
    tokens = generate_ids(llm, prompts, greedy(NUM_TOKENS))
    first = llm.stats()
    assert first["requests"] == len(prompts) and first["prompt_tokens"] == sum(map(len, prompts))
    assert first["completion_tokens"] == sum(map(len, tokens))
    assert first["preemptions"] == llm.scheduler.counters["preemptions"] > 0
    assert first["prefix_hit_tokens"] > 0 and first["blocks_cached"] > 0
    llm.reset()
    second = llm.stats()
    assert second == {**first, "blocks_free": 9, "blocks_in_use": 0, "blocks_cached": 0}
    llm.add_request(prompts[1], greedy(3))
    llm.step()
    third = llm.stats()
    assert third["requests"] == first["requests"] + 1 and third["blocks_in_use"] == 2
    assert third["completion_tokens"] == first["completion_tokens"] + 1
    third["requests"] = 0  # a copy: nobody else's counters
    assert llm.stats()["requests"] == first["requests"] + 1


def test_preemptions_inside_an_inner_trace_are_its_own(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, max_model_len=128, kvcache_block_size=4, num_kvcache_blocks=40)
    prompts = [[i + 5] * 20 for i in range(8)]
    with llm.trace() as outer:
        with llm.trace() as inner:
            llm.generate(prompts, greedy(60), use_tqdm=False)
        llm.generate(prompts[:1], greedy(5), use_tqdm=False)
    assert sum(len(step.preempted) for step in inner.steps) == llm.stats()["preemptions"] > 0
    assert not any(step.preempted for step in outer.steps)
    assert outer.summary()["completion_tokens"] == 5
