"""Beam search gives the beams and scores of `transformers`, however the work is cut."""

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import Checkpoint, assert_idle, greedy, make_checkpoint, make_llm, random_prompts

from nanovllm import DEMO_MODEL, LLM, BeamSearchParams, SamplingParams
from nanovllm.beam_search.hypotheses import Search
from nanovllm.results import TokenLogprobs

LENGTHS = [5, 33, 16]
NUM_TOKENS = 12
PROMPTS = random_prompts(11, LENGTHS, vocab=40)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Few tokens, and logits that are close, so that beams often part and often end."""
    return make_checkpoint(tmp_path_factory.mktemp("beams"), vocab_size=40, std=0.12, seed=3)


@pytest.fixture(scope="module")
def llm(small: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(small.path, eos=(6,))
    yield llm
    assert_idle(llm)
    llm.exit()


Beams = list[tuple[list[int], float]]  # completions with their scores, the best one first


def reference(
    model: Any, prompt: list[int], width: int, penalty: float, eos: list[int], num_tokens: int
) -> Beams:
    """The beams of `transformers`."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=penalty,
        early_stopping=False,
        max_new_tokens=num_tokens,
        eos_token_id=eos or None,
        pad_token_id=39,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for tokens, score in zip(
        out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True
    ):
        ends = [tokens.index(token_id) for token_id in eos if token_id in tokens]
        beams.append((tokens[: min(ends) + 1] if ends else tokens, score))
    return beams


def check(outputs: list[Any], expected: list[Beams], penalty: float) -> None:
    for output, beams in zip(outputs, expected, strict=True):
        assert [beam.token_ids for beam in output.sequences] == [tokens for tokens, _ in beams]
        for beam, (tokens, score) in zip(output.sequences, beams, strict=True):
            assert beam.score == pytest.approx(score, abs=2e-4)
            assert beam.cum_logprob == pytest.approx(score * len(tokens) ** penalty, abs=2e-3)


@pytest.mark.parametrize("eos", [[], [6], [3, 6, 10, 31]], ids=["no-eos", "eos", "many-eos"])
@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("width", [2, 4])
def test_the_beams_of_transformers(
    small: Checkpoint, llm: LLM, width: int, penalty: float, eos: list[int]
) -> None:
    llm.config.eos = tuple(eos)
    params = BeamSearchParams(width, NUM_TOKENS, length_penalty=penalty)
    outputs = llm.beam_search(PROMPTS, params)
    expected = [reference(small.model, p, width, penalty, eos, NUM_TOKENS) for p in PROMPTS]
    check(outputs, expected, penalty)
    reasons = [beam.finish_reason for output in outputs for beam in output.sequences]
    assert set(reasons) <= {"stop", "length"} and (not eos or width < 4 or "stop" in reasons)
    assert_idle(llm)


def test_enough_beams_go_on_if_each_could_end_in_several_ways() -> None:
    search = Search(beam_width=2, length_penalty=1.0, max_tokens=9, end_ids={0, 1, 2})
    assert search.num_candidates == 8
    values = [-0.1 * place for place in range(9)]
    search.advance([TokenLogprobs([0, *range(8)], values)])
    assert [beam.token_ids for beam in search.running] == [[3], [4]]
    assert [beam.token_ids for beam in search.ended] == [[0], [1]]
    assert search.is_done  # neither could be better than those
    search.advance([TokenLogprobs([0, 0, 1, 2, 5], values[:5])] * 2)
    assert [beam.token_ids for beam in search.running] == [[3, 5], [4, 5]]


def test_one_beam_is_greedy(llm: LLM) -> None:
    llm.config.eos = (6,)
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(1, NUM_TOKENS, ignore_eos=True))
    expected = llm.generate(PROMPTS, greedy(NUM_TOKENS), use_tqdm=False)
    assert [[beam.token_ids for beam in output.sequences] for output in outputs] == [
        [result["token_ids"]] for result in expected
    ]


CASES: dict[str, dict[str, Any]] = {
    "ahead": dict(),
    "odd-blocks": dict(kvcache_block_size=3, max_model_len=60),
    "chunks": dict(max_num_batched_tokens=3),
    "no-prefix-caching": dict(enable_prefix_caching=False),
    "in-turn": dict(kvcache_block_size=4, max_model_len=48, num_kvcache_blocks=22),
    "fewer-blocks-than-beams": dict(kvcache_block_size=4, max_model_len=48, num_kvcache_blocks=12),
    "fewer-rows-than-beams": dict(max_num_seqs=3),
}


@pytest.mark.parametrize("case", CASES)
def test_beams_do_not_depend_on_how_the_work_is_cut(small: Checkpoint, llm: LLM, case: str) -> None:
    llm.config.eos = (6,)
    params = BeamSearchParams(4, NUM_TOKENS)
    expected = [
        [(beam.token_ids, beam.score) for beam in output.sequences]
        for output in llm.beam_search(PROMPTS, params)
    ]
    other = make_llm(small.path, 1, eos=(6,), **CASES[case])
    other.model_runner.kv_cache.fill_(float("nan"))  # type: ignore[union-attr]
    for _ in range(2):  # the second time with prefix hits
        check(other.beam_search(PROMPTS, params), expected, 1.0)
        assert_idle(other)
    other.exit()


def test_searches_that_meet(llm: LLM) -> None:
    """Beams of two searches may have the same tokens, and each has blocks of its own."""
    llm.config.eos = (6,)
    params = BeamSearchParams(3, 8, ignore_eos=True)
    prompt = PROMPTS[0]
    (alone,) = llm.beam_search([prompt], params)
    beam = alone.sequences[0].token_ids
    prompts = [prompt, [*prompt, *beam[:2]], prompt]
    outputs = llm.beam_search(prompts, params)
    expected = [llm.beam_search([each], params)[0] for each in prompts]
    for output, other in zip(outputs, expected, strict=True):
        assert [one.token_ids for one in output.sequences] == [
            one.token_ids for one in other.sequences
        ]
    assert_idle(llm)


