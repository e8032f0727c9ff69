"""However an engine over several ranks ends, its workers and its shared memory end with it; and 4
ranks agree.

On the CPU, over gloo. Every start of a worker costs seconds, so a test asks several things of one
engine.
"""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    SHARED_MEMORY_PREFIX,
    Checkpoint,
    assert_idle,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import DEMO_MODEL, LLM
from nanovllm.parallel.process_group import ProcessGroup

REPO = Path(__file__).resolve().parent.parent
SHARED_MEMORY = Path("/dev/shm")


def ours() -> set[str]:
    files = SHARED_MEMORY.iterdir()
    return {file.name for file in files if file.name.startswith(SHARED_MEMORY_PREFIX)}


def gone(pid: int) -> bool:
    """Whether a process has ended, as the child of somebody who has not looked yet too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    before = ours(), {process.pid for process in multiprocessing.active_children()}
    yield
    gc.collect()
    assert not ours() - before[0]
    assert not {process.pid for process in multiprocessing.active_children()} - before[1]
    assert not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """With 4 ranks, two of them hold each KV head."""
    return make_checkpoint(tmp_path_factory.mktemp("lifetime"), num_key_value_heads=2, seed=2)


def make(checkpoint: Checkpoint, size: int) -> LLM:
    """A tiny cache, so that sequences are preempted, and chunks."""
    return make_llm(
        checkpoint.path,
        tensor_parallel_size=size,
        kvcache_block_size=4,
        max_model_len=68,
        num_kvcache_blocks=17,
        max_num_batched_tokens=30,
    )


def test_four_ranks_give_the_tokens_of_transformers(parallel: Checkpoint) -> None:
    prompts = random_prompts(0, [3, 20, 33, 16, 50, 7])
    prompts.append(prompts[4][:40] + prompts[0])  # a prefix that the cache may hold
    expected = parallel.complete(prompts, 12)
    llm = make(parallel, 4)
    assert generate_ids(llm, prompts, greedy(12)) == expected
    assert llm.scheduler.counters["preemptions"] > 0
    assert llm.stats()["prefix_hit_tokens"] > 0
    llm.exit()


def test_an_interrupt_leaves_the_ranks_usable_and_the_collector_ends_them(
    parallel: Checkpoint,
) -> None:
    prompts = random_prompts(1, [20] * 12)
    expected = parallel.complete(prompts[:3], 12)
    llm = make(parallel, 2)
    (worker,) = llm.model_runner.channel.processes  # type: ignore[union-attr]
    for delay in (0.05, 0.1, 0.2, 0.3):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate(prompts, greedy(40), use_tqdm=False)
        assert_idle(llm)
        assert generate_ids(llm, prompts[:3], greedy(12)) == expected
    del llm
    gc.collect()
    assert worker.exitcode == 0


def test_a_rank_that_raises_makes_the_call_raise(parallel: Checkpoint) -> None:
    llm = make(parallel, 2)
    llm.model_runner.channel.send("no_such_method", ())  # type: ignore[union-attr]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 failed:(?s:.)*Traceback(?s:.)*no_such_method"):
        llm.generate(random_prompts(1, [20] * 12), greedy(40), use_tqdm=False)
    assert time.monotonic() - start < 10
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.generate([[1]], greedy(1))


def test_a_killed_rank_makes_the_call_raise(parallel: Checkpoint) -> None:
    llm = make(parallel, 2)
    (worker,) = llm.model_runner.channel.processes  # type: ignore[union-attr]
    killed: list[float] = []

    def kill() -> None:
        killed.append(time.monotonic())
        os.kill(worker.pid or 0, signal.SIGKILL)

    threading.Timer(0.3, kill).start()
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        while True:
            llm.generate(random_prompts(1, [20] * 12), greedy(40), use_tqdm=False)
    assert time.monotonic() - killed[0] < 10


def test_a_rank_killed_between_two_calls_makes_the_next_raise(parallel: Checkpoint) -> None:
    llm = make(parallel, 2)
    (worker,) = llm.model_runner.channel.processes  # type: ignore[union-attr]
    time.sleep(0.5)  # it waits for a command
    os.kill(worker.pid or 0, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        llm.generate([[1]], greedy(40), use_tqdm=False)
    assert time.monotonic() - start < 10


def test_a_command_that_was_cut_short_does_not_keep_the_engine_from_ending(
    parallel: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(parallel, 2)
    (worker,) = llm.model_runner.channel.processes  # type: ignore[union-attr]
    cut = SimpleNamespace(release=lambda: sys.exit("a signal handler's"))
    monkeypatch.setattr(llm.model_runner.channel, "ready", [cut])  # type: ignore[union-attr]
    with pytest.raises(SystemExit):
        llm.generate([[1]], greedy(4), use_tqdm=False)
    monkeypatch.undo()
    start = time.monotonic()
    llm.exit()
    assert time.monotonic() - start < 10 and not worker.is_alive()


@pytest.mark.parametrize("holds_kernels", [True, False])
def test_nccl_is_ended_while_graphs_hold_kernels_of_it(
    holds_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL is played here: told to end, it stops its kernels, before which a graph that runs cannot
    be destroyed, and then waits for all graphs that hold some.
    """
    stopped, graphs = threading.Event(), {8: "a graph"}

    class Graphs(dict):
        def clear(self) -> None:
            assert stopped.is_set(), "waits for NCCL's kernels"
            super().clear()

    def abort() -> None:
        stopped.set()
        while holds_kernels and held:
            time.sleep(0.01)
        ended.append(True)

    held, ended = Graphs(graphs), []
    group = ProcessGroup.__new__(ProcessGroup)
    group.small_all_reduce = group.prefill_all_reduce = None
    group.clear_graphs, group.is_cuda = held.clear, True
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_abort_process_group", abort)
    let_go = threading.Thread(target=group.let_go, daemon=True)
    let_go.start()
    let_go.join(timeout=5.0)
    monkeypatch.undo()
    assert not let_go.is_alive() and ended and held == ({} if holds_kernels else graphs)


