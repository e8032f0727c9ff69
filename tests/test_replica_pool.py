"""Replicas: every line is answered once, whatever happens to processes, and no process is left.

Without engines: `FakeWorker` does what a line says.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from job_workers import FakeWorker, OddError

from nanovllm.checkpoints import hub
from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.replicas import devices, run, supervisor
from nanovllm.jobs.replicas.devices import replica_environments
from nanovllm.jobs.replicas.pool import ReplicaPool, find_model

TESTS = Path(__file__).resolve().parent
MODEL = str(TESTS)  # any directory: nobody reads it
OPTIONS = LineOptions("a model")


def make_pool(replicas: int = 1, **options: Any) -> ReplicaPool:
    options.setdefault("device", "cpu")
    return ReplicaPool(MODEL, options, OPTIONS, replicas, make_worker=FakeWorker)


def make_line(number: int, **fields: Any) -> Line:
    return Line(number, json.dumps({"prompt": f"prompt {number}", **fields}).encode())


def make_lines(count: int, do: dict[int, str] | None = None) -> Iterator[Line]:
    for number in range(1, count + 1):
        yield make_line(number, **({"do": do[number]} if do and number in do else {}))


def check_complete(answers: Iterable[Answer], count: int) -> dict[int, Answer]:
    """Each of the lines 1 to `count` has one answer; returns them by number."""
    answers = list(answers)
    assert sorted(answer.number for answer in answers) == list(range(1, count + 1))
    return {answer.number: answer for answer in answers}


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread of a pool and no process is left behind."""
    yield
    names = ("replicas", "reader of lines")
    assert wait_until(
        lambda: not [thread for thread in threading.enumerate() if thread.name in names], 5
    )
    me = str(os.getpid())
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = status.read_text().rpartition(")")[2].split()[1]
            command = (status.parent / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        assert parent != me or "replica_process" not in command


# --- answers --------------------------------------------------------------------------------------


def test_every_line_is_answered_once_and_all_replicas_work() -> None:
    with make_pool(2, delay=0.001) as pool:
        pids = pool.pids()
        assert len(set(pids)) == 2 and os.getpid() not in pids
        answers = check_complete(pool.run(make_lines(3000)), 3000)
        again = check_complete(pool.run(make_lines(100)), 100)
        assert not any(answer.error for answer in [*answers.values(), *again.values()])
        by = Counter(json.loads(answer.data)["pid"] for answer in answers.values())
        assert set(by) == set(pids) and min(by.values()) > 1000
        assert list(pool.run([])) == []
        assert pool.num_restarts == 0


def test_lines_that_begin_alike_go_to_one_replica() -> None:
    lines = [make_line(1 + i, prompt=f"{i % 6}" * 1500 + f"question {i}") for i in range(240)]
    random.Random(0).shuffle(lines)
    with make_pool(2, delay=0.01) as pool:
        answers = check_complete(pool.run(lines), 240)
    replicas: dict[int, Counter[int]] = {}
    for number, answer in answers.items():
        replicas.setdefault((number - 1) % 6, Counter())[json.loads(answer.data)["pid"]] += 1
    num_apart = sum(40 - max(counter.values()) for counter in replicas.values())
    assert num_apart <= 20  # those that the replica that is done first takes at the end


def test_futures_come_from_any_thread_and_can_be_cancelled() -> None:
    with make_pool(max_num_seqs=1, delay=0.01) as pool:
        futures: list[Any] = []

        def submit(begin: int) -> None:
            futures.extend(pool.submit(make_line(begin + i)) for i in range(20))

        threads = [threading.Thread(target=submit, args=(begin,)) for begin in (0, 100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        cancelled = [future for future in futures[-20:] if future.cancel()]
        assert len(cancelled) >= 10
        numbers = [future.result(10).number for future in futures if not future.cancelled()]
        assert len(set(numbers)) == 60 - len(cancelled)
        last = futures[0]
        called: list[str] = []
        last.add_done_callback(lambda _: called.append("done"))
        assert called == ["done"]


def test_the_reader_stays_near_and_answers_come_while_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "MAX_DISTANCE", 100)
    num_read = 0
    may_go_on = threading.Event()

    def lines() -> Iterator[Line]:
        nonlocal num_read
        for line in make_lines(1000):
            num_read += 1
            if num_read == 11:
                may_go_on.wait(30)
            yield line

    with make_pool(2) as pool:
        answers = pool.run(lines())
        first = [next(answers) for _ in range(10)]  # although the 11th line is not there
        may_go_on.set()
        # Nobody takes answers, and the last one counts as taken when the next one is asked for.
        assert wait_until(lambda: num_read > 100, 10)
        time.sleep(0.2)
        assert num_read <= 110
        check_complete([*first, *answers], 1000)
    assert num_read == 1000


def test_long_lines_are_read_ahead_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "MAX_HELD_BYTES", 1_000_000)
    num_read = 0

    def lines() -> Iterator[Line]:
        nonlocal num_read
        for number in range(1, 41):
            num_read += 1
            yield make_line(number, prompt="x" * 100_000)

    with make_pool(1, max_num_seqs=1) as pool:
        answers = pool.run(lines())
        first = next(answers)
        assert wait_until(lambda: num_read >= 11, 10)
        time.sleep(0.2)
        assert num_read == 11  # of which ten are held
        check_complete([first, *answers], 40)


def test_what_reading_raises_comes_after_the_answers_to_what_was_read() -> None:
    def lines() -> Iterator[Line]:
        yield from make_lines(50)
        raise OSError("the disk is gone")

    with make_pool() as pool:
        answers = []
        with pytest.raises(OSError, match="the disk is gone"):
            for answer in pool.run(lines()):
                answers.append(answer)
        check_complete(answers, 50)
        check_complete(pool.run(make_lines(20)), 20)


def test_leaving_early_stops_reading_and_what_waits_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make_pool(max_num_seqs=4, delay=0.02, log=str(log)) as pool:
        for answer in pool.run(make_lines(100_000)):
            if answer.number > 3:
                break
        check_complete(pool.run(make_lines(10)), 10)
    assert len(log.read_text().split()) < 100


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas", [1, 2])
def test_only_the_poisoned_lines_get_error_answers(tmp_path: Path, replicas: int) -> None:
    log = tmp_path / "log"
    poison = {70: "exit", 71: "segfault", 150: "break", 290: "fail", 200: "refuse"}
    with make_pool(replicas, max_num_seqs=40, log=str(log)) as pool:
        answers = check_complete(pool.run(make_lines(300, poison)), 300)
        assert 3 <= pool.num_restarts <= 12
    errors = {number: answer.error for number, answer in answers.items() if answer.error}
    expected = {number: "engine_failed" for number in poison} | {200: "refused"}
    assert errors == expected
    message = json.loads(answers[71].data)["error"]["message"]
    assert "all 3 runs" in message and "SIGSEGV" in message
    assert "a rank has failed" in answers[150].data.decode()
    runs = Counter(log.read_text().split())
    assert set(runs) == {str(number) for number in range(1, 301)}
    assert max(runs.values()) <= 3 and all(runs[str(n)] == 3 for n in (70, 71, 150, 290))


def test_replicas_that_are_killed_at_any_moment_lose_no_line() -> None:
    r = random.Random(5)
    count = 10_000
    num_kills = 0
    with make_pool(2, max_num_seqs=16, delay=0.01) as pool:
        answers = []
        next_kill = 100
        for answer in pool.run(make_lines(count)):
            answers.append(answer)
            pid = json.loads(answer.data).get("pid")
            if num_kills < 20 and len(answers) >= next_kill and pid in pool.pids():
                time.sleep(r.uniform(0, 0.02))
                os.kill(pid, signal.SIGKILL)
                num_kills += 1
                next_kill += r.randrange(100, 800)
        assert num_kills == 20 and pool.num_restarts >= 19
    by_number = check_complete(answers, count)
    # Only a line that was there by chance in three of them.
    assert sum(answer.error is not None for answer in by_number.values()) <= 2


def test_while_one_replica_restarts_the_other_goes_on() -> None:
    answered_by: dict[int, list[int]] = {}  # numbers of lines
    deadline = time.monotonic() + 30

    def lines() -> Iterator[Line]:
        """As many as it takes until the new process has answered one, and 100 at least."""
        number = 0
        while number < 100 or (len(answered_by) < 3 and time.monotonic() < deadline):
            number += 1
            yield make_line(number)

    with make_pool(2, max_num_seqs=32, delay=0.01) as pool:
        victim, survivor = pool.pids()
        answers = []
        for answer in pool.run(lines()):
            answers.append(answer)
            pid = json.loads(answer.data)["pid"]
            answered_by.setdefault(pid, []).append(answer.number)
            if len(answers) == 20:
                os.kill(victim, signal.SIGKILL)
        assert pool.num_restarts == 1
        assert survivor in pool.pids() and victim not in pool.pids()
    assert len(answered_by) == 3 and len(answered_by[survivor]) > 50
    check_complete(answers, len(answers))


def test_an_engine_that_fails_always_ends_the_run_with_its_error() -> None:
    with make_pool(2, max_num_seqs=8) as pool:
        lines = (make_line(number, do="break") for number in range(1, 10_000))
        with pytest.raises(RuntimeError, match="3 times in a row.*a rank has failed"):
            list(pool.run(lines))
        with pytest.raises(RuntimeError, match="3 times in a row"):
            pool.submit(make_line(1))
        with pytest.raises(RuntimeError, match="3 times in a row"):
            list(pool.run(make_lines(3)))


def test_an_engine_that_cannot_start_again_ends_the_run(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    flag.touch()
    start = {"do": "raise", "message": "not enough memory", "unless": str(flag)}
    with make_pool(1, max_num_seqs=4, delay=0.01, start=start) as pool:
        answers = pool.run(make_lines(100))
        next(answers)
        flag.unlink()
        os.kill(pool.pids()[0], signal.SIGKILL)
        future = pool.submit(make_line(7))
        with pytest.raises(RuntimeError, match="3 times in a row.*not enough memory"):
            list(answers)
        with pytest.raises(RuntimeError, match="not enough memory"):
            future.result(5)


@pytest.mark.parametrize(
    "start, error, message",
    [
        ({"do": "raise", "message": "lower max_model_len"}, ValueError, "lower max_model_len"),
        ({"do": "raise odd"}, RuntimeError, "OddError: one"),
        ({"do": "exit"}, RuntimeError, "ended with exit code 7 while its engine started"),
    ],
)
def test_an_engine_that_cannot_start_raises_its_error(
    start: dict[str, Any], error: type[Exception], message: str
) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        make_pool(3, start=start)
    assert caught.type is error
    assert time.monotonic() - began < 20
    with pytest.raises(OddError):
        raise OddError("one", "two")


# --- the end --------------------------------------------------------------------------------------


def test_closing_is_quick_and_can_be_repeated() -> None:
    pool = make_pool(2)
    pids = pool.pids()
    waiting = pool.submit(make_line(1, do="wait"))
    began = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - began < 3
    assert all(map(is_gone, pids)) and pool.pids() == []
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result(0)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(make_line(2))
    with pytest.raises(RuntimeError, match="closed"):
        list(pool.run(make_lines(3)))


def test_a_replica_that_is_stopped_does_not_keep_the_pool_from_closing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "MAX_CLOSE_SECONDS", 0.2)
    pool = make_pool(max_num_seqs=1000)
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    for number in range(20):  # more than fits a pipe: whoever sends it waits
        pool.submit(make_line(number, prompt="x" * 100_000))
    time.sleep(0.2)
    pool.close()
    assert is_gone(pid)


def test_a_pool_that_is_forgotten_ends() -> None:
    pool = make_pool()
    (pid,) = pool.pids()
    assert pool.submit(make_line(1)).result(10).number == 1
    del pool
    gc.collect()
    assert wait_until(lambda: is_gone(pid), 5)


def test_a_pool_that_is_closed_wakes_a_run_whose_reader_waits() -> None:
    may_go_on = threading.Event()

    def lines() -> Iterator[Line]:
        yield make_line(1)
        may_go_on.wait(30)

    pool = make_pool()
    answers = pool.run(lines())
    assert next(answers).number == 1
    threading.Timer(0.2, pool.close).start()
    with pytest.raises(RuntimeError, match="closed"):
        next(answers)
    may_go_on.set()


def test_a_fork_of_the_process_leaves_the_replicas_alone() -> None:
    with make_pool() as pool:
        pid = os.fork()
        if pid == 0:
            pool.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        check_complete(pool.run(make_lines(10)), 10)
        assert pool.num_restarts == 0


SCRIPT = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from test_replica_pool import make_line, make_pool
pool = make_pool(2, **eval(sys.argv[2]))
print(*pool.pids(), flush=True)
{}
"""


@pytest.mark.parametrize(
    "how, what, options",
    [
        (signal.SIGKILL, "pool.submit(make_line(1, do='wait')).result()", {}),
        (signal.SIGKILL, "pool.submit(make_line(1, do='exit')); time.sleep(60)", {}),
        (signal.SIGINT, "next(pool.run(make_line(i, do='wait') for i in range(9)))", {}),
        (None, "pool.submit(make_line(1, do='wait'))", {}),
        (None, "raise SystemExit", {}),
    ],
)
def test_replicas_end_with_the_process_that_made_them(
    how: signal.Signals | None, what: str, options: dict[str, Any]
) -> None:
    arguments = [sys.executable, "-", str(TESTS), repr(options)]
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=TESTS.parent,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(SCRIPT.format(what))
    process.stdin.close()
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if how is not None:
        time.sleep(0.3)
        os.killpg(process.pid, how)  # as the terminal does
    process.wait(20)
    process.stdout.close()
    assert wait_until(lambda: all(map(is_gone, pids)), 5)


def test_an_interrupt_does_not_reach_replicas() -> None:
    with make_pool() as pool:
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGINT)
        check_complete(pool.run(make_lines(10)), 10)
        assert pool.pids() == [pid]


# --- with an engine ------------------------------------------------------------------------------


ENGINE_SCRIPT = """
import json
from nanovllm import DEMO_MODEL
from nanovllm.jobs.lines.line import Line
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.replicas.pool import ReplicaPool, find_model

def lines(count, **fields):
    for number in range(count):
        yield Line(number, json.dumps({"prompt": "Once", "temperature": 0, **fields}).encode())

options = dict(device="cpu", max_model_len=128, max_num_seqs=8, tensor_parallel_size=2)
pool = ReplicaPool(DEMO_MODEL, options, LineOptions("demo"))
print(pool.pids()[0], flush=True)
print([answer.error for answer in pool.run(lines(20, max_tokens=5))], flush=True)
for answer in pool.run(lines(100_000, max_tokens=100, ignore_eos=True)):
    pass
"""


def children_of(parent: int) -> list[int]:
    pids = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == parent:
            pids.append(int(status.parent.name))
    return pids


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there are no files to look at")
def test_nothing_outlives_the_process_with_ranks_below_its_replica() -> None:
    """Neither processes nor shared memory, after a kill -9 of the main process."""
    process = subprocess.Popen(
        [sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TESTS.parent
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(ENGINE_SCRIPT.encode())
    process.stdin.close()
    replica = int(process.stdout.readline())
    assert process.stdout.readline().decode().strip() == str([None] * 20)
    pids = [replica, *children_of(replica)]
    assert len(pids) == 3  # with the rank, and the process that keeps track of shared memory
    memory = {
        Path(line.split()[-1])
        for line in Path(f"/proc/{replica}/maps").read_text().splitlines()
        if "/dev/shm/psm_" in line
    }
    assert len(memory) == 2 and all(file.exists() for file in memory)
    process.kill()
    process.wait()
    process.stdout.close()
    assert wait_until(lambda: all(map(is_gone, pids)), 10)
    assert not any(file.exists() for file in memory)


# --- what replicas share --------------------------------------------------------------------------


def test_what_is_on_the_hub_is_fetched_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def resolve(*arguments: Any) -> str:
        calls.append(arguments)
        return f"/cache/{arguments[0]}"

    monkeypatch.setattr(hub, "resolve_model", resolve)
    monkeypatch.setattr(hub, "resolve_tokenizer", resolve)
    options = {"revision": "v1", "download_dir": "/cache", "load_format": "dummy", "seed": 3}
    assert find_model("org/model", options) == ("/cache/org/model", options)
    assert calls == [("org/model", False, hub.HubSource("v1", "/cache"))]
    calls.clear()
    options = {"tokenizer": "org/tokenizer", "tokenizer_revision": "v2"}
    found = {**options, "tokenizer": "/cache/org/tokenizer"}
    assert find_model(MODEL, options) == (MODEL, found)
    assert calls == [("org/tokenizer", hub.HubSource("v2", None))]
    calls.clear()
    for options in ({}, {"tokenizer": MODEL}, {"tokenizer": "a/b", "skip_tokenizer_init": True}):
        assert find_model(MODEL, options) == (MODEL, options)
    assert find_model(None, {"tokenizer": 3}) == (None, {"tokenizer": 3})  # type: ignore[arg-type]
    assert not calls


def test_a_model_that_is_nowhere_is_an_error_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="neither a directory here nor a hub id"):
        ReplicaPool("./no/such/model", {"device": "cpu"}, OPTIONS, 2)


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "replicas, options, visible, expected",
    [
        (1, {}, None, [{}]),  # it takes what there is
        ("auto", {}, None, ["0", "1", "2", "3"]),
        ("auto", {"tensor_parallel_size": 2}, None, ["0,1", "2,3"]),
        ("auto", {"tensor_parallel_size": 3}, None, ["0,1,2"]),
        ("auto", {"tensor_parallel_size": 8}, None, [{}]),  # the engine says what is wrong
        (3, {}, "5, 7,1,0", ["5", "7", "1"]),
        (2, {"tensor_parallel_size": 2}, "GPU-a,GPU-b,GPU-c,GPU-d", ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
        (2, {"tensor_parallel_size": "two"}, None, ["0", "1"]),
    ],
)
def test_gpus_are_divided(
    monkeypatch: pytest.MonkeyPatch,
    replicas: int | str,
    options: dict[str, Any],
    visible: str | None,
    expected: list[Any],
) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    environments = replica_environments(replicas, options)
    if expected != [{}]:
        expected = [{"CUDA_VISIBLE_DEVICES": names} for names in expected]
    assert environments == expected


@pytest.mark.parametrize(
    "replicas, options, error, message",
    [
        (5, {}, ValueError, "5 replicas.*need 5 GPUs, and 4 can be seen; pass replicas=4"),
        (3, {"tensor_parallel_size": 2}, ValueError, "need 6 GPUs.*pass replicas=2"),
        (0, {}, ValueError, "at least 1, not 0"),
        ("all", {}, TypeError, "a number or \"auto\", not 'all'"),
        (True, {}, TypeError, "not True"),
    ],
)
def test_a_wrong_number_of_replicas_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
    replicas: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(devices, "count_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(error, match=message):
        replica_environments(replicas, options)


def test_replicas_on_a_cpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    cpu = {"device": "cpu"}
    assert replica_environments("auto", cpu) == [{}]
    assert replica_environments(4, cpu) == [{"OMP_NUM_THREADS": "3"}] * 4
    assert replica_environments(100, cpu) == [{"OMP_NUM_THREADS": "1"}] * 100
    options = {**cpu, "tensor_parallel_size": 2}
    assert replica_environments(3, options) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert replica_environments(4, cpu) == [{}] * 4