def test_a_step_computes_one_token_of_each_beam(llm: LLM) -> None:
    llm.reset()
    llm.config.eos = (6,)
    with llm.trace() as trace:
        llm.beam_search(PROMPTS, BeamSearchParams(4, 6, ignore_eos=True))
    steps = [step.num_tokens for step in trace.steps]
    assert steps == [sum(LENGTHS)] + [4 * len(PROMPTS)] * 5
    # The last tokens of four beams lie in four blocks at most, beside those of the prompt.
    assert max(step.blocks["blocks_in_use"] for step in trace.steps) <= 1 + 3 + 1 + 4 * 3


def test_equal_prompts_have_equal_beams(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=NUM_TOKENS)
    (alone,) = llm.beam_search(PROMPTS[1:2], params, use_tqdm=False)
    outputs = llm.beam_search(PROMPTS[1:2] * 3, params, use_tqdm=False)
    assert [[beam.token_ids for beam in output.sequences] for output in outputs] == [
        [beam.token_ids for beam in alone.sequences]
    ] * 3


@pytest.mark.parametrize("length_penalty", [-50, 50])
def test_scores_are_numbers_at_the_limits(llm: LLM, length_penalty: int) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=30, length_penalty=length_penalty)
    (output,) = llm.beam_search(PROMPTS[:1], params, use_tqdm=False)
    assert all(-math.inf < beam.score < 0 for beam in output.sequences)


def test_what_is_returned(llm: LLM) -> None:
    llm.config.eos = (6,)
    (output,) = llm.beam_search([PROMPTS[1]], BeamSearchParams(3, 5, ignore_eos=True))
    assert output["prompt_token_ids"] == PROMPTS[1] and output.prompt is None
    assert json.loads(json.dumps(output))["sequences"][2]["tokens"] == output.sequences[2].tokens
    scores = [beam.score for beam in output.sequences]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 3
    for beam in output.sequences:
        assert beam.tokens == PROMPTS[1] + beam.token_ids and len(beam.token_ids) == 5
        chosen = [
            entry[token_id] for entry, token_id in zip(beam.logprobs, beam.token_ids, strict=True)
        ]
        assert sum(chosen) == pytest.approx(beam.cum_logprob, abs=1e-5)
        assert [next(iter(entry)) for entry in beam.logprobs] == beam.token_ids
        assert all(entry.rank >= 1 for entry in chosen)


def test_texts_and_max_model_len() -> None:
    llm = make_llm(DEMO_MODEL, max_model_len=32)
    (output,) = llm.beam_search("introduce yourself", BeamSearchParams(2, 100))
    assert output.prompt == "introduce yourself"
    assert all(len(beam.tokens) <= 32 for beam in output.sequences)
    assert all(beam.text.startswith("introduce yourself") for beam in output.sequences)
    llm.exit()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beam_width=0, max_tokens=5), "beam_width must be at least 1, not 0"),
        (dict(beam_width=2, max_tokens=0), "max_tokens must be at least 1, not 0"),
        (dict(beam_width=2, max_tokens=5, temperature=0.5), "temperature must be .* not 0.5"),
        (dict(beam_width=2, max_tokens=5, length_penalty=float("nan")), "length_penalty"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**options)


def test_wrong_calls(llm: LLM) -> None:
    with pytest.raises(TypeError, match="params must be a BeamSearchParams"):
        llm.beam_search(PROMPTS, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        llm.beam_search([[1], []], BeamSearchParams(2, 5))
    with pytest.raises(TypeError, match="no option lora_request='x'; merge"):
        llm.beam_search(PROMPTS, BeamSearchParams(2, 5), lora_request="x")
    with pytest.raises(TypeError, match="LLM.beam_search has no option 'beams'"):
        llm.beam_search(PROMPTS, BeamSearchParams(2, 5), beams=3)
    assert llm.beam_search([], BeamSearchParams(2, 5), lora_request=None, concurrency_limit=4) == []
    request_id = llm.add_request([1, 2], greedy(2))
    with pytest.raises(RuntimeError, match="requests of add_request or stream are unfinished"):
        llm.beam_search(PROMPTS, BeamSearchParams(2, 5))
    llm.abort(request_id)
    while not llm.is_finished():
        llm.step()


def test_an_interrupted_search_leaves_the_engine_empty(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Search.advance
    calls = []

    def interrupted(self: Search, next_tokens: list[TokenLogprobs]) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        advance(self, next_tokens)

    monkeypatch.setattr(Search, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.beam_search(PROMPTS, BeamSearchParams(3, 8, ignore_eos=True))
    assert_idle(llm)


def test_logits_that_are_no_numbers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = llm.model_runner
    assert runner is not None
    sample = runner._sample

    def spoiled(logits: torch.Tensor, *others: Any, **named: Any) -> Any:
        if len(logits) in (1, 3):  # the first step of three prompts, or of one
            logits[-1] = float("nan")
        return sample(logits, *others, **named)

    monkeypatch.setattr(runner, "_sample", spoiled)
    outputs = llm.beam_search(PROMPTS, BeamSearchParams(2, 3, ignore_eos=True))
    reasons = [output.sequences[0].finish_reason for output in outputs]
    assert reasons == ["length", "length", "error"]
    assert "NaN" in str(outputs[-1].sequences[0].stop_reason)
    with pytest.raises(RuntimeError, match=r"no search could be completed: .*NaN"):
        llm.beam_search(PROMPTS[:1], BeamSearchParams(2, 3, ignore_eos=True))
    assert_idle(llm)