def test_a_rank_that_cannot_start_makes_the_call_raise(
    parallel: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource_tracker.ensure_running()  # it would not start either
    monkeypatch.setenv("PYTHONHASHSEED", "no number")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 died with exit code 1"):
        make(parallel, 2)
    assert time.monotonic() - start < 10


SCRIPT = f"""
import multiprocessing.shared_memory
multiprocessing.shared_memory._SHM_NAME_PREFIX = {"/" + SHARED_MEMORY_PREFIX!r}
from nanovllm import LLM, SamplingParams
if GUARD:
    options = dict(device="cpu", max_num_seqs=4, num_kvcache_blocks=64)
    llm = LLM({DEMO_MODEL!r}, tensor_parallel_size=2, **options)
    print("workers", *(process.pid for process in multiprocessing.active_children()), flush=True)
    outputs = llm.generate("The capital of", SamplingParams(temperature=0), use_tqdm=False)
    print(outputs[0]["token_ids"], flush=True)
    THEN
"""


def start_script(directory: Path, guard: str, then: str) -> subprocess.Popen[str]:
    file = directory / "script.py"
    file.write_text(SCRIPT.replace("GUARD", guard).replace("THEN", then))
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(file)], env=environment, text=True, stdout=pipe, stderr=pipe
    )


def test_two_scripts_at_once_one_fails_and_one_is_killed(tmp_path: Path) -> None:
    """Neither calls exit(): an exception, and kill -9 while it generates, end the workers too."""
    for name in ("fails", "killed"):
        (tmp_path / name).mkdir()
    fails = start_script(
        tmp_path / "fails", "__name__ == '__main__'", "raise ValueError('the script is wrong')"
    )
    forever = (
        "while True: llm.generate(['Hello'] * 4, SamplingParams(max_tokens=64), use_tqdm=False)"
    )
    killed = start_script(tmp_path / "killed", "__name__ == '__main__'", forever)
    workers, answers = [], []
    for process in (fails, killed):
        assert process.stdout is not None
        workers.append([int(pid) for pid in process.stdout.readline().split()[1:]])
        answers.append(process.stdout.readline())
    assert (
        [len(pids) for pids in workers] == [1, 1]
        and answers[0] == answers[1]
        and len(answers[0]) > 5
    )
    killed.kill()
    _, errors = fails.communicate(timeout=60)
    assert fails.returncode == 1 and "the script is wrong" in errors
    killed.communicate(timeout=60)
    assert wait_until(lambda: all(gone(pid) for pids in workers for pid in pids), 10)
    # The shared memory of a killed process is freed by Python's resource tracker, which outlives
    # it.
    assert wait_until(lambda: not ours(), 10)


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = start_script(tmp_path, "True", "pass")
    _, errors = script.communicate(timeout=120)
    assert script.returncode == 1
    assert (
        "tensor-parallel rank 1 died" in errors
        and "if __name__ == '__main__'" in errors.splitlines()[-1]
    )
