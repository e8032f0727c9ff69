"""Log-probabilities of the prompt's tokens: those of `transformers`, however the work is cut."""

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoint, assert_idle, greedy, make_checkpoint, make_llm, random_prompts

from nanovllm import LLM, SamplingParams
from nanovllm.collector import collector_slowed
from nanovllm.readout import step_reader
from nanovllm.readout.step_reader import StepReader

LENGTHS = [1, 2, 15, 16, 17, 40, 90, 33]
COUNTS = [0, 1, 5, 3, 2, 1, None, 20]  # likeliest tokens, of each prompt; None: it does not ask
CUTS: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    "tiny-cache": dict(
        max_model_len=120,
        kvcache_block_size=4,
        num_kvcache_blocks=32,
        max_num_batched_tokens=31,
    ),
}


def ask(num_top: int | None, **options: Any) -> SamplingParams:
    options = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, **options}
    return SamplingParams(prompt_logprobs=num_top, **options)


def check(entries: Any, checkpoint: Checkpoint, prompt: list[int], num_top: int) -> None:
    """Every number and every choice of tokens, against a float32 log_softmax."""
    expected = checkpoint.logits(prompt).log_softmax(dim=-1)
    assert len(entries) == len(prompt)
    assert entries[0] is None
    for position in range(1, len(prompt)):
        entry = entries[position]
        row = expected[position - 1]
        assert next(iter(entry)) == prompt[position]
        likeliest = row.topk(num_top).indices.tolist() if num_top else []
        assert list(dict.fromkeys([prompt[position], *likeliest])) == list(entry)
        for token_id, value in entry.items():
            assert value == pytest.approx(row[token_id].item(), abs=1e-4)
            assert value.rank == (row > row[token_id]).sum() + 1


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cut", CUTS)
def test_they_equal_log_softmax_however_the_work_is_cut(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, cut: str, depth: int
) -> None:
    monkeypatch.setattr(step_reader, "ROWS", 10)  # so that a step takes several
    prompts = random_prompts(0, LENGTHS)
    plain = make_llm(checkpoint.path, **CUTS["whole"])
    expected = [o["token_ids"] for o in plain.generate(prompts, greedy(24), use_tqdm=False)]
    llm = make_llm(checkpoint.path, depth, **CUTS[cut])
    params = [ask(num_top) for num_top in COUNTS]
    for _ in range(2):  # the second time all blocks are in the prefix cache
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert_idle(llm)
        assert [output["token_ids"] for output in outputs] == expected
        for prompt, num_top, output in zip(prompts, COUNTS, outputs, strict=True):
            if num_top is None:
                assert output.get("prompt_logprobs") is None
            else:
                check(output["prompt_logprobs"], checkpoint, prompt, num_top)
                assert output["num_cached_tokens"] == 0
    assert (llm.stats()["preemptions"] > 3) == (cut == "tiny-cache")
    llm.exit()
    plain.exit()


