"""`AsyncLLM`: requests of any thread and coroutine, all at once; each must get what `generate`
returns for it.
"""

import asyncio
import concurrent.futures
import gc
import os
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    Checkpoint,
    assert_idle,
    engine_options,
    greedy,
    make_checkpoint,
    random_prompts,
)
from test_ownership import in_child, in_threads
from test_pooling import write_modules

from nanovllm import DEMO_MODEL, AsyncLLM, EngineError, SamplingParams
from nanovllm.engine.scheduler import Scheduler
from nanovllm.jobs.tickets import Streamed
from nanovllm.text.detokenizer import Detokenizer

REPO = Path(__file__).resolve().parent.parent
PROMPTS = random_prompts(4, [5, 9, 20, 7, 33, 16, 1, 12])
SECONDS = 60  # to wait for what takes a moment
CHAT = [{"role": "user", "content": "introduce yourself"}]


def make_async(path: str, depth: int | None = None, **options: Any) -> AsyncLLM:
    llm = AsyncLLM(path, **engine_options(**options))
    if depth is not None:
        llm.llm._max_pending = depth
    return llm


def wait_until_idle(llm: AsyncLLM) -> None:
    """Requests that were dropped may still be in the engine."""
    end = time.monotonic() + SECONDS
    while not (llm._owner._inbox.empty() and llm.llm.is_finished() and not llm._owner._in_flight):
        assert time.monotonic() < end
        time.sleep(0.001)
    with llm.llm._lock:
        assert_idle(llm.llm)


@pytest.fixture(scope="module")
def shared(checkpoint: Checkpoint) -> Iterator[AsyncLLM]:
    with make_async(checkpoint.path) as llm:
        yield llm


