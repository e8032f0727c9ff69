"""Random calls of the public interface, from one thread or two, with valid and invalid arguments.

Every outcome is a right result or a documented exception, and after each round of calls the engine
is empty and usable. A result is right if it is what the request gives alone. Here this takes a few
seconds; FUZZ_SECONDS=60, as .ci/run sets it, is a longer run.
"""

import gc
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import assert_idle, make_llm

from nanovllm import DEMO_MODEL, LLM, SamplingParams, StructuredOutputsParams

SECONDS = float(os.environ.get("FUZZ_SECONDS", "4"))
CALLS = 25  # of each thread in a round
KEYS = ("text", "token_ids", "finish_reason", "stop_reason")

TEXTS = ("Hello", "The capital of France is", "def f(x):\n" * 6, "Hello there, how are you?" * 3)
PARAMS = (
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=[" the", "qu"]),
    SamplingParams(seed=7, max_tokens=9, logprobs=2, top_k=20, top_p=0.9),
    SamplingParams(seed=8, max_tokens=16, repetition_penalty=1.3, min_tokens=3, n=2),
    SamplingParams(
        seed=9, max_tokens=14, structured_outputs=StructuredOutputsParams(regex="[a-z ]{5,20}")
    ),
)
PROMPTS: tuple[Any, ...] = (*TEXTS, [1, 2, 3] * 15, [5])
CONVERSATIONS = ([{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Who?"}] * 1)
WRONG_PROMPTS: tuple[Any, ...] = (None, 5, [], [10**9], [-1], [[1]], [1] * 5000, b"x", [None], {})
WRONG_PARAMS: tuple[Any, ...] = (5, "x", [], {}, SamplingParams(stop_token_ids=[10**8]))
WRONG_OPTIONS: tuple[dict[str, Any], ...] = (
    dict(temperature=-1),
    dict(top_p=0),
    dict(max_tokens="x"),
    dict(stop=5),
    dict(logit_bias={-1: 0}),
    dict(no_such_option=1),
    dict(allowed_token_ids=[]),
)


@dataclass(frozen=True)
class Case:
    """A valid request."""

    prompt: Any
    params: SamplingParams


@dataclass
class Round:
    """What the threads of a round share; `list.append` and the like need no lock."""

    requested: dict[int, tuple[Case, int]] = field(default_factory=dict)  # and resets before it
    reported: list[tuple[int, Any]] = field(default_factory=list)
    aborted: set[int] = field(default_factory=set)
    resets: int = 0  # begun, and ended: requests of before one may be lost
    seen: Counter[str] = field(default_factory=Counter)
    errors: list[BaseException] = field(default_factory=list)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [Case(prompt, params) for prompt in PROMPTS for params in PARAMS]


@pytest.fixture(scope="module", params=[0, 1], ids=["depth-0", "depth-1"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A cache so small that sequences are preempted, and prompts computed in chunks."""
    options = dict(max_model_len=160, num_kvcache_blocks=14, max_num_seqs=6)
    llm = make_llm(DEMO_MODEL, request.param, max_num_batched_tokens=50, **options)
    yield llm
    llm.exit()


@pytest.fixture(scope="module")
def expected(llm: LLM, cases: list[Case]) -> dict[int, Any]:
    """What each case gives alone, by `id`."""
    return {id(case): alone(llm, case) for case in cases}


def alone(llm: LLM, case: Case) -> Any:
    llm.reset()
    (result,) = llm.generate([case.prompt], case.params, use_tqdm=False)
    return result


def completions(result: Any) -> list[Any]:
    return result.get("completions", [result])


class Caller:
    """One thread's random calls."""

    def __init__(self, llm: LLM, seed: str, shared: Round, cases: list[Case], expected: Any):
        self.llm = llm
        self.random = random.Random(seed)
        self.shared = shared
        self.cases = cases
        self.expected = expected
        self.streams: list[Iterator[Any]] = []  # left open for a while

    def run(self) -> None:
        calls: dict[Callable[[], None], int] = {
            self.generate: 4,
            self.chat: 2,
            self.stream: 5,
            self.add_request: 6,
            self.step: 12,
            self.abort: 3,
            self.reset: 1,
            self.look: 3,
            self.wrong: 6,
            self.close: 3,
        }
        try:
            for _ in range(CALLS):
                (call,) = self.random.choices(list(calls), list(calls.values()))
                with suppress(KeyboardInterrupt):
                    call()
        except KeyboardInterrupt:
            pass  # it came between two calls, and ends this round
        except BaseException as error:  # a thread would swallow it
            self.shared.errors.append(error)
        for stream in self.streams:
            stream.close()  # type: ignore[attr-defined]

    def some(self) -> list[Case]:
        return self.random.choices(self.cases, k=self.random.randint(1, 4))

    def check(self, case: Case, result: Any) -> None:
        want = self.expected[id(case)]
        assert result["prompt_token_ids"] == want["prompt_token_ids"]
        pairs = zip(completions(result), completions(want), strict=True)
        for got, wanted in pairs:
            assert {key: got[key] for key in KEYS} == {key: wanted[key] for key in KEYS}
            for logprobs, right in zip(
                got["logprobs"] or [], wanted["logprobs"] or [], strict=True
            ):
                assert logprobs == pytest.approx(right, abs=1e-4)

    @contextmanager
    def may_be_busy(self, what: str) -> Iterator[None]:
        """Requests of this thread or the other one may be unfinished."""
        try:
            yield
            self.shared.seen[what] += 1
        except RuntimeError as error:
            assert "unfinished" in str(error)
            self.shared.seen["unfinished"] += 1

    def generate(self) -> None:
        some = self.some()
        with self.may_be_busy("generate"):
            prompts = [case.prompt for case in some]
            params = [case.params for case in some]
            results = self.llm.generate(prompts, params, use_tqdm=False)
            assert len(results) == len(some)
            for case, result in zip(some, results, strict=True):
                self.check(case, result)

    def chat(self) -> None:
        with self.may_be_busy("chat"):
            params = SamplingParams(temperature=0, max_tokens=3)
            results = self.llm.chat(list(CONVERSATIONS), params, use_tqdm=False)
            assert [len(result["token_ids"]) > 0 for result in results] == [True, True]

    def stream(self) -> None:
        some = self.some()
        resets = self.shared.resets
        prompts = [case.prompt for case in some]
        stream = self.llm.stream(prompts, [case.params for case in some])
        if self.random.random() < 0.4:  # left at some point
            for _ in range(self.random.randint(0, 5)):
                next(stream, None)
            if self.random.random() < 0.7:
                self.streams.append(stream)
            return
        parts: dict[tuple[int, int], list[Any]] = {}
        for part in stream:
            parts.setdefault((part["index"], part["completion"]), []).append(part)
            if self.random.random() < 0.05:
                self.look()
        complete = True
        for index, case in enumerate(some):
            want = self.expected[id(case)]
            for number, completion in enumerate(completions(want)):
                got = parts.get((index, number), [])
                ids = [i for part in got for i in part["token_ids"]]
                assert ids == completion["token_ids"][: len(ids)]
                text = "".join(part["text"] for part in got)
                if got and got[-1]["finish_reason"]:
                    assert (ids, text) == (completion["token_ids"], completion["text"])
                    assert got[-1]["finish_reason"] == completion["finish_reason"]
                else:
                    complete = False
        assert complete or self.shared.resets != resets
        self.shared.seen["stream"] += complete

    def close(self) -> None:
        if self.streams:
            stream = self.streams.pop(self.random.randrange(len(self.streams)))
            if self.random.random() < 0.5:
                stream.close()  # type: ignore[attr-defined]
            del stream
            gc.collect(0)

    def add_request(self) -> None:
        (case, *_) = self.some()
        resets = self.shared.resets
        request_id = self.llm.add_request(case.prompt, case.params)
        self.shared.requested[request_id] = (case, resets)

    def step(self) -> None:
        for _ in range(self.random.randint(1, 8)):
            results, num_tokens = self.llm.step()
            assert type(num_tokens) is int
            self.shared.reported += results

    def abort(self) -> None:
        ids = [*self.shared.requested, -1, 10**9]
        request_id = self.random.choice(ids)
        self.shared.aborted.add(request_id)
        self.llm.abort(request_id)

    def reset(self) -> None:
        if self.random.random() < 0.5:
            self.shared.resets += 1
            try:
                self.llm.reset()
            finally:
                self.shared.resets += 1

    def look(self) -> None:
        stats = self.llm.stats()
        assert all(type(value) is int for value in stats.values())
        assert stats["blocks_free"] + stats["blocks_in_use"] == 14
        assert self.llm.is_finished() in (True, False)
        tokenizer = self.llm.get_tokenizer()
        assert tokenizer is not None and tokenizer.decode([5])
        with self.llm.trace():
            self.shared.reported += self.llm.step()[0]

    def wrong(self) -> None:
        """Each is an exception, and nothing is queued."""
        llm = self.llm
        good = self.random.choice(self.cases)
        prompt = self.random.choice(WRONG_PROMPTS)
        params = self.random.choice(WRONG_PARAMS)
        options = self.random.choice(WRONG_OPTIONS)
        messages = self.random.choice([None, "hi", ["hi"], [5], [[{}], 5]])
        calls: list[Callable[[], Any]] = [
            lambda: llm.generate([good.prompt, prompt], good.params, use_tqdm=False),
            lambda: llm.generate([good.prompt, good.prompt], params, use_tqdm=False),
            lambda: llm.generate([good.prompt], [good.params] * 2, use_tqdm=False),
            lambda: llm.stream([good.prompt, prompt], good.params),
            lambda: llm.stream([good.prompt, good.prompt], params),
            lambda: llm.add_request(prompt, good.params),
            lambda: llm.add_request(good.prompt, params),
            lambda: llm.chat(messages, use_tqdm=False),
            lambda: SamplingParams(**options),
        ]
        with pytest.raises((TypeError, ValueError)):
            self.random.choice(calls)()
        self.shared.seen["wrong"] += 1


def finish(llm: LLM, shared: Round, caller: Caller, are_ids_known: bool) -> None:
    """The end of a round: the engine empties, and every request was answered once."""
    del caller.streams[:]
    gc.collect(0)
    for _ in range(2000):
        if llm.is_finished():
            break
        shared.reported += llm.step()[0]
    assert_idle(llm)
    reported = Counter(request_id for request_id, _ in shared.reported)
    assert not reported or max(reported.values()) == 1
    for request_id, result in shared.reported:
        if request_id not in shared.requested:
            assert not are_ids_known
            continue
        case, _ = shared.requested[request_id]
        if result["finish_reason"] == "abort" or "completions" in result:
            assert request_id in shared.aborted or "completions" in result
        else:
            caller.check(case, result)
            shared.seen["step"] += 1
    for request_id, (_, resets) in shared.requested.items():
        assert request_id in reported or resets != shared.resets or not are_ids_known
    case = caller.random.choice(caller.cases)
    caller.check(case, llm.generate([case.prompt], case.params, use_tqdm=False)[0])
    assert_idle(llm)


@pytest.mark.parametrize("mode", ["one thread", "two threads", "Ctrl-C"])
def test_random_calls(llm: LLM, cases: list[Case], expected: dict[int, Any], mode: str) -> None:
    seen: Counter[str] = Counter()
    end = time.monotonic() + SECONDS / 6  # three modes at two depths
    number = 0
    while number == 0 or time.monotonic() < end:
        shared = Round()
        seeds = [f"{mode} {number} {index}" for index in range(1 + (mode == "two threads"))]
        callers = [Caller(llm, seed, shared, cases, expected) for seed in seeds]
        if mode == "two threads":
            threads = [threading.Thread(target=caller.run, daemon=True) for caller in callers]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=120)
                assert not thread.is_alive(), f"round {number} hangs"
        elif mode == "Ctrl-C":
            with interrupts(callers[0].random):
                callers[0].run()
        else:
            callers[0].run()
        for error in shared.errors:
            raise AssertionError(f"round {number}") from error
        for caller in callers[1:]:
            del caller.streams[:]
        finish(llm, shared, callers[0], are_ids_known=mode != "Ctrl-C")
        seen += shared.seen
        number += 1
    print(mode, number, seen)  # for `pytest -s`
    if number > 20:
        assert {"generate", "chat", "stream", "step", "wrong", "unfinished"} <= set(seen)


@contextmanager
def interrupts(source: random.Random) -> Iterator[None]:
    """Ctrl-C at random moments, raised inside only."""

    def interrupt(signal_number: int, frame: Any) -> None:
        signal.setitimer(signal.ITIMER_REAL, source.uniform(0.002, 0.2))
        signal.raise_signal(signal.SIGINT)

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
