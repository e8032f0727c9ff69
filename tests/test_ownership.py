"""Who owns an engine: one process, and one call at a time runs on it. Threads, calls from inside a
call (signal handlers, finalizers), forked children, ranks.
"""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Checkpoint, assert_idle, generate_ids, greedy, make_llm, random_prompts

from nanovllm import LLM

REPO = Path(__file__).resolve().parent.parent
PROMPTS = random_prompts(3, [5, 9, 20, 7])


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> LLM:
    return make_llm(checkpoint.path, max_model_len=512)


@pytest.fixture(params=[0, 1], ids=["depth-0", "depth-1"])
def deep(request: pytest.FixtureRequest, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(llm, "_max_pending", request.param)
    return llm


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What each returns or raises, all run at once."""
    outcomes: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            outcomes[index] = calls[index]()
        except BaseException as error:
            outcomes[index] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return outcomes


def stream_ids(llm: LLM, prompt: Any, num_tokens: int) -> list[int]:
    parts = llm.stream([prompt], greedy(num_tokens))
    return [token_id for part in parts for token_id in part["token_ids"]]


# --- threads --------------------------------------------------------------------------------------


def test_two_threads_in_generate_both_get_their_tokens(deep: LLM) -> None:
    lengths = (30, 70)
    want = [generate_ids(deep, [PROMPTS[i]], greedy(lengths[i]))[0] for i in range(2)]
    for _ in range(4):
        barrier = threading.Barrier(2, timeout=20)

        def prompt(index: int, barrier: threading.Barrier = barrier) -> Iterator[int]:
            barrier.wait()  # both are past every check by then
            yield from PROMPTS[index]

        def work(index: int, prompt: Any = prompt) -> list[int]:
            (result,) = deep.generate([prompt(index)], greedy(lengths[index]), use_tqdm=False)
            return result["token_ids"]

        assert in_threads(lambda work=work: work(0), lambda work=work: work(1)) == want
        assert_idle(deep)


def test_streams_and_step_loops_of_several_threads_get_their_tokens(deep: LLM) -> None:
    want = [generate_ids(deep, [prompt], greedy(40))[0] for prompt in PROMPTS[:3]]
    results: dict[int, Any] = {}

    def loop() -> list[int]:
        request_id = deep.add_request(PROMPTS[2], greedy(40))
        while request_id not in results:
            results.update(deep.step()[0])
        return results[request_id]["token_ids"]

    def stream(index: int) -> Callable[[], list[int]]:
        return lambda: stream_ids(deep, PROMPTS[index], 40)

    for _ in range(4):
        assert in_threads(stream(0), stream(1), loop) == want
    assert_idle(deep)


def test_generate_beside_a_stream_of_another_thread_is_refused(deep: LLM) -> None:
    stream = deep.stream([PROMPTS[0]], greedy(8))
    next(stream)
    (error,) = in_threads(lambda: deep.generate([PROMPTS[1]], greedy(2)))
    assert isinstance(error, RuntimeError) and "unfinished" in str(error)
    in_threads(stream.close)  # type: ignore[attr-defined]
    assert_idle(deep)


def start_long_call(llm: LLM) -> tuple[threading.Thread, list[Any]]:
    outcomes: list[Any] = []

    def work() -> None:
        try:
            outcomes.append(generate_ids_at_once(llm, PROMPTS[0], 400))
        except RuntimeError as error:
            outcomes.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    while not llm.scheduler.running:
        time.sleep(0.001)
    return thread, outcomes


def generate_ids_at_once(llm: LLM, prompt: list[int], num_tokens: int) -> list[int]:
    return llm.generate([prompt], greedy(num_tokens), use_tqdm=False)[0]["token_ids"]


def test_what_waits_for_another_thread_can_be_interrupted(llm: LLM) -> None:
    thread, outcomes = start_long_call(llm)
    calls = (
        lambda: generate_ids_at_once(llm, PROMPTS[1], 2),
        lambda: next(llm.stream([PROMPTS[1]], greedy(2))),
        lambda: llm.add_request(PROMPTS[1], greedy(2)),
        llm.step,
        llm.reset,
    )
    llm.stats()  # waits for nobody
    llm.abort(10**9)
    for call in calls:
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                call()
    thread.join(timeout=60)
    llm.reset()  # the calls may have got their turn
    assert len(outcomes) == 1 and len(outcomes[0]) == 400
    assert_idle(llm)


def test_exit_ends_the_call_of_another_thread(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, max_model_len=512)
    thread, outcomes = start_long_call(llm)
    llm.exit()
    thread.join(timeout=20)
    assert isinstance(outcomes[0], RuntimeError) and "shut down" in str(outcomes[0])


def test_traces_of_two_threads_may_end_in_any_order(llm: LLM) -> None:
    first, second = llm.trace(), llm.trace()
    first.__enter__()
    inner = second.__enter__()
    first.__exit__(None, None, None)
    generate_ids(llm, PROMPTS[:1], greedy(3))
    second.__exit__(None, None, None)
    generate_ids(llm, PROMPTS[:1], greedy(3))
    assert len(inner.steps) == 3 and llm._trace is None


# --- calls from inside a call: signal handlers, finalizers ----------------------------------------


@contextmanager
def inside_the_steps(llm: LLM, call: Callable[[], Any], patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Have every step do `call`, as a signal handler or Python's cycle collector would."""
    outcomes: list[Any] = []
    schedule = llm.scheduler._schedule_decode

    def interrupted() -> Any:
        try:
            outcomes.append(call())
        except RuntimeError as error:
            outcomes.append(error)
        return schedule()

    patch.setattr(llm.scheduler, "_schedule_decode", interrupted)
    yield outcomes
    patch.undo()


@pytest.mark.parametrize("name", ["generate", "add_request", "step", "reset", "stream"])
def test_a_call_from_inside_a_step_is_refused(
    llm: LLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = generate_ids(llm, PROMPTS, greedy(6))
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: llm.generate(PROMPTS[:1], greedy(2)),
        "add_request": lambda: llm.add_request(PROMPTS[0], greedy(2)),
        "stream": lambda: next(llm.stream(PROMPTS[:1], greedy(2))),
    }
    call = calls.get(name, getattr(llm, name))
    with inside_the_steps(llm, call, monkeypatch) as outcomes:
        assert generate_ids(llm, PROMPTS, greedy(6)) == want
    assert len(outcomes) >= 5
    assert all(isinstance(o, RuntimeError) and "inside another call" in str(o) for o in outcomes)


def test_requests_aborted_and_streams_forgotten_inside_a_step_end_after_it(
    deep: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (want,) = generate_ids(deep, PROMPTS[:1], greedy(20))
    streams = [deep.stream(PROMPTS[1:3], greedy(300))]
    kept = deep.add_request(PROMPTS[0], greedy(20))
    dropped = deep.add_request(PROMPTS[3], greedy(300))
    next(streams[0])

    def call() -> None:
        deep.abort(dropped)
        streams.clear()

    results: dict[int, Any] = {}
    with inside_the_steps(deep, call, monkeypatch):
        while not deep.is_finished():
            results.update(deep.step()[0])
    assert results[kept]["token_ids"] == want
    assert results[dropped]["finish_reason"] == "abort" and len(results) == 2
    assert_idle(deep)


def test_a_stream_in_a_cycle_is_ended_by_the_collector(deep: LLM) -> None:
    cycle: list[Any] = [deep.stream(PROMPTS[:2], greedy(300))]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()
    assert_idle(deep)


# --- forked children ------------------------------------------------------------------------------


def in_child(work: Callable[[], Any]) -> int:
    """Exit status of a forked child that does `work`: 0 if that returns True. -9: it hung."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() is True else 2
        finally:
            os._exit(status)
    end = time.monotonic() + 20
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def all_refused(llm: LLM, stream: Any) -> bool:
    calls = (
        lambda: llm.generate(PROMPTS[:1], greedy(2)),
        lambda: next(llm.stream(PROMPTS[:1], greedy(2))),
        lambda: llm.add_request(PROMPTS[0], greedy(2)),
        lambda: next(stream),
        lambda: llm.abort(0),
        llm.step,
        llm.reset,
    )
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            if "process" not in str(error):
                return False
        else:
            return False
    stream.close()
    llm.exit()
    return True


@pytest.mark.parametrize("holder", ["nobody", "another thread", "this call"])
def test_a_forked_child_is_refused_and_the_parent_goes_on(
    llm: LLM, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (want,) = generate_ids(llm, PROMPTS[:1], greedy(400))
    statuses: list[int] = []
    stream = llm.stream(PROMPTS[:1], greedy(400))
    if holder == "nobody":
        got = next(stream)["token_ids"]
        statuses.append(in_child(lambda: all_refused(llm, stream)))
        got += [token_id for part in stream for token_id in part["token_ids"]]
    elif holder == "another thread":
        thread, outcomes = start_long_call(llm)
        statuses.append(in_child(lambda: all_refused(llm, stream)))
        thread.join(timeout=60)
        (got,) = outcomes
    else:  # which the child is in, too, and goes on with
        pid = os.getpid()

        def fork() -> None:
            if not statuses:
                statuses.append(in_child(lambda: all_refused(llm, stream)))
            assert os.getpid() == pid

        with inside_the_steps(llm, fork, monkeypatch):
            got = generate_ids_at_once(llm, PROMPTS[0], 400)
    assert statuses == [0] and got == want
    assert_idle(llm)


SCRIPT = """
import gc, multiprocessing, os, signal, sys, threading, time
from conftest import greedy
from nanovllm import DEMO_MODEL, LLM
from test_ownership import all_refused, in_child

def tokens():
    return llm.generate("Hello", greedy(12), use_tqdm=False)[0]["token_ids"]

def collected():
    global llm
    llm = None
    gc.collect()
    return True

if __name__ == "__main__":
    llm = LLM(DEMO_MODEL, tensor_parallel_size=2, device="cpu", num_kvcache_blocks=64)
    (worker,) = multiprocessing.active_children()
    want = tokens()
    stream = llm.stream("x", greedy(2))
    assert in_child(lambda: all_refused(llm, stream)) == 0
    assert in_child(collected) == 0
    if os.fork() == 0:
        sys.exit()  # what Python does at its end must not end the parent's workers
    ended = os.wait()
    assert ended[1] == 0, (ended, worker)
    assert worker.is_alive() and tokens() == want
    child = os.fork()
    if child == 0:
        time.sleep(60)  # outlives the parent, with all its files open
        os._exit(0)
    print(worker.pid, child, flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    work = lambda: llm.generate(["Hello"] * 4, greedy(3000), use_tqdm=False)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.3)  # the script ends in the middle of a step
"""


@pytest.mark.parametrize("end", ["killed", "orderly"])
def test_ranks_outlive_forked_children_and_end_with_their_parent(tmp_path: Path, end: str) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT)
    path = os.pathsep.join([str(REPO), str(REPO / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), end]
    # To files: a pipe would be at its end only with the child, which has it open too.
    with open(tmp_path / "ids", "w") as ids, open(tmp_path / "errors", "w") as errors:
        run = subprocess.run(command, env=environment, stdout=ids, stderr=errors, timeout=100)
    output = (tmp_path / "errors").read_text()
    assert run.returncode == (-signal.SIGKILL if end == "killed" else 0), output
    worker, child = map(int, (tmp_path / "ids").read_text().split())
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_running(worker)
    if end == "killed":
        os.kill(child, signal.SIGKILL)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
