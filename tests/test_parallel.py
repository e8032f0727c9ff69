"""Several ranks: what travels between them, and that they give the tokens of one rank."""

import multiprocessing
import os
import pickle
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    Checkpoint,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    make_scheduler,
    make_sequence,
)
from conftest import random_prompts as prompts_of

from nanovllm import DEMO_MODEL, LLM, BeamSearchParams, SamplingParams
from nanovllm.engine.scheduler import Step
from nanovllm.engine.sequence import Sequence
from nanovllm.parallel.channel import Channel

# --- sequences on their way to other ranks --------------------------------------------------------


def check_equal_for_a_worker(seq: Sequence) -> None:
    copy = pickle.loads(pickle.dumps(seq))
    for name in (
        "num_computed_tokens",
        "num_scheduled_tokens",
        "row",
        "block_table",
        "temperature",
        "seed",
        "sampling_options",
        "scheduled_token_ids",
    ):
        assert getattr(copy, name) == getattr(seq, name), name
    end = seq.num_computed_tokens  # all of the step's tokens are known, of a preempted sequence too
    assert (
        copy.token_ids == seq.token_ids[end - seq.num_scheduled_tokens : end]
    )  # and no more than that is sent
    assert len(copy.token_ids) == seq.num_scheduled_tokens


@pytest.mark.parametrize("lag", [0, 1])
def test_what_is_pickled_of_a_sequence(lag: int) -> None:
    """Chunks of a prompt, and the chunks of the prefill after a preemption. Of decode steps, arrays
    are sent.
    """
    # 10 blocks of 4: both prompts fit, and one of them must give way while they decode.
    scheduler = make_scheduler(10, 4, max_num_batched_tokens=6)
    seqs = [make_sequence(list(range(start, start + 15)), max_tokens=20) for start in (100, 200)]
    for seq in seqs:
        scheduler.add(seq)
    kinds: set[tuple[bool, bool]] = set()
    pending: deque[Step] = deque()
    while not scheduler.is_finished():
        while len(pending) <= lag and (step := scheduler.schedule()) is not None:
            pending.append(step)
            for seq, yields in zip(step.seqs, step.yields, strict=True) if step.is_prefill else ():
                check_equal_for_a_worker(seq)
                kinds.add((bool(seq.completion_token_ids), yields))
        step = pending.popleft()
        scheduler.postprocess(step, [1] * len(step.seqs))
    assert scheduler.counters["preemptions"] > 0
    assert kinds == {(False, False), (False, True), (True, False), (True, True)}


# --- the channel ----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
def test_messages_of_every_size_arrive_whole_and_in_order(num_workers: int) -> None:
    """Workers are threads here: events and memory are the same. The largest takes hundreds of
    frames.
    """
    messages = [
        ("launch", (bytes(range(256)) * (n // 256) + b"x" * (n % 256), n))
        for n in (0, 1, 150, 5000, 70_000, 3)
    ]
    channel = Channel(num_workers, size=256)
    received: dict[int, list[tuple[str, tuple]]] = {rank: [] for rank in range(1, num_workers + 1)}

    def work(rank: int) -> None:
        channel.taken[rank - 1].release()
        for _ in messages:
            received[rank].append(channel.receive(rank))
            time.sleep(0.002 * rank)  # some are slower

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in received]
    try:
        for thread in threads:
            thread.start()
        for method, arguments in messages:
            channel.send(method, arguments)
        for thread in threads:
            thread.join(timeout=30)
        assert all(received[rank] == messages for rank in received)
    finally:
        channel.close()


def test_channels_have_names_of_their_own_and_leave_nothing() -> None:
    channels = [Channel(1, size=4096) for _ in range(3)]
    names = [memory.name for channel in channels for memory in (channel.memory, channel.words)]
    assert len(set(names)) == 6
    for channel in channels:
        channel.close()
    assert not any((Path("/dev/shm") / name).exists() for name in names)


@pytest.mark.parametrize("raised", [True, False])
def test_a_worker_that_raised_or_died_makes_the_call_raise(raised: bool) -> None:
    channel = Channel(1, size=4096)
    dead = SimpleNamespace(is_alive=lambda: False, exitcode=-9, join=lambda timeout=None: None)
    channel.processes = [dead]  # type: ignore[list-item]
    if raised:
        channel.errors.put((1, "Traceback: the worker's own words"))
        time.sleep(0.1)
    start = time.perf_counter()
    with pytest.raises(
        RuntimeError, match="own words" if raised else "rank 1 died with exit code -9"
    ):
        channel.send("launch", ())
    assert time.perf_counter() - start < 5
    channel.close()


@pytest.mark.parametrize("repeat", range(5))
def test_two_threads_that_find_a_dead_worker_say_the_same(repeat: int) -> None:
    """A call and `watch` kill at once: both know the worker's traceback, and the GPU is let go
    once, at the end.
    """
    channel = Channel(2, size=4096)
    events: list[object] = []
    failures: list[BaseException] = []
    for rank in (1, 2):
        channel.processes.append(  # type: ignore[arg-type]
            SimpleNamespace(
                is_alive=lambda: False,
                exitcode=1,
                join=lambda timeout=None: None,
                kill=lambda rank=rank: events.append(rank),
            )
        )
    channel.on_death = lambda: events.append("let go")
    channel.on_close = lambda: events.append("closed")
    channel.errors.put((2, "Traceback: the worker's own words"))
    threads = [
        threading.Thread(target=lambda: failures.append(channel.kill()), daemon=True)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(failures) == 2 and all("own words" in str(failure) for failure in failures)
    channel.close()
    assert events == [1, 2, "let go", "closed"]


# --- two ranks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One KV head, which both ranks hold, and a vocabulary that two ranks cannot share evenly."""
    return make_checkpoint(
        tmp_path_factory.mktemp("parallel"), num_key_value_heads=1, attention_bias=True, seed=1
    )


def completions(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams]
) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion["token_ids"] for completion in out["completions"]] for out in outputs]


