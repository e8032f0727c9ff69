"""Requests on a GPU that ask for more than a temperature: through CUDA graphs, one step late."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    QWEN3,
    Checkpoint,
    assert_idle,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import LLM, SamplingParams
from nanovllm.engine.graphs import unowned_view

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCAB = 1000
PROMPTS = random_prompts(3, [5, 40, 17, 100, 64, 9, 11], VOCAB)
EVERYTHING: dict[str, Any] = dict(
    temperature=0.9,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={3: 2.5, 50: -100.0},
    min_tokens=9,
    stop_token_ids=[3, 9, 20],
    logprobs=2,
    max_tokens=24,
)
PARAMS = [
    SamplingParams(**EVERYTHING, seed=1),
    greedy(24),
    SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=24),
    SamplingParams(**EVERYTHING, seed=2),
    SamplingParams(seed=3, max_tokens=24),
    SamplingParams(seed=4, top_p=0.8, max_tokens=24),
    SamplingParams(
        seed=5, logprobs=1, max_tokens=24
    ),  # alone: nothing stands between the graph and the draw
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(
        tmp_path_factory.mktemp("requests"),
        QWEN3,
        std=256**-0.5,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
    )


def make(checkpoint: Checkpoint, **options: Any) -> LLM:
    defaults = dict(
        device="cuda",
        dtype="float32",
        max_model_len=512,
        kvcache_block_size=256,
        num_kvcache_blocks=40,
    )
    return make_llm(checkpoint.path, **{**defaults, **options})


def test_an_alias_is_the_same_memory_and_does_not_hold_it() -> None:
    tensor = torch.arange(24, dtype=torch.bfloat16, device="cuda").view(4, 6)
    held = torch.cuda.memory_allocated()
    other = unowned_view(tensor)
    assert torch.cuda.memory_allocated() == held and other.data_ptr() == tensor.data_ptr()
    assert other.dtype == tensor.dtype and torch.equal(other, tensor)
    tensor[2, 3] = 99
    assert other[2, 3] == 99
    del tensor
    gc.collect()
    assert torch.cuda.memory_allocated() < held


def test_options_give_the_same_tokens_with_graphs_and_without(small: Checkpoint) -> None:
    llm = make(small, device="cpu")
    expected = generate_ids(llm, PROMPTS, PARAMS)
    llm.exit()
    for options in (
        dict(enforce_eager=True),
        dict(enforce_eager=False),
        dict(enforce_eager=False, kvcache_block_size=16, max_model_len=128, num_kvcache_blocks=10),
    ):
        llm = make(small, **options)
        assert generate_ids(llm, PROMPTS, PARAMS) == expected, options
        assert [
            generate_ids(llm, [p], one)[0] for p, one in zip(PROMPTS, PARAMS, strict=True)
        ] == expected, options
        for number, _ in enumerate(llm.stream(PROMPTS, PARAMS)):
            if number == 30:
                break
        assert_idle(llm)
        assert generate_ids(llm, PROMPTS, PARAMS) == expected, options
        llm.exit()


def test_graphs_do_not_hold_their_logits(tmp_path: Path) -> None:
    """At 66 batch sizes and a vocabulary of 150,000, that would be 5 GB; here, 170 MB."""
    small = make_checkpoint(
        tmp_path,
        QWEN3,
        vocab_size=20_000,
        hidden_size=64,
        num_attention_heads=1,
        head_dim=64,
        num_key_value_heads=1,
    )
    sizes = []
    for eager in (True, False):
        llm = make(small, enforce_eager=eager, max_num_seqs=256)
        gc.collect()
        sizes.append(torch.cuda.memory_allocated())
        llm.exit()
    assert (
        sizes[1] - sizes[0] < 100e6
    )  # cuBLAS has a workspace of 32 MB for the stream of the capture
