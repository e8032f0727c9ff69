"""A real model, SmolLM2-135M-Instruct, against `transformers`: float32 on the CPU.

Random weights choose among tokens by wide margins and write no text. Here are real ones: trained
scales, a vocabulary of 49,152, text in many scripts. tests/real_model.py fetches the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import assert_idle, greedy, make_llm
from real_model import ENABLE, checkpoint_path
from real_prompts import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nanovllm import LLM, SamplingParams

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not checkpoint_path().is_dir(), reason=f"no real model here; {ENABLE}"),
]

NUM_TOKENS = 16
# Logits are about 20, and sums in another order change them by some 1e-5. Where the reference's
# best and second best token are closer than this, either is right.
CLOSE = 1e-3
SMALL = [number for number, prompt in enumerate(PROMPTS) if len(prompt) < 100][::4]


@dataclass(frozen=True)
class Completed:
    """Our greedy completion of a prompt, and what the reference says to each of its tokens."""

    prompt_ids: list[int]
    token_ids: list[int]
    gaps: list[float]  # by how much the logit of our token is below the reference's highest
    margins: list[float]  # between the reference's two highest logits
    finish_reason: str | None

    @property
    def certain_ids(self) -> list[int]:
        """The tokens before the first choice that rounding could turn."""
        close = (number for number, margin in enumerate(self.margins) if margin < CLOSE)
        return self.token_ids[: next(close, None)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(checkpoint_path())


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def logits_after(
    model: PreTrainedModel, prompt_ids: list[int], token_ids: list[int]
) -> torch.Tensor:
    """`[len(token_ids), vocab]`: the reference's logits where each of a completion's tokens is
    chosen, given those before it.
    """
    inputs = torch.tensor([prompt_ids + token_ids[:-1]])
    return model(inputs, logits_to_keep=len(token_ids)).logits[0]


def make_real_llm(**options: Any) -> LLM:
    return make_llm(str(checkpoint_path()), dtype="float32", **options)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Prompts of more than 128 tokens are computed in chunks."""
    llm = make_real_llm(max_model_len=1024, num_kvcache_blocks=640, max_num_batched_tokens=128)
    yield llm
    llm.exit()


@pytest.fixture(scope="module")
def completed(llm: LLM, reference: PreTrainedModel) -> list[Completed]:
    results = []
    for output in llm.generate(PROMPTS, greedy(NUM_TOKENS, ignore_eos=False), use_tqdm=False):
        prompt_ids = output["prompt_token_ids"]
        token_ids = output["token_ids"]
        logits = logits_after(reference, prompt_ids, token_ids)
        best = logits.topk(2).values
        ours = logits.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        results.append(
            Completed(
                prompt_ids=prompt_ids,
                token_ids=token_ids,
                gaps=(best[:, 0] - ours).tolist(),
                margins=(best[:, 0] - best[:, 1]).tolist(),
                finish_reason=output["finish_reason"],
            )
        )
    return results


def check_certain(outputs: list[Any], completed: list[Completed]) -> None:
    """Check that completions are those that the reference has confirmed."""
    for output, expected in zip(outputs, completed, strict=True):
        certain = expected.certain_ids
        assert output["token_ids"][: len(certain)] == certain


def test_greedy_tokens(completed: list[Completed], tokenizer: Any) -> None:
    assert [result.prompt_ids for result in completed] == [tokenizer.encode(p) for p in PROMPTS]
    assert max(len(result.prompt_ids) for result in completed) > 500
    # Each token is the reference's choice after the same tokens, so all of them are.
    assert max(gap for result in completed for gap in result.gaps) < CLOSE
    # And that shows something: few choices are close, and the completions are not all alike.
    num_certain = sum(len(result.certain_ids) for result in completed)
    assert num_certain > 0.98 * sum(len(result.token_ids) for result in completed)
    assert len({tuple(result.token_ids) for result in completed}) > 90
    assert {result.finish_reason for result in completed} == {"stop", "length"}


