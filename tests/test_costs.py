"""What single operations may cost, and what a CPU's step shares between its layers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_llm, random_prompts

from nanovllm import SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels import cpu_attention
from nanovllm.kernels.attention_backend import CPU, TORCH, AttentionBackend, AttentionOptions
from nanovllm.kernels.cpu_threads import WORK_PER_THREAD, threads_for
from nanovllm.kernels.gate_mul import gate_mul_in_place, gate_mul_torch

# --- aborts ---------------------------------------------------------------------------------------


def make_scheduler(num_blocks: int = 64, block_size: int = 16) -> Scheduler:
    return Scheduler(
        SimpleNamespace(  # type: ignore[arg-type]
            max_num_seqs=4,
            max_num_batched_tokens=64,
            eos=(),
            num_kvcache_blocks=num_blocks,
            kvcache_block_size=block_size,
            enable_prefix_caching=True,
        )
    )


@pytest.mark.parametrize("order", ["first to last", "last to first", "from the middle"])
def test_single_aborts_take_linear_time(order: str) -> None:
    def seconds(number: int) -> float:
        scheduler = make_scheduler()
        seqs = [Sequence([1, 2], SamplingParams()) for _ in range(number)]
        for seq in seqs:
            scheduler.add(seq)
        if order == "last to first":
            seqs.reverse()
        elif order == "from the middle":
            seqs = seqs[number // 2 :] + seqs[: number // 2]
        start = time.process_time()
        for seq in seqs:
            scheduler.abort([seq])
        assert scheduler.is_finished()
        return time.process_time() - start

    # Sixteen times as many. Linear takes sixteen times as long, quadratic 256 times.
    assert min(seconds(32_000) for _ in range(2)) < 64 * max(seconds(2_000), 0.001)


def test_aborts_leave_the_others_in_their_order() -> None:
    scheduler = make_scheduler()
    seqs = [Sequence([number] * 8, SamplingParams(max_tokens=9)) for number in range(12)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.schedule()  # four run
    scheduler.abort([seqs[1], seqs[6], seqs[11], seqs[6]])
    scheduler.abort([seqs[6]])
    assert list(scheduler.running) == [seqs[0], seqs[2], seqs[3]]
    assert list(scheduler.waiting) == [*seqs[4:6], *seqs[7:11]]
    assert [seq.finish_reason for seq in (seqs[1], seqs[6], seqs[11])] == ["abort"] * 3
    step = scheduler.schedule()
    assert step is not None and step.seqs == [seqs[4]]


# --- cached blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 5, 14])
def test_short_requests_evict_no_cached_prefix(checkpoint: Checkpoint, length: int) -> None:
    """One after the other they use the same blocks, which never hold anything to share."""
    llm = make_llm(checkpoint.path, kvcache_block_size=16, max_model_len=64, num_kvcache_blocks=12)
    (prefix,) = random_prompts(5, [48])
    generate_ids(llm, [prefix + [1]], greedy(1))
    for prompt in random_prompts(6, [length] * 20):
        generate_ids(llm, [prompt], greedy(1))
    (result,) = llm.generate([[*prefix, 2]], greedy(1), use_tqdm=False)
    assert result["num_cached_tokens"] == 48
    llm.exit()


def test_without_prefix_caching_no_block_is_cached() -> None:
    manager = BlockManager(4, 4, enable_prefix_caching=False)
    for _ in range(3):
        seq = Sequence([1] * 9, SamplingParams())
        manager.allocate(seq)
        table = list(seq.block_table)
        manager.deallocate(seq)
        assert list(manager.free_block_ids)[:3] == table  # used again at once


# --- semaphores -----------------------------------------------------------------------------------

RANKS = """
import multiprocessing.synchronize, os, signal, sys
made = []
init = multiprocessing.synchronize.SemLock.__init__
def recorded(self, *args, **options):
    init(self, *args, **options)
    if self._semlock.name:
        made.append("/dev/shm/sem." + self._semlock.name.lstrip("/"))
multiprocessing.synchronize.SemLock.__init__ = recorded
from nanovllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu")
    assert made and all(map(os.path.exists, made))
    if sys.argv[2] == "exit":
        llm.exit()
    else:
        os.kill(llm._channel.processes[0].pid, signal.SIGKILL)
        try:
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=9), use_tqdm=False)
        except RuntimeError as error:
            print(error)
            kept = error  # and with it the frames that it went through
    print("left:", [name for name in made if os.path.exists(name)])
