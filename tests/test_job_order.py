"""In which order `generate` queues a job's prompts, and what that saves."""

import random
import time
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Checkpoint, make_llm, make_scheduler, make_sequence, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.sharing.job_order import job_order, walk_prefixes
from scripts.bench_job_order import Job, run

BLOCK_SIZE = 4


def tree_order(prompts: list[list[int]], members: list[int], start: int) -> list[int]:
    """The definition: members that agree in the next block come together, the earliest first."""
    if all(len(prompts[index]) <= start for index in members):
        return members
    order: list[int] = []
    for index in members:
        if index not in order:
            block = prompts[index][start : start + BLOCK_SIZE]
            same = [i for i in members if prompts[i][start : start + BLOCK_SIZE] == block]
            order += tree_order(prompts, same, start + BLOCK_SIZE)
    return order


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=12))
def test_the_order_is_that_of_the_tree_of_blocks(prompts: list[list[int]]) -> None:
    assert walk_prefixes(prompts, BLOCK_SIZE).order == tree_order(
        prompts, list(range(len(prompts))), 0
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), max_size=12))
def test_shared_blocks_are_counted(prompts: list[list[int]]) -> None:
    prefixes = [
        tuple(prompt[:end])
        for prompt in prompts
        for end in range(BLOCK_SIZE, len(prompt) + 1, BLOCK_SIZE)
    ]
    num_shared = walk_prefixes(prompts, BLOCK_SIZE).num_shared_blocks
    assert num_shared == len(prefixes) - len(set(prefixes))


def test_the_example_of_the_docstring() -> None:
    blocks = {name: [ord(name)] * BLOCK_SIZE for name in "PQRabc"}
    prompts = [blocks[a] + blocks[b] for a, b in ("Pa", "Qa", "Pb", "Ra", "Qb", "Pc")]
    assert walk_prefixes(prompts, BLOCK_SIZE).order == [0, 2, 5, 1, 4, 3]


def test_prompts_without_a_common_block_keep_their_order() -> None:
    r = random.Random(0)
    # Many begin alike, but by less than a block, and some agree in a later block.
    prompts = [[1, 2, 3, i, *r.choices(range(3), k=i % 9)] for i in range(200)]
    assert walk_prefixes(prompts, BLOCK_SIZE).order == list(range(200))


def make_requests(prompts: list[list[int]], n: int = 1) -> list[list[Sequence]]:
    return [[make_sequence(prompt) for _ in range(n)] for prompt in prompts]


@pytest.mark.parametrize(
    "options, is_ordered",
    [
        (dict(), False),
        (dict(max_num_seqs=7), True),
        # Of 8 sequences with 16 tokens each, two and two have a prompt of 2 blocks in common, and
        # so have the other four. That makes 2 x 2 blocks of prompts, and 8 x 2 others.
        (dict(num_kvcache_blocks=20), False),
        (dict(num_kvcache_blocks=19), True),
        (dict(max_num_seqs=7, enable_prefix_caching=False), False),
    ],
)
def test_a_job_that_fits_at_once_keeps_its_order(options: dict[str, Any], is_ordered: bool) -> None:
    config: Any = SimpleNamespace(
        **{
            **dict(
                max_num_seqs=8,
                num_kvcache_blocks=32,
                kvcache_block_size=BLOCK_SIZE,
                enable_prefix_caching=True,
            ),
            **options,
        }
    )
    prompts = [[1] * 8, [2] * 8] * 2
    requests = make_requests(prompts, n=2)
    order = [requests[i] for i in (0, 2, 1, 3)] if is_ordered else requests
    assert list(job_order(requests, config)) == order


def test_each_prefix_is_computed_once() -> None:
    job = Job(max_tokens=12)
    assert (job.num_prefixes, job.num_members, job.cached_prefixes) == (40, 25, 3)
    config = job.config()
    outcome = run(job_order(job.requests(), config), config)
    assert outcome.computed_tokens == job.fewest_tokens


def test_in_arrival_order_they_would_be_computed_again_and_again() -> None:
    job = Job(num_members=4, max_tokens=8)
    assert run(job.requests(), job.config()).computed_tokens > 3 * job.fewest_tokens


def test_a_prefix_that_another_computes_in_chunks_is_waited_for() -> None:
    scheduler = make_scheduler(100, 4, max_num_batched_tokens=10)
    prefix = list(range(32))
    for tail in range(3):
        scheduler.add(make_sequence([*prefix, 100 + tail], max_tokens=2))
    computed = 0
    while not scheduler.is_finished():
        step = scheduler.schedule()
        assert step is not None
        computed += step.num_tokens * step.is_prefill
        scheduler.postprocess(step, [0] * len(step.seqs))
    assert computed == len(prefix) + 3


def test_results_and_seeds_follow_the_prompts(checkpoint: Checkpoint) -> None:
    """Requests that bring no seed get theirs in the order of the prompts, however they are run."""
    prefixes = random_prompts(1, [32, 32, 32])
    prompts = [prefixes[i % 3] + tail for i, tail in enumerate(random_prompts(2, [5] * 12))]
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    wide = make_llm(checkpoint.path)
    expected = wide.generate(prompts, params, use_tqdm=False)
    wide.exit()
    llm = make_llm(checkpoint.path, max_num_seqs=2)
    with llm.trace() as trace:
        found = llm.generate(prompts, params, use_tqdm=False)
    assert [out["prompt_token_ids"] for out in found] == prompts
    assert [out["token_ids"] for out in found] == [out["token_ids"] for out in expected]
    admitted = [i for step in trace.steps for i in step.prefix_hits]
    by_number = sorted(admitted)
    assert [by_number.index(i) % 3 for i in admitted] == [0] * 4 + [1] * 4 + [2] * 4
    llm.exit()


def test_the_time_is_linear() -> None:
    def seconds(number: int) -> float:
        r = random.Random(0)
        prompts = [r.choices(range(1000), k=20) for _ in range(number)]
        prompts += [[1, 2, 3, 4, *r.choices(range(1000), k=20)] for _ in range(number)]
        start = time.process_time()
        walk_prefixes(prompts, BLOCK_SIZE)
        return time.process_time() - start

    # Sixteen times as many. Quadratic would take 256 times as long.
    assert min(seconds(16_000) for _ in range(2)) < 64 * max(seconds(1_000), 0.001)
