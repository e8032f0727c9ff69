"""Decode steps with shared prefixes in the engine, on the CPU: as CUDA graphs run them, padded and
from fixed buffers.

The graph itself is replaced by what it records. So the tokens must be those of `transformers`, as
in test_equality.py.
"""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, make_llm, random_prompts
from test_families import FAMILIES, need

from nanovllm import LLM, SamplingParams
from nanovllm.engine.graphs import StepGraph, StepOutput
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_backend import TORCH, TRITON, AttentionBackend
from nanovllm.kernels.prefix_groups import CostModel, Groups
from nanovllm.kernels.prefix_sharing import PrefixSharing
from nanovllm.kernels.shared_prefix import shared_prefix_decode_torch

TORCH_SHARED = AttentionBackend(
    "torch",
    TORCH.norm_rope_store,
    TORCH.prefill,
    TORCH.decode,
    shared_decode=shared_prefix_decode_torch,
)
ANY_GROUP_PAYS = CostModel(0, group_cost=0, members_to_outweigh=1, min_prefix=1)
NUM_TOKENS = 24


class Replay:
    """A decode step of one size, with shared prefixes, that leaves its results in fixed places."""

    def __init__(self, llm: LLM, size: int) -> None:
        self.runner = llm.model_runner
        self.size = size
        self.token_ids = torch.zeros(size, dtype=torch.int64)
        self.logits = torch.zeros(size, 127)
        self.count = 0

    def replay(self) -> None:
        assert self.runner is not None
        self.count += 1
        with torch.inference_mode():
            output = self.runner._decode(self.size, shares=True)
            self.token_ids.copy_(output.token_ids)
            self.logits.copy_(output.logits)


@dataclass(frozen=True)
class Observed:
    """What an engine does with shared prefixes."""

    replays: list[Replay]
    groups: list[Groups]  # of each step that has any

    @property
    def num_replays(self) -> int:
        return sum(replay.count for replay in self.replays)


def share_prefixes(llm: LLM, backend: AttentionBackend, sizes: tuple[int, ...]) -> Observed:
    """Have the engine share whatever four sequences have in common, in graphs of these sizes."""
    runner = llm.model_runner
    assert runner is not None
    runner.backend = backend
    for layer in runner.attention_layers:
        layer.backend = backend
    with patch("nanovllm.kernels.prefix_sharing.CostModel", lambda step_cost: ANY_GROUP_PAYS):
        sharing = PrefixSharing(runner.config, runner.attention_layers, runner.device)
    assert sharing.is_on
    runner.prefix_sharing = sharing
    upload = sharing.upload
    groups: list[Groups] = []

    def recording_upload(size: int) -> None:
        assert sharing.groups is not None
        groups.append(sharing.groups)
        upload(size)

    sharing.upload = recording_upload  # type: ignore[method-assign]
    replays = [Replay(llm, size) for size in sizes]
    for replay in replays:
        graph: Any = replay
        output = StepOutput(replay.token_ids, replay.logits, torch.zeros(replay.size, 48))
        runner.shared_decode_graphs.graphs[replay.size] = StepGraph(graph, output)
    runner.shared_decode_graphs.sizes = list(sizes)
    return Observed(replays, groups)


def make_prompts() -> list[list[int]]:
    """Two groups, of which one has members that share more; and prompts of no group."""
    first, second = random_prompts(0, [70, 37])
    tails = random_prompts(1, [1, 5, 17, 3, 30, 2, 9, 40, 12])
    prompts = [first + tail for tail in tails[:5]] + [second + tail for tail in tails[5:]]
    prompts += [first[:50] + tail for tail in tails[2:4]]
    return prompts + random_prompts(2, [9, 100])


CASES: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=40),
    "preemptions": dict(max_model_len=153, num_kvcache_blocks=22),
    "joining": dict(max_num_seqs=6),  # more requests than run at once
    "block-5": dict(kvcache_block_size=5, max_model_len=253),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_of_transformers(checkpoint: Checkpoint, case: str) -> None:
    prompts = make_prompts()
    expected = checkpoint.complete(prompts, NUM_TOKENS)
    lengths = [NUM_TOKENS - i % 5 * 4 for i in range(len(prompts))]  # so that members leave
    params = [greedy(length) for length in lengths]
    llm = make_llm(checkpoint.path, 1, **CASES[case])
    # Steps of more than 11 sequences have no graph, and most of fewer are padded.
    sizes = (4, 6) if case == "joining" else (4, 10, 11)
    observed = share_prefixes(llm, TORCH_SHARED, sizes)
    sharing = llm.model_runner.prefix_sharing  # type: ignore[union-attr]
    memory = sharing.numbers
    try:
        for _ in range(2):  # the second time with prefix hits
            memory.fill_(10**6)  # of which no step may read what it has not written
            tokens = generate_ids(llm, prompts, params)
            assert tokens == [e[:n] for e, n in zip(expected, lengths, strict=True)]
        assert observed.num_replays > 10
        assert len({tuple(groups.members) for groups in observed.groups}) >= 3
        counters = llm.scheduler.counters
        assert counters["prefix_hit_tokens"] > 0
        assert (counters["preemptions"] > 0) == (case == "preemptions")
    finally:
        llm.exit()


