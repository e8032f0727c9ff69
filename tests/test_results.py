"""Results: dicts, and objects with the attributes of vLLM's, which are the same items."""

import copy
import json
import pickle
from typing import Any

import pytest
from conftest import Checkpoint, greedy, make_llm, random_prompts

from nanovllm import DEMO_MODEL, LLM, CompletionOutput, RequestOutput, SamplingParams
from nanovllm.results import Logprob, LogprobDict, StreamPart, TokenLogprobs

PROMPTS = ["Hello, my name is", "The future of AI is"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO_MODEL, device="cpu", max_model_len=128)


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> list[RequestOutput]:
    params = SamplingParams(temperature=2.5, max_tokens=6, seed=1, n=2, logprobs=2, ignore_eos=True)
    return llm.generate(PROMPTS, [params, SamplingParams(max_tokens=3)], use_tqdm=False)


def test_attributes_are_the_items(outputs: list[RequestOutput]) -> None:
    two, one = outputs
    assert isinstance(two, RequestOutput) and isinstance(two, dict) and two.finished is True
    assert (two.prompt, one.prompt) == tuple(PROMPTS)
    assert int(one.request_id) == int(two.request_id) + 2  # each completion has a number
    assert [completion.index for completion in two.outputs] == [0, 1]
    assert two.outputs == two["completions"] and one.outputs == [one] and one.index == 0
    for result in outputs:
        assert result.prompt_token_ids == result["prompt_token_ids"]
        assert result.num_cached_tokens == result["num_cached_tokens"] == 0
        assert result.prompt_logprobs is None and "prompt_logprobs" not in result
        for completion in result.outputs:
            assert isinstance(completion, CompletionOutput)
            for key in ("text", "token_ids", "finish_reason", "stop_reason", "logprobs"):
                assert getattr(completion, key) == completion[key]
    assert two.outputs[0].text == two["text"] != two.outputs[1].text
    assert one.outputs[0].cumulative_logprob is None and one.outputs[0].logprobs is None


def test_what_is_changed_in_one_is_changed_in_the_other(outputs: list[RequestOutput]) -> None:
    result = copy.deepcopy(outputs[1])
    result["text"] = "changed"
    assert result.outputs[0].text == "changed"
    result.outputs[0].text += " twice"
    assert result["text"] == "changed twice"
    result.outputs[0]["finish_reason"] = "other"
    assert result.finish_reason == result["finish_reason"] == "other"
    both = copy.deepcopy(outputs[0])
    both["completions"][1]["token_ids"] = [5]
    assert both.outputs[1].token_ids == [5] and outputs[0].outputs[1].token_ids != [5]


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda result: pickle.loads(pickle.dumps(result))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies_are_whole(outputs: list[RequestOutput], copied: Any) -> None:
    for result in outputs:
        other = copied(result)
        assert type(other) is RequestOutput and other == result and other is not result
        assert (other.prompt, other.request_id) == (result.prompt, result.request_id)
        assert [completion.index for completion in other.outputs] == [*range(len(result.outputs))]
    entry, copied_entry = outputs[0].logprobs[0], copied(outputs[0]).logprobs[0]
    assert [facts(logprob) for logprob in copied_entry.values()] == [
        facts(logprob) for logprob in entry.values()
    ]


def facts(logprob: Logprob) -> tuple[float, int | None, str | None]:
    return logprob.logprob, logprob.rank, logprob.decoded_token


def test_json_is_that_of_a_plain_dict(outputs: list[RequestOutput]) -> None:
    loaded = json.loads(json.dumps(outputs))
    assert loaded[1] == dict(outputs[1])
    assert loaded[0]["completions"][1]["text"] == outputs[0].outputs[1].text
    numbers = [[*map(float, entry.values())] for entry in outputs[0].logprobs]
    assert [[*entry.values()] for entry in loaded[0]["logprobs"]] == numbers


