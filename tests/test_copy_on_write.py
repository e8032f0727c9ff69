"""Equal prompts in flight, above all the n completions of one, are computed once, up to the end.

The partial block at their end is shared until they write to it: then all but the last get a copy.
What they return must be what they return alone.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Checkpoint,
    assert_idle,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    make_scheduler,
    make_sequence,
    random_prompts,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, need

from nanovllm import LLM, SamplingParams
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.copy_blocks import copy_blocks, copy_blocks_triton, independent
from nanovllm.sharing.copy_on_write import BlockCopy
from nanovllm.sharing.prefill_groups import PrefillGroups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 5
# Around the borders of blocks of 16 tokens, and prompts that are shorter than a block.
LENGTHS = [1, 16, 17, 31, 50, 48]


def completion_seeds(seed: int, n: int) -> list[int]:
    """The seeds of a request's completions: its own, and others that follow from it."""
    others = random.Random(seed)
    return [seed] + [others.getrandbits(63) for _ in range(n - 1)]


def params_of(seed: int, n: int = 1, max_tokens: int = 14, **options: Any) -> SamplingParams:
    return SamplingParams(
        temperature=0.8, seed=seed, n=n, max_tokens=max_tokens, ignore_eos=True, **options
    )


@pytest.fixture(scope="module")
def alone(checkpoint: Checkpoint) -> list[list[list[int]]]:
    """For each prompt, what N requests with the seeds of its completions return one by one."""
    llm = make_llm(checkpoint.path, enable_prefix_caching=False, max_num_seqs=1)
    results = []
    for index, prompt in enumerate(random_prompts(7, LENGTHS)):
        seeds = completion_seeds(index, N)
        results.append([generate_ids(llm, [prompt], params_of(seed))[0] for seed in seeds])
    llm.exit()
    return results


def n_completions(llm: LLM, prompts: list[list[int]], n: int = N) -> list[list[list[int]]]:
    assert_idle(llm)
    params = [params_of(index, n) for index in range(len(prompts))]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [[c["token_ids"] for c in output["completions"]] for output in outputs]


CASES: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "no-prefix-caching": dict(enable_prefix_caching=False),
    "chunks": dict(max_num_batched_tokens=16),
    "few-rows": dict(max_num_seqs=3),
    "odd-blocks": dict(kvcache_block_size=7, max_model_len=252),
    "tight": dict(kvcache_block_size=4, max_model_len=72, num_kvcache_blocks=18),
    "tight-no-prefix-caching": dict(
        kvcache_block_size=4, max_model_len=72, num_kvcache_blocks=20, enable_prefix_caching=False
    ),
}


@pytest.mark.parametrize(
    "case, depth", [(case, 1) for case in CASES] + [("whole", 0), ("tight", 0)]
)
def test_n_completions_are_those_of_n_requests(
    checkpoint: Checkpoint, alone: list[list[list[int]]], case: str, depth: int
) -> None:
    prompts = random_prompts(7, LENGTHS)
    llm = make_llm(checkpoint.path, depth, **CASES[case])
    llm.model_runner.kv_cache.fill_(float("nan"))  # type: ignore[union-attr]
    with llm.trace() as trace:
        assert n_completions(llm, prompts) == alone
    assert (llm.stats()["preemptions"] > 0) == case.startswith("tight")
    if case in ("whole", "no-prefix-caching", "odd-blocks"):
        computed = sum(step.num_tokens for step in trace.steps if step.kind == "prefill")
        assert computed == sum(LENGTHS)
    if case == "no-prefix-caching":
        assert llm.stats()["prefix_hit_tokens"] == (N - 1) * sum(LENGTHS)
    llm.exit()


def test_equal_prompts_need_not_be_neighbours(checkpoint: Checkpoint, record_hits: Any) -> None:
    prompts = random_prompts(8, [50, 20, 32])
    expected = checkpoint.complete(prompts, 12)
    order = [0, 1, 2, 0, 2, 1, 0]
    llm = make_llm(checkpoint.path, 1)
    tokens = generate_ids(llm, [prompts[i] for i in order], greedy(12))
    assert tokens == [expected[i] for i in order]
    assert record_hits() == [0, 0, 0, 50, 32, 20, 50]
    llm.exit()


def test_without_prefix_caching_only_completions_of_one_request_share(
    checkpoint: Checkpoint, record_hits: Any
) -> None:
    (prompt,) = random_prompts(8, [50])
    llm = make_llm(checkpoint.path, enable_prefix_caching=False)
    n_completions(llm, [prompt, prompt], n=2)
    assert record_hits() == [0, 50, 0, 50]
    llm.exit()


def test_a_stream_and_an_abort_among_them(
    checkpoint: Checkpoint, alone: list[list[list[int]]]
) -> None:
    prompts = random_prompts(7, LENGTHS)
    index = LENGTHS.index(50)
    llm = make_llm(checkpoint.path, 1)
    streamed: list[list[int]] = [[] for _ in range(N)]
    for part in llm.stream([prompts[index]], params_of(index, N)):
        streamed[part["completion"]] += part["token_ids"]
    assert streamed == alone[index]
    # Equal prompts; some end before they write to the block that they share, some after it.
    seeds = completion_seeds(index, N)
    ids = [llm.add_request(prompts[index], params_of(seed)) for seed in seeds]
    results = {}
    for number in range(40):
        results.update(llm.step()[0])
        if number == 0:
            llm.abort(ids[0])
        if number == 3:
            llm.abort(ids[4])
    assert_idle(llm)
    assert [results[ids[i]]["token_ids"] for i in (1, 2, 3)] == alone[index][1:4]
    for number in (0, 4):
        assert results[ids[number]]["finish_reason"] == "abort"
        length = len(results[ids[number]]["token_ids"])
        assert results[ids[number]]["token_ids"] == alone[index][number][:length]
    llm.exit()


