"""State that an engine shares with its caller. What the user has set for its own work, or does with
what the engine was given or hands out, reaches no request.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_llm, random_prompts

from nanovllm import DEMO_MODEL, LLM, SamplingParams

PROMPTS = random_prompts(3, [5, 9, 20])


@pytest.fixture(scope="module")
def demo() -> LLM:
    return make_llm(DEMO_MODEL)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_of_the_caller_do_not_reach_the_model(checkpoint: Checkpoint, mode: str) -> None:
    """Neither of the one that makes the engine nor of the one that calls it, whatever is lazy."""
    penalties = dict(repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.1)
    filters = dict(top_k=30, top_p=0.9, min_p=0.01, logit_bias={5: 3.0}, min_tokens=3)
    params = [
        SamplingParams(max_tokens=8, seed=1, logprobs=3, **penalties, **filters),
        SamplingParams(max_tokens=8, seed=2, n=2),
        greedy(8),
    ]

    def run(llm: LLM) -> Any:
        llm.reset()  # no prefix hits
        return llm.generate(PROMPTS[:3], params, use_tqdm=False)

    want = run(make_llm(checkpoint.path))
    outside = make_llm(checkpoint.path)
    with MODES[mode]():
        inside = make_llm(checkpoint.path)
        assert run(inside) == want
        assert run(outside) == want
    assert run(inside) == want
    assert run(outside) == want


def change_calls(tokenizer: Any) -> None:
    tokenizer(["a b c" * 50, "d"], padding=True, truncation=True, max_length=20)


def change_sides(tokenizer: Any) -> None:
    tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(3)


def change_vocabulary(tokenizer: Any) -> None:
    tokenizer.add_tokens(["there"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["hello"]})


def change_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "nothing"


@pytest.mark.parametrize("change", [change_calls, change_sides, change_vocabulary, change_template])
def test_what_is_done_to_the_tokenizer_does_not_reach_the_engine(change: Any, demo: LLM) -> None:
    text = "hello there " * 15
    params = SamplingParams(temperature=0, max_tokens=5, stop="never")
    chat = [{"role": "user", "content": text}]

    def run() -> Any:
        outputs = demo.generate(text, params, use_tqdm=False) + demo.chat(chat, params, False)
        return [(output["prompt_token_ids"], output["text"]) for output in outputs]

    want = run()
    assert demo.get_tokenizer() is demo.tokenizer  # one copy: what a user sets stays
    change(demo.get_tokenizer())
    assert run() == want
    del demo.tokenizer  # the next test begins with a new copy


def test_lists_that_were_passed_or_returned_may_be_changed(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    (want,) = generate_ids(llm, PROMPTS[2:3], greedy(20))
    prompt = list(PROMPTS[2])
    stop = [next(i for i in range(127) if i not in want)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=stop)
    llm.add_request(prompt, params)
    prompt[:] = [1] * 30
    stop[0] = want[0]
    parts = []
    for part in llm.stream([PROMPTS[2]], greedy(20)):
        parts += part["token_ids"]
        part["token_ids"].append(7)
    ((_, result),) = llm.step()[0]
    assert parts == want and result["token_ids"] == want[: len(result["token_ids"])]
    assert result["prompt_token_ids"] == PROMPTS[2]
    result["prompt_token_ids"].clear()
    assert generate_ids(llm, PROMPTS[2:3], greedy(20)) == [want]