"""


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="semaphores are no files here")
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_semaphore_outlives_the_ranks(checkpoint: Checkpoint, tmp_path: Path, end: str) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    result = subprocess.run(
        [sys.executable, str(script), checkpoint.path, end],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "left: []" in result.stdout, result.stdout + result.stderr
    assert "leaked" not in result.stderr
    assert (f"exit code -{signal.SIGKILL}" in result.stdout) == (end == "kill")


# --- threads --------------------------------------------------------------------------------------


@pytest.fixture
def four_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("worth, threads", [(0, 1), (1, 1), (2, 2), (3.9, 3), (4, 4), (1000, 4)])
def test_threads_follow_the_work_up_to_what_the_user_set(
    four_threads: None, worth: float, threads: int
) -> None:
    with threads_for(int(worth * WORK_PER_THREAD)):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), threads_for(1):
        raise KeyError
    assert torch.get_num_threads() == 4


def test_an_engine_of_a_small_model_uses_one_thread_and_restores_the_setting(
    four_threads: None, checkpoint: Checkpoint
) -> None:
    llm = make_llm(checkpoint.path)
    seen: list[int] = []
    llm.model_runner.model.register_forward_pre_hook(
        lambda *_: seen.append(torch.get_num_threads())
    )
    generate_ids(llm, random_prompts(7, [3, 9]), greedy(4))
    assert set(seen) == {1} and torch.get_num_threads() == 4
    llm.exit()


# --- the CPU's attention --------------------------------------------------------------------------


def attend(
    backend: AttentionBackend,
    lengths: list[tuple[int, int]],
    in_place: bool,
    options: tuple[AttentionOptions, ...] = (AttentionOptions(0.25), AttentionOptions(0.25)),
) -> list:
    """Two layers of a step whose sequences have (new, all) tokens; everything that it yields."""
    torch.manual_seed(len(lengths))
    block_size, heads, kv_heads, head_dim = 8, 6, 2, 16
    width = max(-(-num_keys // block_size) for _, num_keys in lengths)
    num_blocks = width * len(lengths)
    order = torch.arange(num_blocks) if in_place else torch.randperm(num_blocks)
    tables = order.view(len(lengths), width).int()
    caches = torch.randn(2, 2, num_blocks, block_size, kv_heads, head_dim)
    if not in_place:
        caches[:, :, tables[-1, -1], -1] = float("nan")  # a slot that nobody may read
    positions = torch.cat([torch.arange(total - new, total) for new, total in lengths])
    owners = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor([new for new, _ in lengths])
    )
    slots = (tables[owners, positions // block_size] * block_size + positions % block_size).int()
    angles = torch.rand(200, head_dim // 2)
    num_new, num_keys = map(list, zip(*lengths, strict=True))
    if max(num_new) == 1:
        plan = backend.plan_decode(torch.tensor(num_keys, dtype=torch.int32), tables)
    else:
        is_fresh = num_new == num_keys
        plan = backend.plan_prefill(
            num_new, num_keys, None if is_fresh else tables.numpy(), torch.from_numpy
        )
    results = [caches]
    for layer in range(2):
        qkv = torch.randn(len(positions), heads + 2 * kv_heads, head_dim)
        norms = torch.rand(2, head_dim) if layer else (None, None)
        store = (positions, angles.cos(), angles.sin(), *norms, 1e-6, *caches[layer], slots, heads)
        q, k, v = backend.store(plan, qkv, *store).split((heads, kv_heads, kv_heads), dim=1)
        results += [qkv, backend.attend(q, k, v, *caches[layer], plan, options[layer])]
    if max(num_new) > 1:
        last = torch.tensor(num_new).cumsum(0) - 1
        last_plan = backend.last_tokens_plan(plan)
        results.append(backend.attend(q[last], k, v, *caches[1], last_plan, options[1]))
    return results


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 5)],
        [(1, 150)],
        [(1, 20)] * 5,
        [(1, n) for n in (150, 149, 60, 59, 58, 3, 2, 1)],
        [(1, n) for n in (1, 90, 2, 91, 8, 9)],  # not sorted
        [(7, 7)],
        [(7, 7), (1, 1), (20, 20), (2, 2)],
        [(7, 30), (1, 40), (1, 39), (20, 20), (2, 3)],
    ],
    ids=str,
)
def test_the_cpu_backend_agrees_with_the_references(
    lengths: list[tuple[int, int]], in_place: bool
) -> None:
    ours, references = attend(CPU, lengths, in_place), attend(TORCH, lengths, in_place)
    assert len(ours) == len(references)
    for mine, reference in zip(ours, references, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not any(result.isnan().any() for result in ours[1:])


def test_padding_rows_store_nothing_and_disturb_nobody() -> None:
    torch.manual_seed(0)
    caches = torch.randn(2, 4, 8, 1, 16)
    before = caches.clone()
    tables = torch.tensor([[2, 1], [0, 0], [3, 0]], dtype=torch.int32)
    slots = torch.tensor([9, -1, 26], dtype=torch.int32)
    positions, table = torch.tensor([9, 0, 2]), torch.rand(20, 8)
    results = []
    for backend in (CPU, TORCH):
        caches.copy_(before)
        torch.manual_seed(1)
        plan = backend.plan_decode(torch.tensor([10, 0, 3], dtype=torch.int32), tables)
        inputs = (torch.randn(3, 4, 16), positions, table.cos(), table.sin(), None, None, 0.0)
        q, k, v = backend.store(plan, *inputs, *caches, slots, 2).split((2, 1, 1), dim=1)
        out = backend.attend(q, k, v, *caches, plan, AttentionOptions(0.25))
        results.append((out[[0, 2]], caches.clone()))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference)
    assert torch.equal(caches[:, 0], before[:, 0])


@pytest.mark.parametrize(
    "lengths, groups",
    [
        ([2000] + [100] * 31, [1, 10, 10, 10, 1]),
        ([100] * 4, [4]),
        ([300, 290, 280, 100], [3, 1]),
        ([64] * 40, [16, 16, 8]),
        ([5000, 4000], [1, 1]),
        ([1, 2, 3], [1, 1, 1]),  # the scheduler sorts the other way
    ],
)
def test_sequences_of_like_length_are_attended_together(
    lengths: list[int], groups: list[int]
) -> None:
    tables = torch.randperm(len(lengths) * 20).view(len(lengths), 20).int().numpy()
    step = cpu_attention.CpuStep([1] * len(lengths), lengths, tables)
    planned = step._plan(torch.empty(len(lengths) * 20, 256, 1, 2), window=None)
    assert [group.num_seqs for group in planned] == groups


def test_the_activation_in_place_is_the_activation() -> None:
    x = torch.randn(5, 12)
    expected = gate_mul_torch(x)
    assert torch.equal(gate_mul_in_place(x), expected)
