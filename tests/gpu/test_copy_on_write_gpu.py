"""Equal prompts computed once, and their last blocks copied on the device, between CUDA graphs."""

import random
from typing import Any

import pytest
import torch
from conftest import (
    QWEN3,
    Checkpoint,
    assert_idle,
    generate_ids,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import LLM, BeamSearchParams, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCAB = 1000
N = 5
PROMPTS = random_prompts(3, [1, 40, 256, 300, 64, 33], VOCAB)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(
        tmp_path_factory.mktemp("copies"),
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
        kvcache_block_size=64,
        num_kvcache_blocks=200,
    )
    return make_llm(checkpoint.path, **{**defaults, **options})


def params_of(seed: int, n: int = 1) -> SamplingParams:
    return SamplingParams(temperature=0.8, seed=seed, n=n, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def alone(small: Checkpoint) -> list[list[list[int]]]:
    """For each prompt, what requests with the seeds of its completions return one by one."""
    llm = make(small, enable_prefix_caching=False, enforce_eager=True)
    results = []
    for index, prompt in enumerate(PROMPTS):
        others = random.Random(index)
        seeds = [index] + [others.getrandbits(63) for _ in range(N - 1)]
        results.append([generate_ids(llm, [prompt], params_of(seed))[0] for seed in seeds])
    llm.exit()
    return results


CASES: dict[str, dict[str, Any]] = {
    "graphs": dict(),
    "eager": dict(enforce_eager=True),
    "chunks": dict(max_num_batched_tokens=200),
    "tight": dict(kvcache_block_size=16, num_kvcache_blocks=32),
}


@pytest.mark.parametrize("case", CASES)
def test_n_completions_are_those_of_n_requests(
    small: Checkpoint, alone: list[list[list[int]]], case: str
) -> None:
    llm = make(small, **CASES[case])
    params = [params_of(index, N) for index in range(len(PROMPTS))]
    for _ in range(2):  # the second time with prefix hits
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert_idle(llm)
        found = [[c["token_ids"] for c in output["completions"]] for output in outputs]
        assert found == alone
    assert (llm.stats()["preemptions"] > 0) == (case == "tight")
    llm.exit()


def test_more_completions_than_a_graph_takes(
    small: Checkpoint, alone: list[list[list[int]]]
) -> None:
    """A graph of 16 tokens has room for 16 sequences, and one token has 20 completions here."""
    llm = make(small, max_num_seqs=64)
    (output,) = llm.generate([PROMPTS[0]], params_of(0, 20), use_tqdm=False)
    assert [c["token_ids"] for c in output["completions"]][:N] == alone[0]
    llm.exit()


@pytest.mark.parametrize("case", ["graphs", "eager", "tight"])
def test_beams_are_those_of_a_cpu(small: Checkpoint, case: str) -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=10)
    cpu = make_llm(small.path, max_model_len=512)
    expected = cpu.beam_search(PROMPTS, params)
    cpu.exit()
    llm = make(small, **CASES[case])
    outputs = llm.beam_search(PROMPTS, params)
    assert_idle(llm)
    for output, other in zip(outputs, expected, strict=True):
        assert [beam.tokens for beam in output.sequences] == [b.tokens for b in other.sequences]
        scores = [beam.score for beam in output.sequences]
        assert scores == pytest.approx([beam.score for beam in other.sequences], abs=1e-3)
    llm.exit()