@pytest.fixture(params=[0, 1], ids=["depth-0", "depth-1"])
def llm(
    request: pytest.FixtureRequest, shared: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> Iterator[AsyncLLM]:
    """The shared engine, reading tokens at once or, as on a GPU, one step late."""
    monkeypatch.setattr(shared.llm, "_max_pending", request.param)
    yield shared
    wait_until_idle(shared)


@pytest.fixture(scope="module")
def demo() -> Iterator[AsyncLLM]:
    with make_async(DEMO_MODEL) as llm:
        yield llm
        wait_until_idle(llm)


def varied_params(number: int) -> SamplingParams:
    """Parameters of which `generate` gets the same tokens, whatever else is in the batch."""
    r = random.Random(number)
    options: dict[str, Any] = dict(max_tokens=r.randint(1, 30), ignore_eos=True)
    if number % 3 == 0:
        return SamplingParams(temperature=0, **options)
    n = r.choice([1, 3])
    return SamplingParams(
        temperature=0.8, seed=number, n=n, logprobs=r.choice([None, 2]), top_k=40, **options
    )


def tokens(result: Any) -> list[list[int]]:
    return [completion.token_ids for completion in result.outputs]


def generate(llm: AsyncLLM, prompts: list[Any], params: Any) -> list[Any]:
    return llm.llm.generate(prompts, params, use_tqdm=False)


# --- what callers get -----------------------------------------------------------------------------


def test_many_threads_get_what_generate_returns(llm: AsyncLLM) -> None:
    params = [varied_params(number) for number in range(len(PROMPTS))]
    want = generate(llm, PROMPTS, params)

    def work(shift: int) -> None:
        order = [(index + shift) % len(PROMPTS) for index in range(len(PROMPTS))]
        futures = {index: llm.submit(PROMPTS[index], params[index]) for index in order}
        for index, future in futures.items():
            result = future.result(SECONDS)
            assert tokens(result) == tokens(want[index])
            assert result.finish_reason == want[index].finish_reason == "length"
            assert result.prompt_token_ids == PROMPTS[index]
            for ours, theirs in zip(result.logprobs or [], want[index].logprobs or [], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4)

    outcomes = in_threads(*[lambda shift=shift: work(shift) for shift in range(6)])
    assert outcomes == [None] * 6


def test_all_kinds_of_requests_at_once(demo: AsyncLLM) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    cases: list[tuple[Any, SamplingParams]] = [
        ("Hello", SamplingParams(temperature=0, max_tokens=20)),
        ("What is a prime number?", SamplingParams(temperature=0, max_tokens=40, stop=[" a", "s"])),
        ("one two", SamplingParams(temperature=1, seed=5, n=3, max_tokens=15)),
        ({"prompt": "x y"}, SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1)),
        ("JSON:", SamplingParams(seed=1, structured_outputs={"json": schema}, max_tokens=30)),
        ([5, 6, 7], SamplingParams(temperature=0, max_tokens=5, detokenize=False)),
    ]
    prompts = [prompt for prompt, _ in cases]
    params = [param for _, param in cases]
    want = generate(demo, prompts, params)
    (chat,) = demo.llm.chat(CHAT, greedy(12), use_tqdm=False)
    vectors = demo.llm.embed(prompts, use_tqdm=False)

    async def stream(parts: AsyncIterator[Any], n: int) -> list[dict[str, Any]]:
        results = [{"text": "", "token_ids": [], "finish_reason": None} for _ in range(n)]
        async for part in parts:
            result = results[part.completion]
            assert part.index == 0 and result["finish_reason"] is None
            result["text"] += part.text
            result["token_ids"] += part.token_ids
            result["finish_reason"] = part.finish_reason
        return results

    async def work() -> None:
        got = await asyncio.gather(
            *[demo.generate(prompt, param) for prompt, param in cases],
            *[demo.embed(prompt) for prompt in prompts],
            *[stream(demo.stream(prompt, param), param.n) for prompt, param in cases],
            demo.chat(CHAT, greedy(12)),
            stream(demo.stream_chat(CHAT, greedy(12)), 1),
            demo.chat(CHAT, greedy(12), {"add_generation_prompt": True}, tools=None),
        )
        num = len(cases)
        for index in range(num):
            result, embedding, streamed = got[index], got[num + index], got[2 * num + index]
            for ours, theirs in zip(result.outputs, want[index].outputs, strict=True):
                assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
                assert (ours.finish_reason, ours.stop_reason) == (
                    theirs.finish_reason,
                    theirs.stop_reason,
                )
            assert embedding.embedding == pytest.approx(vectors[index].embedding, abs=1e-5)
            assert embedding.prompt_token_ids == vectors[index].prompt_token_ids
            for ours, theirs in zip(streamed, want[index].outputs, strict=True):
                assert ours == {key: theirs[key] for key in ours}
        assert got[-3].token_ids == got[-1].token_ids == chat.token_ids
        assert got[-2][0]["text"] == chat.text

    asyncio.run(work())
    futures = [demo.submit(prompt, param) for prompt, param in cases]
    futures += [demo.submit_chat(CHAT, greedy(12))]
    for future, theirs in zip(futures, [*want, chat], strict=True):
        assert tokens(future.result(SECONDS)) == tokens(theirs)
    embedding = demo.submit_embed(prompts[0], truncate_prompt_tokens=1).result(SECONDS)
    assert len(embedding.prompt_token_ids) == 1 and embedding.request_id.isdigit()


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("depth", [0, 1])
def test_embeddings_and_completions_share_steps(
    checkpoint: Checkpoint, tmp_path: Path, pooling: str, depth: int
) -> None:
    """Also where prompts are equal, computed in chunks, or have their log-probabilities read."""
    path = checkpoint.path
    if pooling == "mean":
        path = make_checkpoint(tmp_path).path
        write_modules(path, "Pooling", "Normalize", pooling_mode_mean_tokens=True)
    llm = make_async(path, depth, max_num_batched_tokens=40, num_kvcache_blocks=40)
    prompts = [*PROMPTS, *random_prompts(9, [90, 60])]
    params = [
        SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1 if index % 3 == 0 else None)
        for index in range(len(prompts))
    ]
    want = generate(llm, prompts, params)
    vectors = llm.llm.embed(prompts, use_tqdm=False)
    llm.llm.reset_prefix_cache()
    with llm.llm.trace() as trace:
        with llm.llm._lock:  # so that they come at once
            embedded = [llm.submit_embed(prompt) for prompt in prompts]
            completed = [llm.submit(*pair) for pair in zip(prompts, params, strict=True)]
            embedded += [llm.submit_embed(prompt) for prompt in prompts]
        for future, vector in zip(embedded, vectors * 2, strict=True):
            assert future.result(SECONDS).embedding == pytest.approx(vector.embedding, abs=1e-5)
        for future, result in zip(completed, want, strict=True):
            assert tokens(future.result(SECONDS)) == tokens(result)
            ours, theirs = future.result().prompt_logprobs, result.prompt_logprobs
            assert (ours is None) == (theirs is None)
            for entry, other in zip((ours or [])[1:], (theirs or [])[1:], strict=True):
                assert entry == pytest.approx(other, abs=1e-4)
    kinds = [
        {trace.requests[seq_id].readout is None for seq_id in step.request_ids}
        for step in trace.steps
    ]
    assert {True, False} in kinds
    wait_until_idle(llm)
    llm.close()