def test_rows_are_handed_on(checkpoint: Checkpoint) -> None:
    """Four sequences end, and four that share another prefix have the same rows at once."""
    first, second = random_prompts(3, [33, 33])
    prompts = [first + [i] for i in range(4)] + [second + [i] for i in range(4)]
    expected = checkpoint.complete(prompts, 8)
    llm = make_llm(checkpoint.path, 1, max_num_seqs=4)
    observed = share_prefixes(llm, TORCH_SHARED, (4,))
    try:
        assert generate_ids(llm, prompts, greedy(8)) == expected
        assert observed.num_replays == len(observed.groups) == 14
        assert len({id(groups) for groups in observed.groups}) == 2
    finally:
        llm.exit()


def test_without_a_group_nothing_changes(checkpoint: Checkpoint) -> None:
    """Three members are none, nor do equal prompts share anything without a prefix cache."""
    prefix = random_prompts(4, [40])[0]
    for count, options in ((3, {}), (6, dict(enable_prefix_caching=False))):
        prompts = [prefix + [i] for i in range(count)] + random_prompts(5, [20, 50])
        expected = checkpoint.complete(prompts, 6)
        llm = make_llm(checkpoint.path, 1, **options)
        observed = share_prefixes(llm, TORCH_SHARED, (8,))
        try:
            assert generate_ids(llm, prompts, greedy(6)) == expected
            assert not observed.groups
        finally:
            llm.exit()


@pytest.mark.parametrize("family", ["gemma2", "mistral-window"])
def test_windows_and_caps(tmp_path: Any, family: str) -> None:
    """Layers with a window do without; a model that has no others shares nothing."""
    need(FAMILIES[family])
    saved = make_checkpoint(tmp_path, **{"seed": 1, **FAMILIES[family]})
    prefix = random_prompts(0, [60])[0]
    prompts = [prefix + tail for tail in random_prompts(1, [1, 3, 20, 9])]
    expected = saved.complete(prompts, 12)
    llm = make_llm(saved.path, 1)
    try:
        if family == "mistral-window":
            with pytest.raises(AssertionError):
                share_prefixes(llm, TORCH_SHARED, (4,))
            assert generate_ids(llm, prompts, greedy(12)) == expected
            return
        observed = share_prefixes(llm, TORCH_SHARED, (4,))
        assert generate_ids(llm, prompts, greedy(12)) == expected
        assert observed.num_replays
    finally:
        llm.exit()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_tokens_of_transformers_by_our_kernels(checkpoint: Checkpoint) -> None:
    prefix = random_prompts(6, [34])[0]
    prompts = [prefix + tail for tail in random_prompts(7, [1, 3, 5, 18])]
    expected = checkpoint.complete(prompts, 3)
    llm = make_llm(checkpoint.path, 1)
    observed = share_prefixes(llm, TRITON, (5,))
    try:
        assert generate_ids(llm, prompts, greedy(3)) == expected
        assert observed.num_replays == 2
    finally:
        llm.exit()


def test_sampling_options(checkpoint: Checkpoint) -> None:
    """With options, a step samples once more, from the logits that the graph has left."""
    prefix = random_prompts(8, [50])[0]
    prompts = [prefix + [i] for i in range(5)]
    params = [
        SamplingParams(temperature=0.8, seed=i, top_k=5 + i, max_tokens=6, ignore_eos=True)
        for i in range(5)
    ]
    llm = make_llm(checkpoint.path, 1)
    expected = generate_ids(llm, prompts, params)
    observed = share_prefixes(llm, TORCH_SHARED, (8,))
    try:
        assert generate_ids(llm, prompts, params) == expected
        assert observed.num_replays
    finally:
        llm.exit()