def test_logits_of_a_few_tokens_at_a_time(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a long prompt would be the largest tensor there is."""
    rows = []
    rank_tokens = step_reader.rank_tokens

    def recording(logits: torch.Tensor, *others: Any) -> Any:
        rows.append(len(logits))
        return rank_tokens(logits, *others)

    monkeypatch.setattr(step_reader, "rank_tokens", recording)
    llm = make_llm(checkpoint.path, max_model_len=700, max_num_batched_tokens=1000)
    (prompt,) = random_prompts(11, [600])
    llm.generate([prompt], ask(0, max_tokens=1), use_tqdm=False)
    assert rows == [256, 256, 87]


def test_the_garbage_collector_is_slowed_while_results_are_made(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint.path)
    seen: list[int] = []
    step = type(llm)._step

    def recording(self: LLM) -> Any:
        seen.append(gc.get_threshold()[0])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(type(llm), "_step", recording)
    before = gc.get_threshold()
    with pytest.raises(KeyboardInterrupt):
        llm.generate(random_prompts(12, [5]), ask(0), use_tqdm=False)
    assert seen == [100_000] * 2
    assert gc.get_threshold() == before
    gc.set_threshold(0)  # the user has turned it off
    try:
        with collector_slowed():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_who_asks_computes_its_prompt_and_leaves_it_to_others(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    (prompt,) = random_prompts(1, [70])
    with llm.trace() as trace:
        llm.generate([prompt], ask(1, max_tokens=1), use_tqdm=False)
        llm.generate([prompt], ask(1, max_tokens=1), use_tqdm=False)
        (other,) = llm.generate([prompt], greedy(1), use_tqdm=False)
    assert [step.num_tokens for step in trace.steps] == [70, 70, 6]
    assert other["num_cached_tokens"] == 64


def test_equal_prompts_in_one_step(checkpoint: Checkpoint) -> None:
    """Who asks computes all of its prompt; those that do not ask follow who computes it."""
    llm = make_llm(checkpoint.path)
    (prompt,) = random_prompts(10, [37])
    params = [ask(None), ask(1), ask(None), ask(0), ask(2)]
    with llm.trace() as trace:
        outputs = llm.generate([prompt] * 5, params, use_tqdm=False)
    assert trace.steps[0].num_tokens == 4 * 37
    assert len({tuple(output["token_ids"]) for output in outputs}) == 1
    for index, num_top in ((1, 1), (3, 0), (4, 2)):
        check(outputs[index]["prompt_logprobs"], checkpoint, prompt, num_top)


def test_of_several_completions_one_computes_them(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    (prompt,) = random_prompts(2, [50])
    params = ask(2, n=3, temperature=1, seed=1, max_tokens=4)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    check(output["prompt_logprobs"], checkpoint, prompt, 2)
    seqs = llm._inputs.make_sequences(llm._check_requests([prompt], params)[0], is_streamed=False)
    assert [seq.readout is not None for seq in seqs] == [True, False, False]


def test_steps_of_neighbours_read_nothing(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers: list[StepReader | None] = []
    make = StepReader.of

    def recording(*inputs: Any) -> StepReader | None:
        readers.append(make(*inputs))
        return readers[-1]

    monkeypatch.setattr(StepReader, "of", recording)
    llm = make_llm(checkpoint.path, max_num_batched_tokens=32)
    prompts = random_prompts(3, [32, 31, 32])
    llm.generate(prompts, [greedy(2), ask(0), greedy(2)], use_tqdm=False)
    assert [reader is not None for reader in readers] == [False, True, False]


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": dict(
        architecture="Gemma2ForCausalLM",
        head_dim=16,
        sliding_window=12,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
    ),
    "granite": dict(
        architecture="GraniteForCausalLM",
        embedding_multiplier=2.0,
        residual_multiplier=0.7,
        attention_multiplier=0.3,
        logits_scaling=1.7,
    ),
    "qwen3-moe": dict(
        architecture="Qwen3MoeForCausalLM",
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_change_the_logits_or_the_last_layer(tmp_path: Path, family: str) -> None:
    checkpoint = make_checkpoint(tmp_path, seed=5, **FAMILIES[family])
    llm = make_llm(checkpoint.path, max_num_batched_tokens=40)
    prompts = random_prompts(4, [30, 25, 7])
    outputs = llm.generate(prompts, ask(2, max_tokens=2), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        check(output["prompt_logprobs"], checkpoint, prompt, 2)
    llm.exit()


def test_what_a_harness_asks_for_is_one_prefill_and_no_decode_step(checkpoint: Checkpoint) -> None:
    """The sum over a continuation, of which a harness asks how likely it is behind a context."""
    llm = make_llm(checkpoint.path)
    context, continuation = random_prompts(6, [40, 9])
    params = SamplingParams(prompt_logprobs=1, max_tokens=1, temperature=0)
    with llm.trace() as trace:
        (output,) = llm.generate([context + continuation], params, use_tqdm=False)
    assert len(trace.steps) == 1
    entries = output["prompt_logprobs"][-len(continuation) :]
    total = sum(entry[t] for entry, t in zip(entries, continuation, strict=True))
    rows = checkpoint.logits(context + continuation)[len(context) - 1 : -1].log_softmax(dim=-1)
    expected = rows.gather(1, torch.tensor(continuation)[:, None]).sum().item()
    assert total == pytest.approx(expected, abs=1e-3)


def test_an_aborted_prompt_has_those_that_were_computed(checkpoint: Checkpoint) -> None:
    llm: LLM = make_llm(checkpoint.path, max_num_batched_tokens=16)
    (prompt,) = random_prompts(7, [60])
    request_id = llm.add_request(prompt, ask(0))
    llm.step()
    llm.abort(request_id)
    ((_, result),) = llm.step()[0]
    assert result["finish_reason"] == "abort"
    assert len(result["prompt_logprobs"]) == 17
    computed = zip(result["prompt_logprobs"][1:], prompt[1:], strict=False)
    assert all(math.isfinite(entry[token_id]) for entry, token_id in computed)


def test_a_stream_has_them_in_its_first_part(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, max_num_batched_tokens=16)
    (prompt,) = random_prompts(8, [40])
    first, *others = llm.stream([prompt], ask(1, max_tokens=4))
    check(first["prompt_logprobs"], checkpoint, prompt, 1)
    assert len(others) == 3
    assert not any("prompt_logprobs" in part for part in others)


def test_how_many_there_may_be(checkpoint: Checkpoint) -> None:
    (prompt,) = random_prompts(9, [20])
    with pytest.raises(ValueError, match="prompt_logprobs of prompt 0.*max_logprobs 20, not 21"):
        make_llm(checkpoint.path).generate([prompt], ask(21))
    llm = make_llm(checkpoint.path, max_logprobs=-1)
    (output,) = llm.generate([prompt], ask(-1, max_tokens=1), use_tqdm=False)
    check(output["prompt_logprobs"], checkpoint, prompt, 127)


@pytest.mark.parametrize("value", [-2, 1.5, "1"])
def test_wrong_values(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"prompt_logprobs.*{value}"):
        SamplingParams(prompt_logprobs=value)
