"""The same tokens as `transformers`, however the work is cut: float32 on the CPU, greedy, token for
token.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    QWEN2,
    QWEN3,
    Checkpoint,
    assert_idle,
    check_step_loop,
    edit_json,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from transformers import AutoModelForCausalLM

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.quantization import unquantized

NUM_TOKENS = 32
LENGTHS = [1, 2, 15, 16, 17, 7, 3, 6, 5, 4, 12, 31, 120, 33, 48, 63, 64, 65, 90]

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": dict(architecture=QWEN3),
    "qwen3-tied": dict(architecture=QWEN3, tie_word_embeddings=True, num_hidden_layers=3),
    "qwen3-mha": dict(
        architecture=QWEN3, hidden_size=64, head_dim=32, num_attention_heads=2, rms_norm_eps=1e-3
    ),
    "qwen3-gqa4-bias": dict(
        architecture=QWEN3, num_attention_heads=8, attention_bias=True, rope_theta=1e6
    ),
    "qwen3-mqa": dict(architecture=QWEN3, num_attention_heads=6, num_key_value_heads=1, head_dim=8),
    "qwen2": dict(architecture=QWEN2, hidden_size=64, rope_theta=1e6),
    "qwen2-gqa4-tied": dict(
        architecture=QWEN2, hidden_size=64, num_attention_heads=8, tie_word_embeddings=True
    ),
    "qwen2-mha": dict(
        architecture=QWEN2, num_attention_heads=3, num_key_value_heads=3, rms_norm_eps=1e-3
    ),
    "qwen2-mqa-wide": dict(architecture=QWEN2, num_key_value_heads=1, head_dim=32, vocab_size=160),
}
TINY = dict(
    max_model_len=153
)  # just enough for the longest prompt, so the smallest cache there can be
CUTS: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    "block-256": dict(kvcache_block_size=256, max_num_batched_tokens=100, max_num_seqs=5),
    "tiny-cache": dict(**TINY, kvcache_block_size=4, num_kvcache_blocks=39),
    "tiny-cache-block-5": dict(
        **TINY, kvcache_block_size=5, num_kvcache_blocks=31, max_num_batched_tokens=33
    ),
    "tiny-cache-no-sharing": dict(
        **TINY,
        kvcache_block_size=4,
        num_kvcache_blocks=39,
        max_num_batched_tokens=37,
        enable_prefix_caching=False,
    ),
}


@pytest.fixture(scope="module", params=SHAPES)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts of many lengths, some that begin alike, and their completions."""
    name = request.param
    checkpoint = make_checkpoint(
        tmp_path_factory.mktemp(name), seed=1 + list(SHAPES).index(name), **SHAPES[name]
    )
    prompts = random_prompts(0, LENGTHS)
    prompts += [prompts[12][:40] + tail for tail in random_prompts(1, [3, 20])] + [prompts[16]]
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cut", CUTS)
def test_same_tokens_however_the_work_is_cut(
    reference: tuple[Checkpoint, list[list[int]], list[list[int]]], cut: str, depth: int
) -> None:
    checkpoint, prompts, expected = reference
    llm = make_llm(checkpoint.path, depth, **CUTS[cut])
    assert generate_ids(llm, prompts, greedy(NUM_TOKENS)) == expected
    if "tiny" in cut:
        assert llm.scheduler.counters["preemptions"] > 15, llm.scheduler.counters["preemptions"]
    else:
        assert llm.scheduler.counters["preemptions"] == 0
    # Again: now most of it is in the prefix cache, and the order must not matter.
    params = [greedy(1 + 5 * i % NUM_TOKENS) for i in range(len(prompts))]
    expected = [tokens[: p.max_tokens] for tokens, p in zip(expected, params, strict=True)]
    assert generate_ids(llm, prompts[::-1], params[::-1]) == expected[::-1]
    llm.exit()


