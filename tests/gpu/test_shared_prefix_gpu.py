"""Shared prefixes in decode on a GPU: the kernels at the shapes of real models, and an engine that
gives the tokens of `transformers` whether it shares or not.

How tokens are judged is told in test_engine_gpu.py.
"""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, random_prompts
from test_engine_gpu import check_choices, make
from test_shared_prefix import upload

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import prefix_sharing
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.prefix_groups import CostModel, TileLimits, find_groups
from nanovllm.kernels.shared_prefix import prefix_config, shared_prefix_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = "cuda"
VOCAB = 1000
NUM_TOKENS = 24
# Of results of about 0.03 to 1: the two ways round the same sums in other orders.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size, num_seqs, softcap",
    [
        (16, 8, 128, 256, 256, None),  # Qwen3-0.6B
        (32, 8, 128, 16, 70, None),  # Qwen3-8B
        (14, 2, 64, 48, 200, None),  # Qwen2.5-0.5B, blocks of no power of two
        (8, 4, 256, 64, 40, 50.0),  # Gemma 2
        (6, 1, 80, 20, 16, None),  # blocks that tiles cross
        (4, 4, 128, 256, 8, None),
    ],
)
def test_kernels(heads, kv_heads, head_dim, block_size, num_seqs, softcap, dtype) -> None:
    """What `paged_decode` computes, of several groups and of sequences without one."""
    torch.manual_seed(0)
    r = np.random.default_rng(0)
    shared_blocks = -(-600 // block_size)
    columns = shared_blocks + -(-400 // block_size)
    num_groups = max(1, num_seqs // 12)
    num_blocks = (num_seqs + num_groups) * columns
    tables = r.permutation(num_blocks)[: num_seqs * columns].reshape(columns, num_seqs)
    context_lens = r.integers(1, 400, num_seqs)
    for row in range(num_seqs * 3 // 4):
        depth = shared_blocks - row % num_groups % 2
        tables[:depth, row] = tables[:depth, row % num_groups]
        context_lens[row] += depth * block_size
    context_lens[-1] = 0
    num_full = (context_lens - 1) // block_size
    cost = CostModel(step_cost=0, group_cost=0, members_to_outweigh=1)
    groups = find_groups(tables, np.arange(num_seqs), num_full, block_size, cost)
    assert groups is not None and len(groups.num_members) == num_groups

    def randn(*shape):
        return torch.randn(*shape, device=DEVICE).to(dtype)

    q = randn(num_seqs, heads + 2 * kv_heads, head_dim)[:, :heads]
    caches = [randn(num_blocks, block_size, kv_heads, head_dim) for _ in range(2)]
    on_device = torch.from_numpy(np.ascontiguousarray(tables)).int().to(DEVICE).t()
    lens = torch.from_numpy(context_lens).int().to(DEVICE)
    scale = head_dim**-0.5
    expected = paged_decode(q, *caches, lens, on_device, scale, softcap=softcap)
    config = prefix_config(head_dim, dtype, q.device, block_size)
    for num_tiles in (1, 20, 100):
        members = config.block_m // (heads // kv_heads)
        limits = TileLimits(members, config.block_n, 1, 8, num_tiles)
        prefixes = upload(groups, context_lens.tolist(), block_size, limits)
        for _ in range(3):
            out = shared_prefix_decode(q, *caches, prefixes, on_device, scale, softcap=softcap)
            error = (out.float() - expected.float()).abs().max().item()
            assert error < TOLERANCE[dtype], error


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    saved = make_checkpoint(
        tmp_path_factory.mktemp("small"),
        std=256**-0.5,
        vocab_size=VOCAB,
        hidden_size=256,
        head_dim=64,
        num_attention_heads=4,
        intermediate_size=512,
    )
    return Checkpoint(saved.path, saved.model.to(DEVICE))


@pytest.fixture(autouse=True)
def any_group_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = CostModel(0, group_cost=0, members_to_outweigh=1, min_prefix=32)
    monkeypatch.setattr(prefix_sharing, "CostModel", lambda step_cost: cost)


def observe(llm: LLM) -> Counter[int]:
    """Count the steps with groups by their sizes, from now on."""
    sharing = llm.model_runner.prefix_sharing  # type: ignore[union-attr]
    assert sharing.is_on
    send = sharing.upload
    counts: Counter[int] = Counter()

    def counting(size: int) -> None:
        counts[size] += 1
        send(size)

    sharing.upload = counting  # type: ignore[method-assign]
    return counts


def make_prompts(count: int) -> list[list[int]]:
    """Two groups, some members of which share more, and prompts of no group."""
    first, second = random_prompts(0, [520, 300], VOCAB)
    tails = random_prompts(1, [1 + (i * 13) % 90 for i in range(count)], VOCAB)
    heads = [first, second, first, first[:256], [], second]
    return [heads[i % len(heads)] + tail for i, tail in enumerate(tails)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(enforce_eager=True),
        dict(kvcache_block_size=16, num_kvcache_blocks=130),
        dict(kvcache_block_size=48, num_kvcache_blocks=70),
        dict(max_num_seqs=12),
    ],
    ids=["graphs", "eager", "preemptions", "block-48", "joining"],
)
def test_tokens_of_transformers(small: Checkpoint, options: dict[str, Any], dtype: str) -> None:
    prompts = make_prompts(40)
    expected = small.complete(prompts, NUM_TOKENS, min_margin=2e-5)
    lengths = [NUM_TOKENS - i % 5 * 4 for i in range(len(prompts))]  # so that members leave
    params = [greedy(length) for length in lengths]
    llm = make(small, dtype=dtype, attention_backend="triton", **options)
    try:
        counts = observe(llm)
        for _ in range(2):  # the second time with prefix hits
            completions = generate_ids(llm, prompts, params)
            if dtype == "float32":
                assert completions == [e[:n] for e, n in zip(expected, lengths, strict=True)]
            else:
                check_choices(small, prompts, completions)
        assert sum(counts.values()) > 20 and len(counts) > 1
        graphs = llm.model_runner.shared_decode_graphs  # type: ignore[union-attr]
        if not options.get("enforce_eager"):
            assert {*counts} <= {*graphs.sizes}
        assert (llm.scheduler.counters["preemptions"] > 0) == ("num_kvcache_blocks" in options)
    finally:
        llm.exit()


def test_draws_are_those_without_sharing(small: Checkpoint) -> None:
    """With seeds, and with options that sample once more from the logits of a graph."""
    prompts = make_prompts(33)
    params = [
        SamplingParams(
            temperature=0.8, seed=i, top_k=-1 if i % 2 else 7, max_tokens=16, ignore_eos=True
        )
        for i in range(len(prompts))
    ]
    llm = make(small, dtype="float32", attention_backend="triton")
    try:
        sharing = llm.model_runner.prefix_sharing  # type: ignore[union-attr]
        counts = observe(llm)
        shared = generate_ids(llm, prompts, params)
        num_shared = sum(counts.values())
        assert num_shared > 10
        sharing.is_on = False
        sharing.forget()
        plain = generate_ids(llm, prompts, params)
        assert sum(counts.values()) == num_shared
    finally:
        llm.exit()
    same = sum(left == right for left, right in zip(shared, plain, strict=True))
    # Other sums at other sizes: in float32 their rounding turns hardly any draw.
    assert same >= len(prompts) - 1


@pytest.mark.parametrize(
    "options",
    [
        dict(max_num_seqs=1),
        dict(attention_backend="torch", enforce_eager=True),
    ],
    ids=["one-sequence", "torch"],
)
def test_no_graphs_where_nothing_can_be_shared(small: Checkpoint, options: dict[str, Any]) -> None:
    llm = make(small, dtype="bfloat16", **options)
    try:
        assert not llm.model_runner.prefix_sharing.is_on  # type: ignore[union-attr]
        assert not llm.model_runner.shared_decode_graphs.sizes  # type: ignore[union-attr]
    finally:
        llm.exit()