def beams(llm: LLM, prompts: list[list[int]]) -> list[list[list[int]]]:
    outputs = llm.beam_search(prompts, BeamSearchParams(3, 6, ignore_eos=True))
    return [[beam.token_ids for beam in output.sequences] for output in outputs]


def test_two_ranks_give_the_tokens_of_one(awkward: Checkpoint) -> None:
    lengths = [3, 20, 33, 16, 50, 7, 40]
    prompts = prompts_of(0, lengths)
    seeded = SamplingParams(temperature=0.7, max_tokens=16, ignore_eos=True, seed=3)
    params = [seeded if i % 3 == 2 else greedy(16) for i in range(len(prompts))]
    single = make_llm(awkward.path)
    expected = generate_ids(single, prompts, params)
    shared = [replace(seeded, n=n) for n in (4, 2, 3)]  # completions, which share blocks
    expected_shared = completions(single, prompts[1:4], shared)
    expected_beams = beams(single, prompts[:3])
    single.exit()
    assert [expected[i] for i in (0, 1, 3)] == awkward.complete([prompts[i] for i in (0, 1, 3)], 16)

    before = {process.pid for process in multiprocessing.active_children()}
    llm = make_llm(
        awkward.path,
        tensor_parallel_size=2,
        kvcache_block_size=4,
        max_model_len=68,
        num_kvcache_blocks=17,
        max_num_batched_tokens=30,
    )
    memory = Path("/dev/shm") / llm.model_runner.channel.memory.name  # type: ignore[union-attr]
    workers = [
        process for process in multiprocessing.active_children() if process.pid not in before
    ]
    assert len(workers) == 1 and memory.exists()
    assert generate_ids(llm, prompts, params) == expected
    assert llm.scheduler.counters["preemptions"] > 0
    assert generate_ids(llm, prompts[::-1], params[::-1]) == expected[::-1]
    assert completions(llm, prompts[1:4], shared) == expected_shared
    assert beams(llm, prompts[:3]) == expected_beams
    check_bad_input_leaves_the_ranks_in_step(llm, prompts, params, expected)
    llm._max_pending = (
        1  # as on GPUs: each rank has the tokens that its next step needs, the host does not
    )
    num_preemptions = llm.scheduler.counters["preemptions"]
    assert generate_ids(llm, prompts, params) == expected
    assert llm.scheduler.counters["preemptions"] > num_preemptions
    assert completions(llm, prompts[1:4], shared) == expected_shared
    check_bad_input_leaves_the_ranks_in_step(llm, prompts, params, expected)
    llm.exit()
    assert not any(process.is_alive() for process in workers)
    assert not {process.pid for process in multiprocessing.active_children()} - before
    assert not memory.exists()
    assert not torch.distributed.is_initialized()
    assert workers[0].exitcode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(workers[0].pid or 0, 0)


def check_bad_input_leaves_the_ranks_in_step(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], expected: list[list[int]]
) -> None:
    with pytest.raises(ValueError, match="token id"):
        llm.generate([prompts[0], [10_000]], greedy(3))
    assert generate_ids(llm, prompts[:2], params[:2]) == expected[:2]


def test_a_second_engine_over_ranks_in_one_process_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And leaves the process group that is there alone."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    destroyed: list[int] = []
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: destroyed.append(1))
    with pytest.raises(ValueError, match="tensor_parallel_size 2 needs.*default process group"):
        LLM(DEMO_MODEL, tensor_parallel_size=2, device="cpu")
    assert not destroyed


def test_the_command_of_a_decode_step_is_small_and_does_not_grow_with_the_context(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint.path)
    runner, sizes = llm.model_runner, []
    call = runner.call  # type: ignore[union-attr]

    def measured(method: str, *args) -> object:
        sizes.append((method, len(pickle.dumps((method, args), protocol=pickle.HIGHEST_PROTOCOL))))
        return call(method, *args)

    monkeypatch.setattr(runner, "call", measured)
    for length in (10, 200):
        generate_ids(llm, prompts_of(0, [length] * 8), greedy(20))
    short, long = (sizes[start + 1 : start + 20] for start in (0, 20))
    assert [method for method, _ in sizes] == ["launch_prefill", *["launch_decode"] * 19] * 2
    assert short == long and len(set(short)) == 1
    assert short[0][1] < 700  # bytes, for 8 sequences
    llm.exit()