def test_log_probabilities_have_rank_and_text(llm: LLM, outputs: list[RequestOutput]) -> None:
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    for completion in outputs[0].outputs:
        total = 0.0
        for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True):
            assert next(iter(entry)) == token_id
            total += entry[token_id].logprob
            likeliest = sorted(entry, key=lambda token: -entry[token])
            ranks = [entry[token].rank for token in likeliest]
            assert ranks[:2] == [1, 2] and (len(ranks) == 2 or ranks[2] > 2)
            for token, logprob in entry.items():
                assert logprob.decoded_token == tokenizer.decode([token])
                assert type(logprob.logprob) is float and logprob.logprob == logprob < 0
        assert completion.cumulative_logprob == pytest.approx(total)


def test_the_rank_of_a_sampled_token_is_its_place_in_the_vocabulary(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    prompt = random_prompts(3, [9])[0]
    params = SamplingParams(temperature=2.0, seed=4, max_tokens=16, logprobs=0, ignore_eos=True)
    output = llm.generate([prompt], params, use_tqdm=False)[0]
    rows = checkpoint.logits(prompt + output.token_ids)[len(prompt) - 1 : -1]
    ranks = [next(iter(entry.values())).rank for entry in output.logprobs]
    expected = [
        row.argsort(descending=True).tolist().index(token) + 1
        for row, token in zip(rows, output.token_ids, strict=True)
    ]
    assert ranks == expected and len(set(ranks)) > 5
    assert output.prompt is None and output.prompt_token_ids == prompt
    assert next(iter(output.logprobs[0].values())).decoded_token is None  # there is no tokenizer
    llm.exit()


def test_a_token_that_is_sampled_and_likely_is_there_once() -> None:
    entry = TokenLogprobs([7, 3, 7, 5], [-2.0, -1.0, -2.0, -3.0], rank=2)
    ranks = {token: logprob.rank for token, logprob in entry.as_dict(None).items()}
    assert ranks == {7: 2, 3: 1, 5: 3} and list(ranks) == [7, 3, 5]
    assert entry.first(1).as_dict(str)[7].decoded_token == "7"
    assert Logprob(-0.5).rank is None and Logprob(-0.5).decoded_token is None


def test_step_and_stream_give_objects_too(llm: LLM) -> None:
    request_id = llm.add_request(PROMPTS[0], greedy(4))
    finished: list[tuple[int, RequestOutput]] = []
    while not llm.is_finished():
        finished += llm.step()[0]
    ((number, result),) = finished
    assert number == request_id and result.request_id == str(request_id)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=0)
    parts = list(llm.stream(PROMPTS, params))
    assert all(type(part) is StreamPart for part in parts)
    assert {(part.index, part.completion) for part in parts} == {(0, 0), (1, 0)}
    of_first = [part for part in parts if part.index == 0]
    assert "".join(part.text for part in of_first) == result.outputs[0].text
    assert [token for part in of_first for token in part.token_ids] == result.token_ids
    texts = [next(iter(part.logprobs[0].values())).decoded_token for part in of_first]
    assert all(texts)


def test_numbers_become_objects_when_somebody_looks() -> None:
    """Through whatever method of a dict; and its copies and JSON have the same numbers."""
    values = [-2.0, -1.0, -3.0]

    def make() -> LogprobDict:
        return LogprobDict([7, 3, 5], values, 40, str)

    plain = dict(zip([7, 3, 5], values, strict=True))
    shown: list[dict[int, Any]] = [
        {token: make()[token] for token in plain},
        {token: make().get(token) for token in plain},
        {token: make().pop(token) for token in plain},
        {token: make().setdefault(token) for token in plain},  # type: ignore[call-arg]
        dict(make().items()),
        dict(zip(plain, make().values(), strict=True)),
        dict([make().popitem() for _ in "1"]),
        dict(make()),
        {**make()},
        make().copy(),
        make() | {},
        copy.copy(make()),
        copy.deepcopy(make()),
        pickle.loads(pickle.dumps(make())),
    ]
    ranks = {7: 40, 3: 1, 5: 2}
    for dictionary in shown:
        for token, logprob in dictionary.items():
            assert facts(logprob) == (plain[token], ranks[token], str(token))
    assert (
        json.dumps(make()) == json.dumps(plain) and make() == plain and repr(make()) == str(plain)
    )
    assert make().get(9) is None and 9 not in make()
    changed = make()
    changed[3] = -7.0  # type: ignore[assignment]
    del changed[5]
    assert changed.get(7) == -2.0 and [*changed.values()] == [-2.0, -7.0]