def test_what_is_wrong_is_raised_in_the_caller(demo: AsyncLLM) -> None:
    cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: demo.submit("x" * 9999), ValueError, "max_model_len"),
        (lambda: demo.submit([]), ValueError, "empty"),
        (lambda: demo.submit(["a", "b"]), TypeError, "prompt 0"),  # type: ignore[list-item]
        (lambda: demo.submit("x", SamplingParams(logprobs=999)), ValueError, "logprobs"),
        (lambda: demo.submit_chat([]), ValueError, "one conversation, not 0"),
        (lambda: demo.submit_chat([CHAT, CHAT]), ValueError, "not 2"),  # type: ignore[list-item]
        (lambda: demo.submit_chat(CHAT, enable_thinkin=True), TypeError, "enable_thinkin"),
        (lambda: demo.submit_embed("x", prompt_name="passage"), ValueError, "no prompt 'passage'"),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()

    async def work() -> None:
        with pytest.raises(ValueError, match="max_model_len"):
            await demo.generate("x" * 9999)
        with pytest.raises(ValueError, match="one conversation"):
            await demo.chat([])
        with pytest.raises(ValueError, match="no prompt 'passage'"):
            await demo.embed("x", prompt_name="passage")
        with pytest.raises(ValueError, match="empty"):
            await anext(demo.stream([]))

    asyncio.run(work())
    assert demo.llm.is_finished() and demo.failure is None


