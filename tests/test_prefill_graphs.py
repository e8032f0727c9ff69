"""Prefills as CUDA graphs run them, on the CPU: padded, from fixed buffers, from a work list.

The graph itself is replaced by what it records. So the tokens must be those of `transformers`, as
in test_equality.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Checkpoint,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from test_families import FAMILIES, need

from nanovllm import LLM, SamplingParams
from nanovllm.engine.graphs import PREFILL_SIZES, StepGraph, StepOutput
from nanovllm.engine.step_buffers import StepBuffers
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_backend import FLASH_PREFILL, TORCH, TRITON, AttentionBackend
from nanovllm.kernels.prefill_tiles import tiled_prefill_torch

TORCH_TILED = AttentionBackend(
    "torch", TORCH.norm_rope_store, TORCH.prefill, TORCH.decode, tiled_prefill_torch
)
LENGTHS = [1, 2, 15, 16, 17, 7, 31, 48, 120]


class Replay:
    """A prefill of one size that leaves its results in fixed places."""

    def __init__(self, llm: LLM, size: int) -> None:
        self.prefill = llm.model_runner._prefill  # type: ignore[union-attr]
        self.size = size
        num_seqs = min(size, llm.model_runner.padded_prefill.max_seqs)  # type: ignore[union-attr]
        self.token_ids = torch.zeros(num_seqs, dtype=torch.int64)
        self.logits = torch.zeros(num_seqs, 127)
        self.hidden = torch.zeros(num_seqs, llm.config.hf_config.hidden_size)
        self.count = 0

    def replay(self) -> None:
        self.count += 1
        with torch.inference_mode():
            output = self.prefill(self.size)
            self.token_ids.copy_(output.token_ids)
            self.logits.copy_(output.logits)
            self.hidden.copy_(output.hidden)


def add_graphs(llm: LLM, backend: AttentionBackend) -> list[Replay]:
    """Have the engine's small prefills replayed."""
    runner = llm.model_runner
    assert runner is not None
    runner.backend = backend
    for layer in runner.attention_layers:
        layer.backend = backend
    replays = [Replay(llm, size) for size in runner.padded_prefill.sizes]
    for replay in replays:
        output = StepOutput(replay.token_ids, replay.logits, replay.hidden)
        graph: Any = replay
        runner.prefill_graphs.graphs[replay.size] = StepGraph(graph, output)
    runner.prefill_graphs.sizes = list(runner.padded_prefill.sizes)
    return replays


CASES: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    "tiny-cache": dict(max_model_len=153, num_kvcache_blocks=10),
    "few-rows": dict(max_num_seqs=2),
    "one-row": dict(max_num_seqs=1),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_transformers(checkpoint: Checkpoint, case: str) -> None:
    prompts = random_prompts(3, LENGTHS)
    prompts += [prompts[-1][:48] + tail for tail in random_prompts(4, [1, 20])]
    expected = checkpoint.complete(prompts, 24)
    llm = make_llm(checkpoint.path, 1, **CASES[case])
    replays = add_graphs(llm, TORCH_TILED)
    try:
        assert generate_ids(llm, prompts, greedy(24)) == expected
        assert generate_ids(llm, prompts, greedy(24)) == expected  # with prefix hits
        for prompt, tokens in zip(prompts, expected, strict=True):
            assert generate_ids(llm, [prompt], greedy(4)) == [tokens[:4]]
        assert sum(replay.count > 0 for replay in replays) >= 2
        counters = llm.scheduler.counters
        assert counters["prefix_hit_tokens"] > 0
        assert (counters["preemptions"] > 0) == (case == "tiny-cache")
    finally:
        llm.exit()


