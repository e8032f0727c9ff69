"""SamplingParams whose fields are assigned, and those of vLLM's that are not there."""

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
from conftest import Checkpoint, assert_idle, make_llm, random_prompts

from nanovllm import DEMO_MODEL, LLM, SamplingParams

PROMPTS = random_prompts(0, [20, 3, 33])


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> LLM:
    return make_llm(checkpoint.path)


# --- assignment -----------------------------------------------------------------------------------


def test_fields_can_be_assigned() -> None:
    params: Any = SamplingParams()
    params.temperature = 0
    params.max_tokens = None
    params.stop = "x"
    params.stop_token_ids = [3]
    params.logit_bias = {2: 1}
    params.logprobs = True
    options: dict[str, Any] = dict(temperature=0, max_tokens=None, stop=["x"], logprobs=1)
    same = SamplingParams(**options, stop_token_ids=(3,), logit_bias={2: 1.0})
    assert params == same and params.logprobs == 1 and params.stop == ["x"]
    assert params.is_greedy and not params.is_plain
    params.top_k = None  # None for an option whose default is a number
    assert params == same
    for other in (copy.copy(params), copy.deepcopy(params), pickle.loads(pickle.dumps(params))):
        assert other == params
        other.max_tokens = 5
        assert (other.max_tokens, params.max_tokens) == (5, None)


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("temperature", -0.1, ValueError),
        ("n", 2, ValueError),  # it is greedy
        ("min_tokens", 9, ValueError),  # max_tokens is 8
        ("stop", 3, TypeError),
        ("stop_token_ids", [True], TypeError),
        ("logit_bias", {3: 101}, ValueError),
        ("ignore_eos", None, TypeError),
        ("truncate_prompt_tokens", -2, ValueError),
    ],
)
def test_what_is_assigned_is_checked(name: str, value: Any, error: type[Exception]) -> None:
    params = SamplingParams(temperature=0, max_tokens=8)
    before = params.clone()
    with pytest.raises(error, match=name):
        setattr(params, name, value)
    assert params == before


def test_a_clone_is_a_copy() -> None:
    params: Any = SamplingParams(stop="x", max_tokens=9)
    clone = params.clone()
    assert clone == params and clone is not params and hash(clone) == hash(params)
    params.max_tokens = 3
    assert clone.max_tokens == 9
    fields = [field.name for field in dataclasses.fields(SamplingParams)]
    assert list(inspect.signature(SamplingParams).parameters) == fields
    assert SamplingParams.from_optional(top_p=None, ignore_eos=None, seed=3) == SamplingParams(
        seed=3
    )


def test_a_request_keeps_what_it_was_queued_with(llm: LLM) -> None:
    params: Any = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    lengths = {}
    for number in (4, 9, 2):
        params.max_tokens = number
        lengths[llm.add_request(PROMPTS[0], params)] = number
    stream = llm.stream([PROMPTS[1]], params)
    params.max_tokens = 50
    params.logprobs = 1
    results: dict[int, Any] = {}
    assert sum(len(part["token_ids"]) for part in stream) == 2
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert {number: len(result.token_ids) for number, result in results.items()} == lengths
    assert all(result.logprobs is None for result in results.values())
    assert_idle(llm)


def test_one_object_may_be_assigned_again_for_each_call(llm: LLM) -> None:
    params: Any = SamplingParams(temperature=0, ignore_eos=True)
    for number in (3, 7):
        params.max_tokens = number
        outputs = llm.generate(PROMPTS, [params] * 3, use_tqdm=False)
        assert [len(output.token_ids) for output in outputs] == [number] * 3


# --- vLLM's that are not there --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("best_of", 3, "cumulative_logprob"),
        ("logits_processors", [print], "logit_bias"),
        ("output_kind", 2, "LLM.stream"),
        ("use_beam_search", True, "LLM.beam_search"),
        ("spaces_between_special_tokens", False, "tokenizer"),
        ("skip_reading_prefix_cache", True, "enable_prefix_caching=False"),
    ],
)
def test_an_absent_parameter_names_the_remedy(name: str, value: Any, remedy: str) -> None:
    with pytest.raises(TypeError, match=f"SamplingParams has no option {name}=.*{remedy}"):
        SamplingParams(**{name: value})


def test_an_absent_parameter_may_ask_for_nothing() -> None:
    options: dict[str, Any] = dict(best_of=1, logits_processors=None, early_stopping=False)
    assert SamplingParams(seed=1, **options) == SamplingParams(seed=1)


# --- log-probabilities of all, and how many there may be ------------------------------------------


