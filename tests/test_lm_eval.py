"""lm-evaluation-harness with its own backend and with ours: the same numbers, of a real model."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from real_model import ENABLE, checkpoint_path

pytest.importorskip("lm_eval", reason="not installed; pip install -e '.[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval_tasks import TASKS

from examples.lm_eval_adapter import NanoVLLM

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not checkpoint_path().is_dir(), reason=f"no real model here; {ENABLE}"),
]

MAX_LENGTH = 96  # tokens that the harness counts with: less than one of the texts has
METRICS = {
    "small_facts": ["acc,none", "acc_norm,none"],
    "small_texts": ["word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"],
    "small_answers": ["exact_match,none"],
}


def make_ours() -> NanoVLLM:
    # It keeps two positions for itself.
    return NanoVLLM(str(checkpoint_path()), max_model_len=MAX_LENGTH + 2, device="cpu")


def make_theirs() -> HFLM:
    path = str(checkpoint_path())
    return HFLM(path, device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=16)


@pytest.fixture(scope="module")
def evaluated() -> dict[str, dict[str, Any]]:
    """Of each backend: what the harness says of each task."""
    makers: dict[str, Callable[[], Any]] = {"nanovllm": make_ours, "transformers": make_theirs}
    results: dict[str, dict[str, Any]] = {}
    for name, make in makers.items():
        model = make()
        results[name] = {}
        for task in TASKS:
            start = time.process_time()
            result = simple_evaluate(model, tasks=[dict(task)], bootstrap_iters=0)
            results[name][task["task"]] = result
            print(f"{name}, {task['task']}: {time.process_time() - start:.1f} s of a processor")
    return results


@pytest.mark.parametrize("task", METRICS)
def test_the_numbers_are_those_of_the_harness(
    evaluated: dict[str, dict[str, Any]], task: str
) -> None:
    ours, theirs = (results[task]["results"][task] for results in evaluated.values())
    for metric in METRICS[task]:
        print(f"{metric}: {ours[metric]:.6f}, by transformers {theirs[metric]:.6f}")
        assert ours[metric] == pytest.approx(theirs[metric], rel=5e-5)  # four digits
    if task != "small_texts":
        assert 0.1 < ours[METRICS[task][0]] < 1  # it knows some and not all


def test_each_answer_is_that_of_the_harness(evaluated: dict[str, dict[str, Any]]) -> None:
    """Not only means: the log-probability of each choice, and each completion."""
    ours, theirs = (
        {name: result["samples"][name] for name, result in results.items()}
        for results in evaluated.values()
    )
    for first, second in zip(ours["small_facts"], theirs["small_facts"], strict=True):
        for (our_choice,), (their_choice,) in zip(first["resps"], second["resps"], strict=True):
            assert our_choice[0] == pytest.approx(their_choice[0], abs=2e-3)
            assert our_choice[1] == their_choice[1]  # whether it is what greedy decoding gives
    for first, second in zip(ours["small_answers"], theirs["small_answers"], strict=True):
        assert first["resps"] == second["resps"]
    texts = [sample["resps"][0][0] for sample in ours["small_answers"]]
    assert len(set(texts)) > 10 and not any("." in text for text in texts)
