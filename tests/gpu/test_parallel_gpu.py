"""Several GPUs: the tokens of one, and nothing left hanging when a rank dies."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, random_prompts
from test_engine_gpu import DEVICE, VOCAB, check_choices, make
from test_families import FAMILIES, LENGTHS
from test_requests_gpu import PARAMS

from nanovllm import LLM, SamplingParams
from nanovllm.engine.model_runner import ModelRunner

NUM_GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason="needs several CUDA GPUs")]
SIZES = [size for size in (2, 4, 8) if size <= NUM_GPUS]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """8 query and 2 KV heads: with 4 ranks, two hold each of the latter. VOCAB + 1 divides by no
    number of ranks.
    """
    saved = make_checkpoint(
        tmp_path_factory.mktemp("parallel"),
        std=256**-0.5,
        vocab_size=VOCAB + 1,
        hidden_size=256,
        head_dim=64,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=512,
    )
    return Checkpoint(saved.path, saved.model.to(DEVICE))


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = (
        {process.pid for process in multiprocessing.active_children()},
        set(os.listdir("/dev/shm")),
    )
    yield
    left = {process.pid for process in multiprocessing.active_children()} - before[0]
    assert not left and not {
        name for name in set(os.listdir("/dev/shm")) - before[1] if "psm" in name
    }
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_give_the_tokens_of_transformers(
    parallel: Checkpoint, size: int, eager: bool, dtype: str, nothing_left: None
) -> None:
    prompts = random_prompts(0, [1, 2, 17, 63, 64, 130, 255, 256, 257, 300, 511, 600], VOCAB)
    expected = parallel.complete(prompts, NUM_TOKENS, min_margin=2e-5)
    llm = make(
        parallel,
        dtype=dtype,
        enforce_eager=eager,
        tensor_parallel_size=size,
        max_num_batched_tokens=500,
        kvcache_block_size=64,
        max_model_len=640,
        num_kvcache_blocks=24,
    )
    try:
        group = llm.model_runner.group  # type: ignore[union-attr]
        assert group.small_all_reduce is not None
        assert group.prefill_all_reduce is None  # no step is long enough for pieces
        for count in (12, 1, 3):  # as many tokens as each kernel takes
            tokens = generate_ids(llm, prompts[:count], greedy(NUM_TOKENS))
            if dtype == "float32":
                assert tokens == expected[:count]
            else:
                check_choices(parallel, prompts, tokens)
        assert llm.scheduler.counters["preemptions"] > 0
        # Equal prompts: computed once, and their last blocks copied on each rank.
        tokens = generate_ids(llm, prompts[2:5] * 3, greedy(NUM_TOKENS))
        if dtype == "float32":
            assert tokens == expected[2:5] * 3
        else:
            check_choices(parallel, prompts[2:5] * 3, tokens)
        params = [
            SamplingParams(temperature=0.8, seed=i, max_tokens=8, ignore_eos=True)
            for i in range(12)
        ]
        assert generate_ids(llm, prompts[:4], params[:4]) == generate_ids(
            llm, prompts[:4], params[:4]
        )
    finally:
        llm.exit()


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_shared_prefixes(tmp_path: Path, eager: bool, nothing_left: None) -> None:
    """Each rank finds the same groups by itself, while sequences end and join."""
    saved = make_checkpoint(
        tmp_path,
        std=256**-0.5,
        vocab_size=VOCAB,
        hidden_size=256,
        head_dim=128,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=512,
    )
    checkpoint = Checkpoint(saved.path, saved.model.to(DEVICE))
    llm = make(
        checkpoint,
        dtype="float32",
        attention_backend="triton",
        enforce_eager=eager,
        tensor_parallel_size=2,
        kvcache_block_size=64,
        num_kvcache_blocks=800,
        max_num_seqs=256,
    )
    try:
        sharing = llm.model_runner.prefix_sharing  # type: ignore[union-attr]
        steps = []
        send = sharing.upload

        def recording(size: int) -> None:
            steps.append(size)
            send(size)

        sharing.upload = recording  # type: ignore[method-assign]
        members = 10 + sharing.cost.step_cost // 832
        prefix = random_prompts(0, [840], VOCAB)[0]
        prompts = [prefix + tail for tail in random_prompts(1, [1, 9, 60] * members, VOCAB)]
        prompts = prompts[:members] + random_prompts(2, [5, 300], VOCAB)
        expected = checkpoint.complete(prompts, NUM_TOKENS, min_margin=2e-5)
        lengths = [NUM_TOKENS - i % 5 * 4 for i in range(len(prompts))]
        tokens = generate_ids(llm, prompts, [greedy(length) for length in lengths])
        assert tokens == [e[:n] for e, n in zip(expected, lengths, strict=True)]
        assert len(steps) >= 7
    finally:
        llm.exit()


@pytest.mark.parametrize(
    "name",
    ["olmo2-shared-kv-head", "phi3-shared-kv-head-tied", "granite", "gemma3", "qwen3-moe"],
)
def test_families_over_ranks(tmp_path: Path, name: str, nothing_left: None) -> None:
    """Those that differ in what ranks sum or load: q and k normalised over all heads, tensors that
    the checkpoint merges, outputs scaled or normalised before they are added, experts of which each
    rank has a part. In graphs.
    """
    saved = make_checkpoint(tmp_path, **{"seed": 1, **FAMILIES[name]})
    checkpoint = Checkpoint(saved.path, saved.model.to(DEVICE))
    prompts = random_prompts(0, LENGTHS)
    expected = checkpoint.complete(prompts, NUM_TOKENS, min_margin=2e-5)
    size = min(4, SIZES[-1])  # they have four query heads
    llm = make(checkpoint, dtype="float32", tensor_parallel_size=size, max_num_batched_tokens=100)
    try:
        for count in (len(prompts), 1):
            assert generate_ids(llm, prompts[:count], greedy(NUM_TOKENS)) == expected[:count]
    finally:
        llm.exit()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_rows_summed_in_one_step_and_in_two(
    tmp_path: Path, dtype: str, nothing_left: None
) -> None:
    """Rows of several warps, as real models have them, for the norm that the all-reduce computes on
    its way; many and few. In bfloat16 it adds up the parts of GEMMs, too.
    """
    saved = make_checkpoint(
        tmp_path,
        std=2048**-0.5,
        vocab_size=VOCAB + 1,
        hidden_size=2048,
        intermediate_size=4096,
        head_dim=128,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    wide = Checkpoint(saved.path, saved.model.to(DEVICE))
    prompts = random_prompts(4, [1, 17, 100, 300, 40, *(2 + i % 30 for i in range(150))], VOCAB)
    expected = wide.complete(prompts[:5], NUM_TOKENS, min_margin=2e-5)
    expected += wide.complete(prompts[5:], 8, min_margin=2e-5)
    # 155 sequences at first, then 70, and 5 at last.
    params = [
        greedy(NUM_TOKENS if i < 5 else 8 if i < 70 else 3 + i % 5) for i in range(len(prompts))
    ]
    expected = [tokens[: p.max_tokens] for tokens, p in zip(expected, params, strict=True)]
    llm = make(
        wide,
        dtype=dtype,
        tensor_parallel_size=SIZES[-1],
        max_num_batched_tokens=150,
        max_num_seqs=160,
    )
    try:
        tokens = generate_ids(llm, prompts, params)
        assert [len(ids) for ids in tokens] == [p.max_tokens for p in params]
        assert (
            tokens == expected
            if dtype == "float32"
            else check_choices(wide, prompts, tokens) is None
        )
    finally:
        llm.exit()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefills_summed_in_pieces(
    tmp_path: Path, size: int, dtype: str, nothing_left: None
) -> None:
    """Of even and odd numbers of tokens, one with a cached prefix, and shorter ones that are summed
    at once.
    """
    saved = make_checkpoint(
        tmp_path,
        std=256**-0.5,
        vocab_size=VOCAB + 1,
        hidden_size=256,
        head_dim=64,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        intermediate_size=512,
    )
    deep = Checkpoint(saved.path, saved.model.to(DEVICE))
    prompts = random_prompts(5, [900, 1, 800, 257, 700, 999, 640, 33, 900, 512, 63, 777], VOCAB)
    expected = deep.complete(prompts, 8, min_margin=2e-5)
    llm = make(deep, dtype=dtype, tensor_parallel_size=size, max_num_batched_tokens=5003)
    try:
        prefill_all_reduce = llm.model_runner.group.prefill_all_reduce  # type: ignore[union-attr]
        count = prefill_all_reduce.count
        for again in range(4):
            tokens = generate_ids(llm, prompts[again:] + prompts[:again], greedy(8))
            tokens = tokens[-again:] + tokens[:-again] if again else tokens
            assert (
                tokens == expected
                if dtype == "float32"
                else check_choices(deep, prompts, tokens) is None
            )
            if again != 2:  # the next time with all prefixes cached, or with none
                llm.reset()
        assert prefill_all_reduce.count >= count + 3 * 12  # 6 sums of two pieces in each first step
    finally:
        llm.exit()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
def test_sampling_options_on_several_ranks(
    parallel: Checkpoint, size: int, eager: bool, nothing_left: None
) -> None:
    """Logits are gathered, and every rank draws the same tokens: those of one GPU, but for what
    rounding turns.
    """
    prompts, params = random_prompts(3, [5, 40, 17, 100, 64, 9, 11], VOCAB), PARAMS
    results = []
    for ranks in (1, size):
        llm = make(parallel, dtype="float32", enforce_eager=eager, tensor_parallel_size=ranks)
        try:
            results.append([generate_ids(llm, prompts, params) for _ in range(2)])
        finally:
            llm.exit()
    assert results[1][0] == results[1][1]
    assert (
        sum(one == other for one, other in zip(results[0][0], results[1][0], strict=True))
        >= len(prompts) - 1
    )


@pytest.fixture
def busy(parallel: Checkpoint) -> Iterator[tuple[LLM, dict[str, Any]]]:
    """An engine, and arguments that keep it generating for a long time."""
    llm = make(parallel, tensor_parallel_size=2, num_kvcache_blocks=400, max_num_seqs=64)
    yield (
        llm,
        dict(
            prompts=random_prompts(1, [20] * 64, VOCAB), sampling_params=greedy(900), use_tqdm=False
        ),
    )
    llm.exit()


def test_a_killed_rank_makes_the_call_raise(busy: tuple[LLM, dict[str, Any]]) -> None:
    llm, arguments = busy
    (worker,) = llm.model_runner.channel.processes  # type: ignore[union-attr]
    died: list[float] = []

    def kill() -> None:
        died.append(time.perf_counter())
        os.kill(worker.pid or 0, signal.SIGKILL)

    threading.Timer(0.1, kill).start()
    with pytest.raises(RuntimeError, match="rank 1 died with exit code -9"):
        llm.generate(**arguments)
    assert time.perf_counter() - died[0] < 10
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.generate(**arguments)
    assert torch.ones(3, device=DEVICE).sum().item() == 3  # the GPU is free for other work


def fail_and_call(llm: LLM, arguments: dict[str, Any]) -> None:
    llm.model_runner.channel.send("no_such_method", ())  # type: ignore[union-attr]
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"rank [1-9] failed:(?s:.)*no_such_method"):
        llm.generate(**arguments)
    assert time.perf_counter() - start < 10


def test_a_rank_that_raises_makes_the_call_raise(busy: tuple[LLM, dict[str, Any]]) -> None:
    fail_and_call(*busy)


@pytest.mark.parametrize("size", SIZES)
def test_a_rank_that_raises_ends_a_long_prefill(
    tmp_path: Path, size: int, nothing_left: None
) -> None:
    """Of more launches than the driver queues: the host is stuck in one until the wait for the dead
    rank ends.
    """
    deep = make_checkpoint(tmp_path, hidden_size=256, head_dim=64, num_hidden_layers=60)
    llm = make(
        deep, tensor_parallel_size=size, max_num_batched_tokens=16384, num_kvcache_blocks=100
    )
    fail_and_call(
        llm, dict(prompts=random_prompts(1, [900] * 20), sampling_params=greedy(9), use_tqdm=False)
    )
    llm.exit()


def test_graphs_that_hold_nccl_keep_nothing_from_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    """NCCL goes on waiting for them when its communicator is ended; and it is in those of large
    steps.
    """
    wide, options = (
        make_checkpoint(tmp_path, hidden_size=4096),
        dict(tensor_parallel_size=2, max_num_seqs=264),
    )
    llm = make(wide, **options)
    fail_and_call(
        llm,
        dict(prompts=random_prompts(1, [20] * 264), sampling_params=greedy(100), use_tqdm=False),
    )
    llm.exit()
    decode = ModelRunner._decode

    def fails(self: ModelRunner, size: int, *args: Any) -> Any:
        if size == 256:
            raise ValueError("a start that fails")
        return decode(self, size, *args)

    monkeypatch.setattr(ModelRunner, "_decode", fails)  # in this process: rank 0
    with pytest.raises(ValueError, match="a start that fails"):
        make(wide, **options)


def test_an_interrupt_leaves_all_ranks_usable(busy: tuple[LLM, dict[str, Any]]) -> None:
    llm, arguments = busy
    expected = generate_ids(llm, arguments["prompts"][:5], greedy(20))
    for delay in (0.05, 0.1, 0.15):
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(**arguments)
        assert generate_ids(llm, arguments["prompts"][:5], greedy(20)) == expected


def test_memory_is_given_back(parallel: Checkpoint, nothing_left: None) -> None:
    def free() -> list[int]:
        torch.cuda.empty_cache()
        return [torch.cuda.mem_get_info(i)[0] for i in range(2)]

    llm = make(parallel, tensor_parallel_size=2)
    (worker,) = llm.model_runner.channel.processes  # type: ignore[union-attr]
    llm.exit()
    assert worker.exitcode == 0
    before = free()
    make(parallel, tensor_parallel_size=2, num_kvcache_blocks=2000).exit()
    assert all(
        after > bytes_before - (64 << 20)
        for after, bytes_before in zip(free(), before, strict=True)
    )