def test_log_probabilities(
    llm: LLM, reference: PreTrainedModel, completed: list[Completed]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=5)
    chosen = [PROMPTS[number] for number in SMALL]
    outputs = llm.generate(chosen, params, use_tqdm=False)
    check_certain(outputs, [completed[number] for number in SMALL])
    for output in outputs:
        logits = logits_after(reference, output["prompt_token_ids"], output["token_ids"])
        expected = logits.log_softmax(-1)
        for row, token_id, reported in zip(
            expected, output["token_ids"], output["logprobs"], strict=True
        ):
            assert next(iter(reported)) == token_id
            assert len(reported) == 5  # greedy: the chosen token is the likeliest of the five
            ids = torch.tensor(list(reported))
            torch.testing.assert_close(
                torch.tensor(list(reported.values())), row[ids], rtol=1e-4, atol=CLOSE
            )
            assert row[ids].min() > row.topk(5).values.min() - CLOSE


def test_streams(llm: LLM, tokenizer: Any) -> None:
    """At a high temperature there are parts of characters, in the middle and at the end."""
    params = [
        SamplingParams(temperature=(0, 1.5)[seed % 2], seed=seed, max_tokens=NUM_TOKENS)
        for seed in range(len(PROMPTS))
    ]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    streamed_texts = [""] * len(PROMPTS)
    streamed_ids: list[list[int]] = [[] for _ in PROMPTS]
    for part in llm.stream(PROMPTS, params):
        streamed_texts[part["index"]] += part["text"]
        streamed_ids[part["index"]] += part["token_ids"]
    assert streamed_ids == [output["token_ids"] for output in outputs]
    assert streamed_texts == [output["text"] for output in outputs]
    num_cut = 0
    for output in outputs:
        whole = tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert whole.startswith(output["text"])
        rest = whole[len(output["text"]) :]
        assert rest in ("", "\ufffd")  # a character that the end cuts off
        num_cut += bool(rest)
    assert num_cut > 0
    assert_idle(llm)


QUESTION = {"role": "user", "content": "What is the capital of France?"}
CONVERSATIONS: list[list[dict[str, str]]] = [
    [QUESTION],
    [{"role": "system", "content": "You answer in one word. 🙂"}, QUESTION],
    [QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "És?\n"}],
    [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "The word means"}],
]


@pytest.mark.parametrize(
    "options",
    [{}, {"add_generation_prompt": False}, {"continue_final_message": True}],
    ids=["answer", "no-generation-prompt", "continue"],
)
def test_chat(llm: LLM, tokenizer: Any, options: dict[str, bool]) -> None:
    expected = tokenizer.apply_chat_template(
        CONVERSATIONS, return_dict=False, **{"add_generation_prompt": not options, **options}
    )
    outputs = llm.chat(CONVERSATIONS, greedy(24, ignore_eos=False), use_tqdm=False, **options)
    assert [output["prompt_token_ids"] for output in outputs] == expected
    if not options:
        assert outputs[0]["text"] == "The capital of France is Paris."
        assert outputs[0]["finish_reason"] == "stop"


def test_preemption(completed: list[Completed]) -> None:
    llm = make_real_llm(max_model_len=160, kvcache_block_size=4, num_kvcache_blocks=48)
    chosen = [PROMPTS[number] for number in SMALL]
    outputs = llm.generate(chosen, greedy(NUM_TOKENS, ignore_eos=False), use_tqdm=False)
    assert llm.scheduler.counters["preemptions"] > 5
    check_certain(outputs, [completed[number] for number in SMALL])
    assert_idle(llm)
    llm.exit()


def test_three_ranks(completed: list[Completed]) -> None:
    """Two could not split its 9 heads."""
    llm = make_real_llm(max_model_len=160, tensor_parallel_size=3)
    chosen = [PROMPTS[number] for number in SMALL]
    outputs = llm.generate(chosen, greedy(NUM_TOKENS, ignore_eos=False), use_tqdm=False)
    check_certain(outputs, [completed[number] for number in SMALL])
    assert_idle(llm)
    llm.exit()