def test_logprobs_of_all_tokens(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, max_logprobs=-1)
    params = [
        SamplingParams(temperature=0, max_tokens=3, logprobs=number) for number in (-1, 2, 127)
    ]
    every, two, enough = llm.generate([PROMPTS[0]] * 3, params, use_tqdm=False)
    assert params[0].logprobs == -1  # the caller's is as it was
    logits = checkpoint.logits(PROMPTS[0] + every.token_ids)[len(PROMPTS[0]) - 1 : -1]
    for entry, row in zip(every.logprobs, logits.log_softmax(1).tolist(), strict=True):
        assert [entry[token] for token in range(127)] == pytest.approx(row, abs=1e-4)
        assert [logprob.rank for logprob in entry.values()] == list(range(1, 128))
    assert every.logprobs == enough.logprobs
    assert [len(entry) for entry in two.logprobs] == [2, 2, 2]
    llm.exit()


@pytest.mark.parametrize("asked, shown", [(21, 21), (-1, 127)])
def test_more_logprobs_than_max_logprobs(llm: LLM, asked: int, shown: int) -> None:
    params = [SamplingParams(logprobs=20), SamplingParams(logprobs=asked)]
    message = f"logprobs of prompt 1 must be at most max_logprobs 20, not {shown}; raise it by"
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert_idle(llm)


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 5, 19, 20, 300])
def test_a_prompt_is_cut_at_its_beginning(llm: LLM, number: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, truncate_prompt_tokens=number)
    outputs = llm.generate([PROMPTS[0], PROMPTS[1]], params, use_tqdm=False)
    cut = [PROMPTS[0][-number:], PROMPTS[1][-number:]]
    assert [output.prompt_token_ids for output in outputs] == cut
    plain = llm.generate(cut, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in plain]


def test_a_prompt_is_cut_to_what_fits(llm: LLM) -> None:
    params = SamplingParams(temperature=0, truncate_prompt_tokens=-1)
    (prompt,) = random_prompts(4, [400])
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    assert output.prompt_token_ids == prompt[-255:] and len(output.token_ids) == 1
    with pytest.raises(ValueError, match="truncate_prompt_tokens of prompt 0 .* not 0"):
        llm.generate([prompt], SamplingParams(truncate_prompt_tokens=0), use_tqdm=False)


def test_prompts_in_dicts(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5)
    expected = llm.generate([PROMPTS[0]], params, use_tqdm=False)[0].token_ids
    tokens = {"prompt_token_ids": PROMPTS[0]}
    named = {"prompt_token_ids": PROMPTS[0], "prompt": "its text", "multi_modal_data": None}
    outputs = llm.generate(prompts=[tokens, named], sampling_params=params, use_tqdm=False)  # type: ignore[list-item]
    outputs += llm.generate(tokens, params, use_tqdm=False)  # type: ignore[arg-type]
    assert [output.token_ids for output in outputs] == [expected] * 3
    assert [output.prompt for output in outputs] == [None, "its text", None]


def test_texts_in_dicts_and_completions_without_text() -> None:
    llm = LLM(DEMO_MODEL, device="cpu", max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=5)
    silent = dataclasses.replace(params, detokenize=False)
    prompts: list[Any] = [{"prompt": "Hello"}, "Hello", {"prompt": "Hello"}]
    said, same, unsaid = llm.generate(prompts, [params, params, silent], use_tqdm=False)
    assert said.text == same.text != ""
    assert (said.prompt, unsaid.prompt) == ("Hello", "Hello")
    assert unsaid.text == "" and unsaid.token_ids == said.token_ids
    parts = list(llm.stream("Hello", silent))
    assert {part.text for part in parts} == {""} and len(parts) == len(said.token_ids)
    with pytest.raises(ValueError, match="stop must be None where detokenize is False"):
        SamplingParams(detokenize=False, stop=["x"])
    llm.exit()


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_a_token_id_that_the_vocabulary_lacks_is_named_with_its_option(llm: LLM, name: str) -> None:
    value = {9999: 1.0} if name == "logit_bias" else [9999]
    params = SamplingParams(**{name: value})
    with pytest.raises(ValueError, match=f"{name} of prompt 1 has the token id 9999; .* 0 to"):
        llm.generate([[1], [1]], [SamplingParams(), params], use_tqdm=False)


def test_absent_options_are_refused_with_their_remedy_when_assigned() -> None:
    params = SamplingParams()
    params.best_of = 1  # asks for nothing
    with pytest.raises(TypeError, match="no option best_of=4; sample n completions"):
        params.best_of = 4
    assert params == SamplingParams()