@pytest.mark.parametrize("family", ["gemma3", "mistral-window"])
def test_windows(tmp_path: Path, family: str) -> None:
    need(FAMILIES[family])
    saved = make_checkpoint(tmp_path, **{"seed": 1, **FAMILIES[family]})
    prompts = random_prompts(0, [3, 40, 16, 21])
    expected = saved.complete(prompts, 8)
    llm = make_llm(saved.path, 1)
    assert generate_ids(llm, prompts * 3, greedy(8)) == expected * 3
    assert llm.stats()["prefix_hit_tokens"] == 2 * sum(map(len, prompts))
    llm.exit()


# --- the copies on the device ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy",
    [
        copy_blocks,  # on a CPU this is the reference
        pytest.param(
            copy_blocks_triton, marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
        ),
    ],
)
@pytest.mark.parametrize(
    "copies, num_parts",
    [
        ([(0, 3, 5), (0, 4, 5), (1, 5, 1), (2, 6, 15)], 1),
        ([(0, 3, 5), (3, 4, 5)], 2),  # what the first one writes, the second one reads
        ([(0, 3, 5), (1, 3, 2)], 2),
        ([(0, 3, 5), (1, 0, 4), (0, 2, 16)], 3),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_are_copied_one_after_the_other(
    copy: Any, copies: list[tuple[int, int, int]], num_parts: int, dtype: torch.dtype
) -> None:
    named = [BlockCopy(*numbers) for numbers in copies]
    cache = torch.randn(2, 3, 7, 16, 2, 40).to(DEVICE, dtype)
    expected = cache.clone()
    for source, target, num_tokens in copies:
        for token in range(num_tokens):
            expected[:, :, target, token] = expected[:, :, source, token].clone()
    copy(cache, named, lambda array: torch.from_numpy(array).to(DEVICE))
    assert torch.equal(cache, expected)
    assert len(list(independent(named))) == num_parts
    assert [one for part in independent(named) for one in part] == named


# --- who follows whom ----------------------------------------------------------------------------


@pytest.mark.parametrize("only_siblings", [False, True])
@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompts=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, 1), min_size=1, max_size=7)),
        max_size=12,
    )
)
def test_groups_are_those_of_equal_tokens(
    only_siblings: bool, prompts: list[tuple[int, list[int]]]
) -> None:
    """With two token ids, most prompts of one length agree in the tokens that are looked at."""
    groups = PrefillGroups(only_siblings)
    expected: dict[tuple[int, tuple[int, ...]], list[Any]] = {}
    for request_id, tokens in prompts:
        seq = make_sequence(tokens)
        seq.request_id = request_id
        groups.find(seq).append(seq)
        owner = request_id if only_siblings else 0
        expected.setdefault((owner, tuple(tokens)), []).append(seq)
    assert groups.members() == [seq for group in expected.values() for seq in group]


# --- how many blocks and steps it takes -----------------------------------------------------------


def take(scheduler: Scheduler, token_ids: list[int]) -> Step:
    """Schedule a step, and complete it with these tokens."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.postprocess(step, token_ids)
    return step


def used(scheduler: Scheduler) -> int:
    return scheduler.block_manager.usage()["blocks_in_use"]


def test_the_last_holder_writes_in_place() -> None:
    scheduler = make_scheduler(20, 4)
    seqs = [make_sequence([1, 2, 3, 4, 5, 6], max_tokens=9) for _ in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    step = take(scheduler, [7, 8, 9])
    assert step.seqs == seqs and step.num_tokens == 6
    assert [seq.block_table for seq in seqs] == [[0, 1]] * 3 and used(scheduler) == 2
    step = take(scheduler, [7, 8, 9])
    assert step.copies == [BlockCopy(1, 2, 2), BlockCopy(1, 3, 2)]
    assert [seq.block_table for seq in seqs] == [[0, 2], [0, 3], [0, 1]]
    step = take(scheduler, [7, 8, 9])
    assert not step.copies and not scheduler.block_manager.tails.block_ids


def test_a_prompt_of_whole_blocks_is_not_copied() -> None:
    scheduler = make_scheduler(20, 4)
    for _ in range(3):
        scheduler.add(make_sequence([1, 2, 3, 4, 5, 6, 7, 8], max_tokens=9))
    assert take(scheduler, [7, 8, 9]).num_tokens == 8 and used(scheduler) == 2
    assert not take(scheduler, [7, 8, 9]).copies and used(scheduler) == 5


def test_a_prompt_that_spends_the_budget_is_computed_once() -> None:
    scheduler = make_scheduler(20, 4, max_num_batched_tokens=3)
    seqs = [make_sequence([1, 2, 3, 4, 5, 6], max_tokens=9) for _ in range(3)]
    for seq in seqs:
        scheduler.add(seq)
    scheduler.add(make_sequence([1, 2, 3], max_tokens=9))
    assert take(scheduler, [0]).seqs == seqs[:1]
    assert take(scheduler, [7, 8, 9]).seqs == seqs
    assert len(take(scheduler, [7]).seqs) == 1


def test_no_more_follow_than_blocks_are_left_for() -> None:
    """Else they would be preempted in the next step, with a token each to no purpose."""
    scheduler = make_scheduler(4, 4)
    seqs = [make_sequence([1, 2, 3, 4, 5, 6], max_tokens=2) for _ in range(5)]
    for seq in seqs:
        scheduler.add(seq)
    assert take(scheduler, [7] * 3).seqs == seqs[:3]  # the third writes in place
    assert len(take(scheduler, [7] * 3).copies) == 2
    assert scheduler.counters["preemptions"] == 0 and used(scheduler) == 0