def test_no_numbers_end_one_request(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `generate`; an embedding has no place to say so, and raises."""
    (want,) = generate(llm, PROMPTS[:1], greedy(10))
    postprocess = Scheduler.postprocess

    def spoil(self: Any, step: Any, token_ids: list[int], logprobs: Any = None) -> Any:
        spoilt = [
            -1 if seq.num_prompt_tokens == 20 else token_id
            for seq, token_id in zip(step.seqs, token_ids, strict=True)
        ]
        return postprocess(self, step, spoilt, logprobs)

    monkeypatch.setattr(Scheduler, "postprocess", spoil)
    good = llm.submit(PROMPTS[0], greedy(10))
    bad = llm.submit(PROMPTS[2], greedy(10))
    vector = llm.submit_embed(PROMPTS[2])
    assert tokens(good.result(SECONDS)) == tokens(want)
    assert bad.result(SECONDS).finish_reason == "error"
    assert "NaN" in str(bad.result().stop_reason)
    with pytest.raises(RuntimeError, match="could not be embedded: .*NaN"):
        vector.result(SECONDS)
    monkeypatch.undo()
    monkeypatch.setattr(llm.llm, "_embedding", lambda *_: np.array([1.0, np.nan]))
    with pytest.raises(RuntimeError, match="could not be embedded: .*NaN"):
        asyncio.run(llm.embed(PROMPTS[0]))


# --- requests that end early ----------------------------------------------------------------------


def test_a_cancelled_future_ends_its_request(llm: AsyncLLM) -> None:
    want = generate(llm, PROMPTS[:2], greedy(20))
    kept = llm.submit(PROMPTS[0], greedy(20))
    running = llm.submit(PROMPTS[2], greedy(200))
    while not llm.llm.scheduler.running:
        time.sleep(0.001)
    with llm.llm._lock:  # the next two are cancelled before the engine has seen them
        early = llm.submit(PROMPTS[3], greedy(200))
        vector = llm.submit_embed(PROMPTS[3])
        other = llm.submit(PROMPTS[1], greedy(20))
        assert running.cancel() and early.cancel() and vector.cancel()
        assert running.cancel()  # again
    cancelled = {running, early, vector}
    done, left = concurrent.futures.wait({kept, other, *cancelled}, SECONDS)
    assert not left and {future for future in done if future.cancelled()} == cancelled
    assert tokens(kept.result()) == tokens(want[0])
    assert tokens(other.result()) == tokens(want[1])
    assert not kept.cancel() and not kept.cancelled()
    with pytest.raises(CancelledError):
        running.result()


def test_a_cancelled_coroutine_ends_its_request(llm: AsyncLLM) -> None:
    (want,) = generate(llm, PROMPTS[:1], greedy(40))

    async def work() -> None:
        kept = asyncio.create_task(llm.generate(PROMPTS[0], greedy(40)))
        tasks = [asyncio.create_task(llm.generate(PROMPTS[1], greedy(200))) for _ in range(3)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(llm.generate(PROMPTS[2], greedy(240)), 0.01)
        while not llm.llm.scheduler.running:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        assert tokens(await kept) == tokens(want)

    asyncio.run(work())


def test_leaving_a_stream_ends_its_request(llm: AsyncLLM) -> None:
    async def read(closes: bool) -> None:
        parts = llm.stream(PROMPTS[1], SamplingParams(n=2, seed=0, max_tokens=200))
        num_parts = 0
        async for _ in parts:
            num_parts += 1
            if num_parts == 3:
                break
        if closes:
            await parts.aclose()
            wait_until_idle(llm)

    asyncio.run(read(closes=True))
    asyncio.run(read(closes=False))
    wait_until_idle(llm)
    # An event loop that is closed under the stream.
    loop = asyncio.new_event_loop()
    parts = llm.stream(PROMPTS[0], greedy(200))
    loop.run_until_complete(anext(parts))
    waits = loop.create_task(llm.generate(PROMPTS[0], greedy(100)))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.run_until_complete(loop.shutdown_default_executor())
    waits._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    wait_until_idle(llm)


def test_a_slow_reader_gets_all_tokens_in_few_parts(llm: AsyncLLM) -> None:
    (want,) = generate(llm, PROMPTS[:1], greedy(60))
    streams: list[Streamed] = []
    receive = Streamed.receive

    def recording(self: Streamed, message: Any) -> None:
        streams.append(self)
        receive(self, message)
        assert self._messages.qsize() <= 2

    async def read() -> list[Any]:
        parts = []
        async for part in llm.stream(PROMPTS[0], greedy(60)):
            parts.append(part)
            time.sleep(0.02)  # also the event loop stands still
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Streamed, "receive", recording)
        parts = asyncio.run(read())
    assert [token_id for part in parts for token_id in part.token_ids] == want.token_ids
    assert len(parts) == len(streams) < 40
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_a_stream_that_cannot_be_decoded_fails_alone(
    demo: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (want,) = generate(demo, ["Hello"], greedy(20))
    take = Detokenizer.take
    spoilt: list[Detokenizer] = []  # the first one that is asked

    def fail(self: Detokenizer, is_last: bool) -> str:
        spoilt.append(self)
        if self is spoilt[0]:
            raise ValueError("of a tokenizer")
        return take(self, is_last)

    async def read() -> list[int]:
        parts = demo.stream("Hello", greedy(20))
        return [token_id async for part in parts for token_id in part.token_ids]

    async def work() -> list[Any]:
        calls = [read(), read(), demo.generate("Hello", greedy(20))]
        return await asyncio.gather(*calls, return_exceptions=True)

    monkeypatch.setattr(Detokenizer, "take", fail)
    *streams, result = asyncio.run(work())
    (failed,) = [outcome for outcome in streams if isinstance(outcome, Exception)]
    assert isinstance(failed, ValueError) and "of a tokenizer" in str(failed)
    streams.remove(failed)
    assert streams == [want.token_ids] and result.token_ids == want.token_ids
    wait_until_idle(demo)


# --- callbacks, and what they do to the thread ----------------------------------------------------


def test_callbacks_cannot_end_the_thread(llm: AsyncLLM) -> None:
    calls: list[Any] = []

    def record(future: Future[Any]) -> None:
        calls.append((threading.current_thread().name, future.result().token_ids))

    def fail(future: Future[Any]) -> None:
        raise ValueError("of a callback")

    def leave(future: Future[Any]) -> None:
        raise SystemExit

    def go_on(future: Future[Any]) -> None:
        llm.submit(PROMPTS[1], greedy(3)).add_done_callback(record)

    with llm.llm._lock:  # until all callbacks are there: a later one would run in this thread
        for callback in (record, fail, leave, go_on):
            llm.submit(PROMPTS[0], greedy(9)).add_done_callback(callback)
    want = generate(llm, PROMPTS[:2], [greedy(9), greedy(3)]) if wait_for(calls, 2) else []
    assert calls == [("nanovllm-engine", result.token_ids) for result in want]
    assert tokens(llm.submit(PROMPTS[1], greedy(3)).result(SECONDS)) == tokens(want[1])


def wait_for(items: list[Any], number: int) -> bool:
    """Whether a list has so many items, after a while."""
    end = time.monotonic() + SECONDS
    while len(items) < number and time.monotonic() < end:
        time.sleep(0.001)
    return len(items) == number


def test_an_event_loop_is_woken_once_in_a_step(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = PROMPTS * 4
    sent: list[Any] = []
    wakes: list[Any] = []
    send = llm._owner.send

    def counting_send(ticket: Any) -> None:
        sent.append(ticket)
        send(ticket)

    monkeypatch.setattr(llm._owner, "send", counting_send)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counting_call(callback: Any, *args: Any, **options: Any) -> Any:
            if threading.current_thread() is llm._owner._thread:
                wakes.append(callback)
            return call(callback, *args, **options)

        loop.call_soon_threadsafe = counting_call  # type: ignore[method-assign]
        with llm.llm._lock:  # until all of them are in the inbox
            tasks = [asyncio.create_task(llm.generate(prompt, greedy(20))) for prompt in prompts]
            while len(sent) < len(prompts):
                await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)

    asyncio.run(work())
    assert 1 <= len(wakes) <= 4


def test_the_thread_sleeps_while_it_has_nothing_to_do(llm: AsyncLLM) -> None:
    seen: list[Any] = []
    with llm.llm._lock:
        future = llm.submit(PROMPTS[0], greedy(5))
        future.add_done_callback(lambda _: seen.append(gc.get_threshold()[0]))
    future.result(SECONDS)
    wait_until_idle(llm)
    time.sleep(0.05)
    assert seen == [100_000]
    end = time.monotonic() + SECONDS
    while gc.get_threshold()[0] == 100_000:
        assert time.monotonic() < end
        time.sleep(0.001)
    clock = time.pthread_getcpuclockid(llm._owner._thread.ident)  # type: ignore[arg-type]
    start = time.clock_gettime(clock)
    time.sleep(0.2)
    assert time.clock_gettime(clock) == start


def test_the_thread_computes_with_as_many_threads_as_its_maker(checkpoint: Checkpoint) -> None:
    number = torch.get_num_threads()
    torch.set_num_threads(number + 1)
    llm = make_async(checkpoint.path)
    torch.set_num_threads(number)  # as a step does that is worth no more
    seen: list[int] = []
    with llm.llm._lock:
        future = llm.submit(PROMPTS[0], greedy(2))
        future.add_done_callback(lambda _: seen.append(torch.get_num_threads()))
    future.result(SECONDS)
    llm.close()
    assert seen == [number + 1] and torch.get_num_threads() == number


def test_a_finished_future_refers_to_no_sequence(llm: AsyncLLM) -> None:
    futures = [llm.submit(PROMPTS[0], greedy(5)), llm.submit_embed(PROMPTS[0])]
    seqs = [weakref.ref(future.seqs[0]) for future in futures]  # type: ignore[attr-defined]
    concurrent.futures.wait(futures, SECONDS)
    wait_until_idle(llm)
    gc.collect()
    assert [seq() for seq in seqs] == [None, None]


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failed_step_fails_what_is_in_flight_and_no_more(
    checkpoint: Checkpoint, depth: int
) -> None:
    llm = make_async(checkpoint.path, depth)
    (want,) = generate(llm, PROMPTS[:1], greedy(10))
    runner = llm.llm.model_runner
    assert runner is not None

    async def read() -> None:
        async for _ in llm.stream(PROMPTS[2], greedy(200)):
            pass

    async def work() -> list[Any]:
        calls = [read(), llm.generate(PROMPTS[3], greedy(200)), llm.embed(PROMPTS[4])]
        tasks = [asyncio.create_task(call) for call in calls[:2]]
        while len(llm.llm.scheduler.running) < 3:
            await asyncio.sleep(0.001)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "launch", lambda step: 1 / 0)
            tasks.append(asyncio.create_task(calls[2]))
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(future.exception(SECONDS), EngineError)
        return outcomes

    future = llm.submit(PROMPTS[1], greedy(200))
    outcomes = [*asyncio.run(work()), future.exception()]
    assert all(isinstance(error, EngineError) for error in outcomes), outcomes
    assert all("ZeroDivisionError" in str(error) for error in outcomes)
    assert all(isinstance(error.__cause__, ZeroDivisionError) for error in outcomes)
    assert len(set(map(id, outcomes))) == 4 and llm.failure is None
    assert tokens(llm.submit(PROMPTS[0], greedy(10)).result(SECONDS)) == tokens(want)
    wait_until_idle(llm)
    llm.close()


def test_an_engine_that_has_ended(checkpoint: Checkpoint) -> None:
    llm = make_async(checkpoint.path)
    future = llm.submit(PROMPTS[0], greedy(200))
    while not llm.llm.scheduler.running:
        time.sleep(0.001)
    seen: list[Any] = []
    future.add_done_callback(lambda _: seen.append(llm.failure))
    llm.llm.exit()
    assert isinstance(future.exception(SECONDS), EngineError)
    llm._owner._thread.join(SECONDS)
    assert "shut down" in str(llm.failure) and seen == [llm.failure]
    for call in (llm.submit, llm.submit_embed):
        with pytest.raises(EngineError, match=r"has ended.*shut down"):
            call(PROMPTS[0])
    llm.close()


def test_two_ranks_one_of_which_dies(checkpoint: Checkpoint) -> None:
    llm = make_async(checkpoint.path, tensor_parallel_size=2, max_num_batched_tokens=40)
    want = generate(llm, PROMPTS, greedy(8))
    vectors = llm.llm.embed(PROMPTS, use_tqdm=False)
    with llm.llm._lock:  # so that completions and embeddings share steps
        embedded = [llm.submit_embed(prompt) for prompt in PROMPTS]
        completed = [llm.submit(prompt, greedy(8)) for prompt in PROMPTS]
    for future, vector in zip(embedded, vectors, strict=True):
        assert future.result(SECONDS).embedding == pytest.approx(vector.embedding, abs=1e-5)
    assert [tokens(future.result(SECONDS)) for future in completed] == [tokens(r) for r in want]
    future = llm.submit(PROMPTS[0], greedy(200))
    channel = llm.llm._channel
    assert channel is not None
    channel.processes[0].kill()
    assert isinstance(future.exception(SECONDS), EngineError)
    assert isinstance(llm.failure, RuntimeError) and "rank 1" in str(llm.failure)
    with pytest.raises(EngineError, match="rank 1"):
        llm.submit(PROMPTS[0])
    llm.close()


def test_requests_that_others_take_away(llm: AsyncLLM) -> None:
    """`reset` is there for every caller, and so is `step`; nobody may wait for ever."""
    (want,) = generate(llm, PROMPTS[:1], greedy(10))
    future = llm.submit(PROMPTS[0], greedy(200))
    while not llm.llm.scheduler.running:
        time.sleep(0.001)
    llm.llm.reset()
    with pytest.raises(EngineError, match="reset"):
        future.result(SECONDS)
    future = llm.submit(PROMPTS[0], greedy(200))
    while not llm.llm.scheduler.running:
        time.sleep(0.001)
    with llm.llm._lock:
        llm.llm.reset()
        other = llm.submit(PROMPTS[0], greedy(10))
    with pytest.raises(EngineError, match="reset"):
        future.result(SECONDS)
    assert tokens(other.result(SECONDS)) == tokens(want)


def test_an_engine_that_sleeps_takes_no_requests(llm: AsyncLLM) -> None:
    (want,) = generate(llm, PROMPTS[:1], greedy(10))
    with llm.llm._lock:
        late = llm.submit(PROMPTS[0], greedy(10))
        llm.llm.sleep()
    assert "sleep" in str(late.exception(SECONDS))
    with pytest.raises(RuntimeError, match="sleep"):
        llm.submit(PROMPTS[0], greedy(10))
    llm.llm.wake_up()
    assert tokens(llm.submit(PROMPTS[0], greedy(10)).result(SECONDS)) == tokens(want)


# --- the end --------------------------------------------------------------------------------------


def outcome_of(future: Future[Any]) -> Any:
    try:
        return future.result(SECONDS)
    except (CancelledError, EngineError) as error:
        return error


@pytest.mark.parametrize("who", ["another thread", "several threads", "a callback", "a coroutine"])
def test_close_ends_all(checkpoint: Checkpoint, who: str) -> None:
    llm = make_async(checkpoint.path)
    quick = llm.submit(PROMPTS[1], greedy(3))
    if who == "a callback":
        quick.add_done_callback(lambda _: llm.close())
    futures = [llm.submit(prompt, greedy(200)) for prompt in PROMPTS]
    futures.append(llm.submit_embed(PROMPTS[0]))

    async def work() -> list[Any]:
        async with llm:
            stream = llm.stream(PROMPTS[0], greedy(200))
            await anext(stream)
            tasks = [asyncio.create_task(llm.generate(PROMPTS[0], greedy(200)))]
            tasks.append(asyncio.create_task(anext(stream)))  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
        return [
            *await asyncio.gather(*tasks, return_exceptions=True),
            *await asyncio.gather(llm.generate(PROMPTS[0]), return_exceptions=True),
        ]

    if who == "a coroutine":
        outcomes = asyncio.run(work())
        assert all(isinstance(error, EngineError) for error in (outcomes[0], outcomes[2]))
    elif who == "several threads":
        assert in_threads(*[llm.close] * 4) == [None] * 4
    elif who == "another thread":
        quick.result(SECONDS)
        llm.close()
    llm._owner._thread.join(SECONDS)
    assert not llm._owner._thread.is_alive() and llm.llm.model_runner is None
    assert all(future.done() for future in (quick, *futures))
    kinds = {type(outcome_of(future)) for future in futures}
    assert EngineError in kinds and kinds <= {EngineError, type(outcome_of(quick))} | {
        type(outcome_of(futures[-1]))
    }
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        llm.submit(PROMPTS[0])
    with llm:
        pass


def test_requests_that_come_too_late(checkpoint: Checkpoint) -> None:
    """After the check whether it is closed, and before the thread looks into its inbox."""
    llm = make_async(checkpoint.path)
    seqs = [llm._check(PROMPTS[0], greedy(3)) for _ in range(2)]
    llm.close()
    futures = [llm._future(each, lambda result: result) for each in seqs]
    assert all(isinstance(future.exception(1), EngineError) for future in futures)


def test_a_forgotten_one_finishes_what_is_in_flight(checkpoint: Checkpoint) -> None:
    llm = make_async(checkpoint.path)
    (want,) = generate(llm, PROMPTS[:1], greedy(30))
    thread = llm._owner._thread
    engine = weakref.ref(llm.llm)
    future = llm.submit(PROMPTS[0], greedy(30))
    del llm
    gc.collect()
    assert tokens(future.result(SECONDS)) == tokens(want)
    thread.join(SECONDS)
    assert not thread.is_alive()
    gc.collect()
    assert engine() is None


def test_a_forked_child_is_refused(llm: AsyncLLM) -> None:
    (want,) = generate(llm, PROMPTS[:1], greedy(100))
    future = llm.submit(PROMPTS[0], greedy(100))

    def refused() -> bool:
        for call in (llm.submit, llm.submit_embed, lambda _: llm.submit_chat(CHAT)):
            try:
                call(PROMPTS[0])
            except RuntimeError as error:
                if "process" not in str(error):
                    return False
            else:
                return False
        llm.close()
        return True

    assert in_child(refused) == 0
    assert tokens(future.result(SECONDS)) == tokens(want)


SCRIPT = """
import asyncio, os, signal, threading, time
from nanovllm import DEMO_MODEL, AsyncLLM, SamplingParams

llm = AsyncLLM(DEMO_MODEL, device="cpu", num_kvcache_blocks=64)
long = SamplingParams(max_tokens=3000, ignore_eos=True)
future = llm.submit("Hello", long)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    future.result()
except KeyboardInterrupt:
    print("interrupted", llm.submit("Hi", SamplingParams(max_tokens=3)).result().finish_reason)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    asyncio.run(llm.generate("Hello", long))
except KeyboardInterrupt:
    print("interrupted", llm.submit("Hi", SamplingParams(max_tokens=3)).result().finish_reason)
future.add_done_callback(lambda future: print(repr(future.exception()), flush=True))
"""


def test_ctrl_c_and_a_program_that_forgets_to_close(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (run.returncode, run.stderr) == (0, "")
    first, second, third = run.stdout.splitlines()
    assert first == second == "interrupted length" and "EngineError" in third


# --- any order ------------------------------------------------------------------------------------


class Crowd:
    """Callers that submit, cancel and stream as chance has it."""

    def __init__(self, llm: AsyncLLM, seed: int) -> None:
        self.llm = llm
        self.seed = seed
        self.params = [varied_params(number) for number in range(len(PROMPTS))]
        self.want = [tokens(result) for result in generate(llm, PROMPTS, self.params)]
        self.outcomes: list[tuple[int, Any]] = []  # number of the prompt, tokens or an error

    def thread(self, number: int) -> None:
        """Submit some, cancel some of them, and wait."""
        r = random.Random(1000 * self.seed + number)
        futures: list[tuple[int, Future[Any]]] = []
        for _ in range(12):
            index = r.randrange(len(PROMPTS))
            try:
                futures.append((index, self.llm.submit(PROMPTS[index], self.params[index])))
            except RuntimeError as error:
                self.outcomes.append((index, error))
                continue
            if r.random() < 0.3:
                r.choice(futures)[1].cancel()
            if r.random() < 0.3:
                time.sleep(0.01 * r.random())
        self.outcomes += [(index, self.outcome(future)) for index, future in futures]

    def outcome(self, future: Future[Any]) -> Any:
        outcome = outcome_of(future)
        return outcome if isinstance(outcome, Exception) else tokens(outcome)

    def coroutines(self) -> None:
        """Await and stream some, and cancel some of them."""
        r = random.Random(1000 * self.seed + 999)

        async def one(index: int) -> None:
            try:
                if r.random() < 0.5:
                    result = await self.llm.generate(PROMPTS[index], self.params[index])
                    self.outcomes.append((index, tokens(result)))
                    return
                got: list[list[int]] = [[] for _ in range(self.params[index].n)]
                async for part in self.llm.stream(PROMPTS[index], self.params[index]):
                    got[part.completion] += part.token_ids
                    if r.random() < 0.02:
                        return
                self.outcomes.append((index, got))
            except RuntimeError as error:
                self.outcomes.append((index, error))

        async def all_of_them() -> None:
            tasks = []
            for _ in range(16):
                tasks.append(asyncio.create_task(one(r.randrange(len(PROMPTS)))))
                await asyncio.sleep(0.005 * r.random())
                if r.random() < 0.3:
                    r.choice(tasks).cancel()
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), SECONDS)

        asyncio.run(all_of_them())

    def check(self, may_fail: bool) -> None:
        good = 0
        for index, outcome in self.outcomes:
            if isinstance(outcome, Exception):
                assert may_fail or isinstance(outcome, CancelledError), outcome
            else:
                assert outcome == self.want[index]
                good += 1
        assert good > 0 or may_fail


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_requests_and_cancellations(llm: AsyncLLM, seed: int) -> None:
    crowd = Crowd(llm, seed)
    calls = [lambda number=number: crowd.thread(number) for number in range(4)]
    assert in_threads(*calls, crowd.coroutines, crowd.coroutines) == [None] * 6
    crowd.check(may_fail=False)


@pytest.mark.parametrize("seed", range(4))
def test_close_in_the_middle_of_anything(checkpoint: Checkpoint, seed: int) -> None:
    llm = make_async(checkpoint.path, depth=seed % 2)
    crowd = Crowd(llm, seed)

    def close() -> None:
        time.sleep(random.Random(seed).uniform(0.0, 0.3))
        llm.close()

    calls = [lambda number=number: crowd.thread(number) for number in range(3)]
    assert in_threads(*calls, crowd.coroutines, close) == [None] * 5
    crowd.check(may_fail=True)