# --- shared prefixes ------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[5, 16, 256])
def prefix_reference(
    request: pytest.FixtureRequest, checkpoint: Checkpoint
) -> tuple[int, list[list[int]], list[list[int]], list[int]]:
    """For a block size: prompts that share with the first one prefixes of every length around a
    block boundary, their completions, and how many cached tokens each should find.
    """
    block_size = request.param
    (base,) = random_prompts(2, [2 * block_size + 2])
    shared = [n * block_size + d for n in (1, 2) for d in (-1, 0, 1)]
    tails = random_prompts(3, [2] * len(shared))
    prompts, hits = [base], [0]
    for n, tail in zip(shared, tails, strict=True):
        tail[0] = (
            base[n] + 1
        ) % 127  # it must differ at once, or more than n tokens would be shared
        prompts += [base[:n], base[:n] + tail]  # the first is wholly cached
        hits += [(n - 1) // block_size * block_size, n // block_size * block_size]
    return block_size, prompts, checkpoint.complete(prompts, 8), hits


@pytest.mark.parametrize("depth", [0, 1])
def test_shared_prefixes_in_one_call(
    prefix_reference: tuple[int, list[list[int]], list[list[int]], list[int]],
    checkpoint: Checkpoint,
    record_hits: Any,
    depth: int,
) -> None:
    block_size, prompts, expected, hits = prefix_reference
    llm = make_llm(checkpoint.path, depth, kvcache_block_size=block_size, max_model_len=600)
    assert generate_ids(llm, prompts, greedy(8)) == expected
    assert record_hits() == hits
    llm.exit()


@pytest.mark.parametrize("depth", [0, 1])
def test_shared_prefixes_in_successive_calls(
    prefix_reference: tuple[int, list[list[int]], list[list[int]], list[int]],
    checkpoint: Checkpoint,
    record_hits: Any,
    depth: int,
) -> None:
    block_size, prompts, expected, hits = prefix_reference
    llm = make_llm(
        checkpoint.path,
        depth,
        kvcache_block_size=block_size,
        max_model_len=600,
        max_num_batched_tokens=200,
    )
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate_ids(llm, [prompt], greedy(8)) == [tokens]
    assert record_hits() == hits
    # All at once and with all in the cache: hits reach to the last full block that leaves a token
    # to compute.
    assert generate_ids(llm, prompts, greedy(8)) == expected
    assert record_hits() == [(len(prompt) - 1) // block_size * block_size for prompt in prompts]
    llm.exit()


def test_prefix_caching_off_finds_nothing(checkpoint: Checkpoint, record_hits: Any) -> None:
    prompts = random_prompts(4, [40]) * 3
    llm = make_llm(checkpoint.path, enable_prefix_caching=False)
    assert generate_ids(llm, prompts, greedy(8)) == checkpoint.complete(prompts[:1], 8) * 3
    assert record_hits() == [0, 0, 0]
    llm.exit()


@pytest.mark.parametrize("depth", [0, 1])
def test_completions_are_shared_too(checkpoint: Checkpoint, record_hits: Any, depth: int) -> None:
    """A second turn of a chat: the prompt holds the first turn's completion, computed while
    decoding.
    """
    (prompt,) = random_prompts(5, [20])
    (expected,) = checkpoint.complete([prompt], 50)
    llm = make_llm(checkpoint.path, depth)
    (first,) = generate_ids(llm, [prompt], greedy(30))
    (second,) = generate_ids(llm, [prompt + first], greedy(20))
    assert first + second == expected
    assert record_hits() == [0, 48]  # the 50th token was sampled, never computed
    llm.exit()


# --- how a completion ends ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(checkpoint: Checkpoint) -> tuple[list[list[int]], list[list[int]]]:
    prompts = random_prompts(6, [3, 40, 17, 64, 9, 33])
    return prompts, checkpoint.complete(prompts, 40)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_eos_stops_and_ignore_eos_does_not(
    checkpoint: Checkpoint, many: tuple[list[list[int]], list[list[int]]], depth: int
) -> None:
    prompts, expected = many
    eos = expected[0][7]
    stopped = checkpoint.complete(prompts, 40, eos=eos)
    assert len(stopped[0]) <= 8 and any(len(tokens) == 40 for tokens in stopped)
    llm = make_llm(
        checkpoint.path,
        depth,
        eos=eos,
        kvcache_block_size=4,
        max_model_len=104,
        num_kvcache_blocks=26,
    )
    outputs = llm.generate(prompts, greedy(40, ignore_eos=False), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == stopped
    assert [output["finish_reason"] for output in outputs] == [
        "stop" if tokens[-1] == eos else "length" for tokens in stopped
    ]
    assert llm.scheduler.counters["preemptions"] > 0
    mixed = [greedy(40, ignore_eos=i % 2 == 0) for i in range(len(prompts))]
    assert generate_ids(llm, prompts, mixed) == [
        full if i % 2 == 0 else short
        for i, (full, short) in enumerate(zip(expected, stopped, strict=True))
    ]
    llm.exit()


def test_eos_of_the_model_is_taken_when_there_is_no_tokenizer(
    checkpoint: Checkpoint, many: tuple[list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    prompts, expected = many
    eos = expected[0][7]
    shutil.copytree(checkpoint.path, tmp_path, dirs_exist_ok=True)
    edit_json(tmp_path / "config.json", eos_token_id=eos)
    llm = make_llm(str(tmp_path))
    assert generate_ids(llm, prompts, greedy(40, ignore_eos=False)) == checkpoint.complete(
        prompts, 40, eos=eos
    )
    llm.exit()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("block_size", [5, 16])
def test_a_completion_is_cut_at_max_model_len(
    block_size: int,
    depth: int,
    checkpoint: Checkpoint,
    many: tuple[list[list[int]], list[list[int]]],
) -> None:
    prompts, expected = many
    llm = make_llm(checkpoint.path, depth, max_model_len=65, kvcache_block_size=block_size)
    outputs = llm.generate(prompts, greedy(40), use_tqdm=False)
    lengths = [min(40, 65 - len(prompt)) for prompt in prompts]
    assert 1 in lengths
    assert [output["token_ids"] for output in outputs] == [
        t[:n] for t, n in zip(expected, lengths, strict=True)
    ]
    assert {output["finish_reason"] for output in outputs} == {"length"}
    assert_idle(llm)
    llm.exit()


@pytest.mark.parametrize("depth", [0, 1])
def test_one_token_each(
    checkpoint: Checkpoint, many: tuple[list[list[int]], list[list[int]]], depth: int
) -> None:
    prompts, expected = many
    llm = make_llm(checkpoint.path, depth, max_num_batched_tokens=10)
    assert generate_ids(llm, prompts, greedy(1)) == [tokens[:1] for tokens in expected]
    assert llm.generate([], greedy(1)) == []
    llm.exit()


# --- driving the loop oneself ---------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_step_loop_and_the_sign_of_num_tokens(
    checkpoint: Checkpoint, many: tuple[list[list[int]], list[list[int]]], depth: int
) -> None:
    prompts, expected = many
    llm = make_llm(checkpoint.path, depth)
    check_step_loop(llm, prompts, expected, [1, 5, 10, 15, 20, 25])
    llm.exit()


def test_steps_launched_before_an_eos_was_known(
    checkpoint: Checkpoint, many: tuple[list[list[int]], list[list[int]]]
) -> None:
    """At depth 1 an EOS is found after one more step is launched. It counts as a step, its token
    does not.
    """
    prompts, expected = many
    prompt, tokens = prompts[0], expected[0]
    end = next(n for n in range(5, 40) if tokens[n] not in tokens[:n])
    for depth in (0, 1, 2):
        llm = make_llm(checkpoint.path, depth, eos=tokens[end])
        request = llm.add_request(prompt, greedy(40, ignore_eos=False))
        steps = []
        while not llm.is_finished():
            steps.append(llm.step())
        assert llm.step() == ([], 0)
        assert [num_tokens for _, num_tokens in steps] == [len(prompt)] + [-1] * (end + depth)
        (result,) = [result for outputs, _ in steps for result in outputs]
        assert steps[end][0] == [result]  # reported by the step that found it, not by the last
        expected_result = {
            "text": "",
            "token_ids": tokens[: end + 1],
            "finish_reason": "stop",
            "stop_reason": None,
            "logprobs": None,
            "prompt_token_ids": prompt,
            "num_cached_tokens": 0,
        }
        assert result == (request, expected_result)
        assert_idle(llm)
        llm.exit()


@pytest.mark.parametrize("depth", [0, 1])
def test_requests_may_arrive_while_others_run(
    checkpoint: Checkpoint, many: tuple[list[list[int]], list[list[int]]], depth: int
) -> None:
    prompts, expected = many
    llm = make_llm(
        checkpoint.path,
        depth,
        max_num_batched_tokens=16,
        kvcache_block_size=4,
        num_kvcache_blocks=64,
    )
    waiting = list(prompts)
    ids: list[int] = []
    results: dict[int, dict[str, Any]] = {}
    num_steps = 0
    while waiting or not llm.is_finished():
        if waiting and num_steps % 3 == 0:
            ids.append(llm.add_request(waiting.pop(0), greedy(40)))
        results.update(llm.step()[0])
        num_steps += 1
    assert [results[i]["token_ids"] for i in ids] == expected
    assert_idle(llm)
    llm.exit()


# --- the demo checkpoint --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[LLM, list[dict[str, str]], list[str]]]:
    """An engine, its questions with their answers, and the questions as prompts."""
    llm = make_llm(DEMO_MODEL, max_model_len=2048, num_kvcache_blocks=1000, max_num_seqs=512)
    questions = json.loads((Path(DEMO_MODEL) / "questions.json").read_text(encoding="utf-8"))
    prompts = [
        llm.tokenizer.apply_chat_template(
            [{"role": "user", "content": item["question"]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for item in questions
    ]
    yield llm, questions, prompts
    llm.exit()


def test_demo_answers_its_questions(demo: tuple[LLM, list[dict[str, str]], list[str]]) -> None:
    llm, questions, prompts = demo
    outputs = llm.generate(prompts, greedy(1600, ignore_eos=False), use_tqdm=False)
    assert [output["text"] for output in outputs] == [item["answer"] for item in questions]
    assert {output["finish_reason"] for output in outputs} == {"stop"}
    assert_idle(llm)


def test_demo_equals_transformers(demo: tuple[LLM, list[dict[str, str]], list[str]]) -> None:
    """The two prompts of example.py and a sample of the others, plain text as well as chat."""
    llm, _, prompts = demo
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).float().eval()
    wanted = ("introduce yourself", "list all prime numbers within 100")
    chosen = [prompt for prompt in prompts if any(f"\n{text}<" in prompt for text in wanted)]
    assert len(chosen) == 2
    chosen += prompts[5::20] + ["The number", "1, 2, 3", "Nano-vLLM is"]
    encoded = [llm.tokenizer.encode(text) for text in chosen]
    expected = Checkpoint(DEMO_MODEL, model).complete(encoded, 60, eos=llm.config.eos[0])
    outputs = llm.generate(chosen, greedy(60, ignore_eos=False), use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == expected
    assert generate_ids(llm, encoded, greedy(60, ignore_eos=False)) == expected
    assert [output["text"] for output in outputs] == [
        llm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected
    ]


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("shape", ["qwen3-gqa4-bias", "qwen2"])
def test_gemms_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    """As a decode step computes them on a GPU, here in Triton's interpreter."""
    checkpoint = make_checkpoint(tmp_path, **SHAPES[shape])
    prompts = random_prompts(8, [3, 20, 33, 7])
    expected = checkpoint.complete(prompts, 6)
    nums: list[int] = []

    def num_splits(x: torch.Tensor, weight: torch.Tensor) -> int:
        nums.append(len(nums) % 4 if len(x) > 1 else 0)
        return nums[-1]

    monkeypatch.setattr(unquantized, "num_splits", num_splits)
    llm = make_llm(checkpoint.path)
    assert generate_ids(llm, prompts, greedy(6)) == expected
    assert set(nums) == {0, 1, 2, 3}
    llm.exit()


def test_default_parameters_sample_within_the_limits(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    (output,) = llm.generate(random_prompts(7, [5]), use_tqdm=False)
    assert len(output["token_ids"]) == SamplingParams().max_tokens == 64
    assert all(0 <= token < 127 for token in output["token_ids"])
    llm.exit()