@pytest.mark.parametrize(
    "options",
    [
        dict(kvcache_block_size=5, max_model_len=253),
        dict(kvcache_block_size=256, num_kvcache_blocks=64),
        dict(max_num_batched_tokens=90, max_num_seqs=5),
        dict(max_num_batched_tokens=3),
    ],
    ids=["block-5", "block-256", "few-rows", "tiny-steps"],
)
def test_nothing_that_earlier_steps_left_is_read(
    checkpoint: Checkpoint, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the buffers a step reads what its own upload wrote, of the cache what was stored there."""
    prompts = random_prompts(3, LENGTHS)
    prompts += [prompts[-1][:48] + tail for tail in random_prompts(4, [1, 20])]
    expected = checkpoint.complete(prompts, 12)
    upload = StepBuffers.upload

    def upload_over_nonsense(buffers: StepBuffers, *inputs: Any) -> None:
        buffers._device_memory.view(torch.int32).fill_(10**6)
        upload(buffers, *inputs)

    monkeypatch.setattr(StepBuffers, "upload", upload_over_nonsense)
    llm = make_llm(checkpoint.path, 1, **options)
    replays = add_graphs(llm, TORCH_TILED)
    try:
        llm.model_runner.kv_cache.fill_(float("nan"))  # type: ignore[union-attr]
        for _ in range(2):  # the second time with prefix hits
            assert generate_ids(llm, prompts, greedy(12)) == expected
        assert sum(replay.count for replay in replays) > 1
    finally:
        llm.exit()


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral-window", "qwen3-moe"])
def test_windows_caps_and_experts(tmp_path: Path, family: str) -> None:
    need(FAMILIES[family])
    saved = make_checkpoint(tmp_path, **{"seed": 1, **FAMILIES[family]})
    prompts = random_prompts(0, [1, 15, 48, 90])
    prompts += [prompts[-1][:40] + tail for tail in random_prompts(1, [3, 20])]
    expected = saved.complete(prompts, 12)
    llm = make_llm(saved.path, 1, max_num_batched_tokens=100)
    replays = add_graphs(llm, TORCH_TILED)
    try:
        for _ in range(2):  # the second time with prefix hits
            assert generate_ids(llm, prompts, greedy(12)) == expected
        assert sum(replay.count for replay in replays) > 2
    finally:
        llm.exit()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_tokens_of_transformers_by_our_kernels(checkpoint: Checkpoint) -> None:
    prompts = random_prompts(5, [3, 17, 30])
    expected = checkpoint.complete(prompts, 4)
    llm = make_llm(checkpoint.path, 1, max_num_batched_tokens=40, max_num_seqs=4)
    replays = add_graphs(llm, TRITON)
    try:
        assert generate_ids(llm, prompts, greedy(4)) == expected
        assert generate_ids(llm, prompts[1:2], greedy(4)) == expected[1:2]  # with a prefix hit
        assert sum(replay.count for replay in replays) == 3
    finally:
        llm.exit()


def test_what_auto_chooses_on_a_gpu_has_prefill_graphs() -> None:
    for backend in (TRITON, FLASH_PREFILL):
        assert backend.tiled_prefill is TRITON.tiled_prefill is not None


def test_more_sequences_than_a_graph_takes_run_eagerly(checkpoint: Checkpoint) -> None:
    prompts = random_prompts(6, [1 + i % 3 for i in range(80)])
    llm = make_llm(checkpoint.path, 1, max_num_seqs=80)
    expected = generate_ids(llm, prompts, greedy(3))
    replays = add_graphs(llm, TORCH_TILED)
    try:
        assert generate_ids(llm, prompts, greedy(3)) == expected
        assert sum(replay.count for replay in replays) == 0
        assert generate_ids(llm, prompts[:64], greedy(3)) == expected[:64]
        assert sum(replay.count for replay in replays) == 1
    finally:
        llm.exit()


def test_equal_prompts_share_in_a_graph(checkpoint: Checkpoint) -> None:
    """Sequences without new tokens take their logits from the last row of the one before them."""
    prompts = random_prompts(9, [1, 20, 16, 33])
    expected = checkpoint.complete(prompts, 8)
    llm = make_llm(checkpoint.path, 1)
    replays = add_graphs(llm, TORCH_TILED)
    try:
        assert generate_ids(llm, prompts * 3, greedy(8)) == expected * 3
        assert llm.stats()["prefix_hit_tokens"] == 2 * sum(map(len, prompts))
        assert sum(replay.count for replay in replays) == 1
        # The graph of 16 tokens has room for 16 sequences.
        for number, num_replays in ((16, 2), (17, 2)):
            assert generate_ids(llm, prompts[:1] * number, greedy(8)) == expected[:1] * number
            assert sum(replay.count for replay in replays) == num_replays
    finally:
        llm.exit()


OPTIONS = [
    SamplingParams(temperature=0.8, seed=3, max_tokens=6),
    SamplingParams(temperature=0.8, seed=4, top_k=5, max_tokens=6, logprobs=2),
    SamplingParams(temperature=0, max_tokens=6, repetition_penalty=1.5, ignore_eos=True),
    SamplingParams(temperature=1.0, seed=5, max_tokens=6, logit_bias={3: 5.0}, min_tokens=3),
]


@pytest.fixture(params=[OPTIONS, OPTIONS[:1]], ids=["options", "plain"])
def params(request: pytest.FixtureRequest) -> Iterator[list[SamplingParams]]:
    yield request.param


def test_sampling_options(checkpoint: Checkpoint, params: list[SamplingParams]) -> None:
    """A graph samples plainly; with options its logits are sampled from again."""
    prompts = random_prompts(7, [5, 20, 33, 9])[: len(params)]
    llm = make_llm(checkpoint.path, 1, max_num_batched_tokens=30)
    expected = llm.generate(prompts, params, use_tqdm=False)
    replays = add_graphs(llm, TORCH_TILED)
    try:
        llm.reset()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        for output, want in zip(outputs, expected, strict=True):
            assert output["token_ids"] == want["token_ids"]
            assert (output.get("logprobs") is None) == (want.get("logprobs") is None)
        assert sum(replay.count for replay in replays) > 0
    finally:
        llm.exit()


@pytest.mark.parametrize(
    "options, sizes",
    [
        (dict(max_num_seqs=64), list(PREFILL_SIZES)),
        (dict(max_num_batched_tokens=100), [16, 32, 64, 100]),
        (dict(max_num_batched_tokens=64), [16, 32, 64]),
        (dict(max_num_batched_tokens=3), [3]),
        (dict(max_num_seqs=2), [16, 32, 64, 128, 256, 384, 512]),
        (dict(max_num_seqs=1, max_model_len=8), [8]),
    ],
)
def test_no_graph_is_larger_than_the_largest_step(
    checkpoint: Checkpoint, options: dict[str, Any], sizes: list[int]
) -> None:
    """The warm-up runs that step, and shows how much memory the graphs may take."""
    llm = make_llm(checkpoint.path, **options)
    try:
        assert llm.model_runner.padded_prefill.sizes == sizes  # type: ignore[union-attr]
    finally:
        llm.exit()
