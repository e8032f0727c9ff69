"""Masks of tokens on a GPU: the kernel, and steps that are launched before their masks exist."""

import json
from typing import Any

import pytest
import torch
from conftest import assert_idle

from nanovllm import DEMO_MODEL, LLM, SamplingParams, StructuredOutputsParams
from nanovllm.kernels.token_mask import TokenMasks, mask_tokens, mask_tokens_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size, num_words", [(151_936, 4_748), (5_001, 160)])
def test_the_kernel_equals_its_reference(
    vocab_size: int, num_words: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, vocab_size + 5, device="cuda").to(dtype)[:, :vocab_size]
    rows = torch.randperm(64, device="cuda")[:40]
    words = torch.randint(-(2**31), 2**31, (40, num_words), device="cuda").int()
    expected = logits.clone()
    mask_tokens_torch(expected, TokenMasks(rows, words))
    mask_tokens(logits, TokenMasks(rows, words))
    assert torch.equal(logits, expected)
    assert 0.4 < logits[rows].isinf().float().mean().item() < 0.6


@pytest.fixture(scope="module")
def llm() -> Any:
    pytest.importorskip("llguidance")
    # Blocks of its own number: how much memory is free depends on what else tests here meanwhile.
    llm = LLM(DEMO_MODEL, max_model_len=512, max_num_seqs=32, num_kvcache_blocks=128)
    yield llm
    llm.exit()


def test_rules_that_leave_no_token_end_their_sequence_alone(llm: LLM) -> None:
    """Also where filters look for a threshold among logits that are all minus infinity."""
    form = StructuredOutputsParams(regex="[0-9]{8}")
    params = [
        SamplingParams(structured_outputs=form, allowed_token_ids=[100], top_k=5, top_p=0.9),
        SamplingParams(structured_outputs=form, top_k=1000, top_p=0.9, min_p=0.01),
    ]
    failed, right = llm.generate(["One number:"] * 2, params, use_tqdm=False)
    assert failed["finish_reason"] == "error" and "contradict" in failed["stop_reason"]
    assert right["finish_reason"] == "stop"
    assert len(right["text"]) == 8 and right["text"].isdigit()


def test_steps_wait_for_their_masks_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are right, and requests beside them get the tokens that they get among plain ones."""
    launched: list[str] = []
    launch = llm.model_runner.launch

    def recording(step: Any) -> Any:
        launched.append(type(step).__name__)
        return launch(step)

    monkeypatch.setattr(llm.model_runner, "launch", recording)
    form = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    # All go on to the same length, so that the batches are the same with and without schemas.
    options: dict[str, Any] = dict(max_tokens=100, ignore_eos=True)
    plain = [SamplingParams(seed=i, **options) for i in range(16)]
    mixed = [
        SamplingParams(seed=i, structured_outputs=form, top_p=0.95, logprobs=1, **options)
        if i % 2
        else plain[i]
        for i in range(16)
    ]
    prompts = ["Tell me about the village."] * 16
    expected = llm.generate(prompts, plain, use_tqdm=False)
    assert "StepMasks" not in launched
    launched.clear()
    outputs = llm.generate(prompts, mixed, use_tqdm=False)
    assert_idle(llm)
    # The forward pass of the next step is launched, then the sampling, step after step.
    assert launched.count("StepMasks") == 100
    assert launched[:6] == ["Step", "StepMasks", "Step", "StepMasks", "Step", "StepMasks"]
    for i in range(16):
        if i % 2 == 0:
            assert outputs[i]["token_ids"] == expected[i]["token_ids"]
    texts = [outputs[i]["text"] for i in range(1, 16, 2)]
    assert len(set(texts)) > 4
    for text in texts:
        value, _ = json.JSONDecoder().raw_decode(text)  # behind it are end-of-sequence tokens
        assert set(value) == {"name", "age", "tags"} and 0 <= value["age"] <= 150
