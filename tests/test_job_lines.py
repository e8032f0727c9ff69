"""Lines of jobs: what is read of them, and what is answered, in OpenAI's terms and plain ones."""

import base64
import json
import math
import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject

from nanovllm import DEMO_MODEL, LLM, PoolingParams, SamplingParams
from nanovllm.jobs.lines import json_text
from nanovllm.jobs.lines.answers import answer, answered, error_answer
from nanovllm.jobs.lines.line import Answer, Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_request import LineRequest
from nanovllm.jobs.lines.parse import parse_line
from nanovllm.jobs.lines.unreadable import MAX_LINE_BYTES, unreadable
from nanovllm.pooling.results import EmbeddingRequestOutput
from nanovllm.results import CompletionOutput, RequestOutput, TokenLogprobs

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = LineOptions("the-model")
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
HI = [{"role": "user", "content": "Hi"}]
SUBJECT = {CHAT: {"messages": HI}, COMPLETIONS: {"prompt": "Hi"}, EMBEDDINGS: {"input": "Hi"}}


def batch(url: str, custom_id: str = "a", **body: Any) -> dict[str, Any]:
    """A line of the batch form."""
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": url,
        "body": {"model": "m", **SUBJECT[url], **body},
    }


def parse(fields: Any, options: LineOptions = OPTIONS, number: int = 1) -> LineRequest:
    return parse_line(Line(number, json.dumps(fields).encode()), options)


def params_of(fields: Any, options: LineOptions = OPTIONS) -> SamplingParams:
    params = parse(fields, options).params[0]
    assert isinstance(params, SamplingParams)
    return params


def wrong(fields: Any, options: LineOptions = OPTIONS) -> LineError:
    data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    with pytest.raises(LineError) as caught:
        parse_line(Line(1, data), options)
    assert str(caught.value)
    return caught.value


# --- parameters -----------------------------------------------------------------------------------

SAME = dict(
    temperature=0.5,
    top_p=0.5,
    top_k=3,
    min_p=0.1,
    max_tokens=5,
    n=2,
    seed=7,
    stop=["x"],
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.5,
    min_tokens=1,
    stop_token_ids=[3],
    ignore_eos=True,
    include_stop_str_in_output=True,
    skip_special_tokens=False,
    prompt_logprobs=1,
    truncate_prompt_tokens=9,
    bad_words=["y"],
    allowed_token_ids=[1, 2],
    thinking_token_budget=4,
)


@pytest.mark.parametrize("fields", [batch(CHAT, **SAME), batch(COMPLETIONS, **SAME), None])
def test_parameters_with_the_same_name_arrive(fields: Any) -> None:
    params = params_of(fields or {"prompt": "Hi", **SAME})
    assert params == SamplingParams(**SAME)  # type: ignore[arg-type]


CONVERTED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (CHAT, {}, {"max_tokens": None}),
    (COMPLETIONS, {}, {"max_tokens": 16}),
    (CHAT, {"max_completion_tokens": 3, "max_tokens": 9}, {"max_tokens": 3}),
    (CHAT, {"logprobs": True}, {"logprobs": 0}),
    (CHAT, {"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
    (CHAT, {"logprobs": False}, {"logprobs": None}),
    (COMPLETIONS, {"logprobs": 4}, {"logprobs": 4}),
    (COMPLETIONS, {"logit_bias": {"5": -100, "6": 1.5}}, {"logit_bias": {5: -100, 6: 1.5}}),
    (COMPLETIONS, {"max_tokens": 7.0, "seed": None, "stop": None}, {"max_tokens": 7}),
    (COMPLETIONS, {"best_of": 1, "suffix": "", "stream": False}, {}),
    (CHAT, {"tool_choice": "none", "modalities": ["text"], "user": "u", "store": True}, {}),
    (CHAT, {"response_format": {"type": "text"}}, {"structured_outputs": None}),
]


@pytest.mark.parametrize("url, body, expected", CONVERTED)
def test_parameters_with_other_names_or_forms(
    url: str, body: dict[str, Any], expected: dict[str, Any]
) -> None:
    usual = {"max_tokens": None if url == CHAT else 16}
    assert params_of(batch(url, **body)) == SamplingParams(**{**usual, **expected})


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "body, expected",
    [
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, {"json": SCHEMA}),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        (
            {"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"},
            {"json": SCHEMA, "whitespace_pattern": " ?"},
        ),
    ],
)
def test_structured_output(body: dict[str, Any], expected: dict[str, Any]) -> None:
    plain = params_of({"prompt": "Hi", **body})
    assert plain == SamplingParams(structured_outputs=expected)  # type: ignore[arg-type]
    assert params_of(batch(CHAT, **body)).structured_outputs == plain.structured_outputs


def test_what_the_template_gets() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    request = parse(
        batch(
            CHAT,
            tools=tools,
            tool_choice="auto",
            chat_template_kwargs={"enable_thinking": False},
            continue_final_message=True,
            add_generation_prompt=False,
            messages=[{"role": "user", "content": "Hi", "name": None}, {"role": "assistant"}],
        )
    )
    assert request.template_options == {
        "tools": tools,
        "enable_thinking": False,
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    assert request.messages == [{"role": "user", "content": "Hi"}, {"role": "assistant"}]
    assert parse(batch(CHAT, tools=tools, tool_choice="none")).template_options == {}
    options = LineOptions("m", chat_template_kwargs={"enable_thinking": False, "x": 1})
    line = batch(CHAT, chat_template_kwargs={"x": 2})
    assert parse(line, options).template_options == {"enable_thinking": False, "x": 2}


def test_a_prompt_may_be_a_text_token_ids_or_several_of_them() -> None:
    for url, name in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input")):
        for value, expected in (
            ("a", ["a"]),
            ([1, 2], [[1, 2]]),
            (["a", "b"], ["a", "b"]),
            ([[1], [2, 3]], [[1], [2, 3]]),
        ):
            request = parse(batch(url, **{name: value}))
            assert request.prompts == expected
            assert len(request.params) == len(expected)


def test_embeddings() -> None:
    request = parse(batch(EMBEDDINGS, dimensions=8, encoding_format="base64"))
    assert request.kind == "embed"
    assert request.base64
    assert list(request.params) == [PoolingParams(dimensions=8)]
    plain = parse({"input": "Hi", "normalize": False, "truncate_prompt_tokens": -1, "stop": "x"})
    assert list(plain.params) == [PoolingParams(normalize=False)]
    assert plain.truncate_prompt_tokens == -1
    assert plain.carried == {"stop": "x"}


# --- defaults and seeds ---------------------------------------------------------------------------


def test_whose_value_counts() -> None:
    options = LineOptions("m", defaults={"top_k": 5, "max_tokens": 100}).with_recommended(
        SamplingParams(temperature=0.6, top_k=20, top_p=0.9)
    )
    params = params_of(batch(COMPLETIONS, top_p=0.5), options)
    assert params == SamplingParams(temperature=0.6, top_k=5, top_p=0.5, max_tokens=100)
    assert pickle.loads(pickle.dumps(options)) == options


def test_defaults_and_form_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="temperature"):
        LineOptions("m", defaults={"temperature": -1})
    with pytest.raises(TypeError, match="temprature"):
        LineOptions("m", defaults={"temprature": 1})
    with pytest.raises(ValueError, match="form"):
        LineOptions("m", form="csv")


def test_seeds_depend_on_the_line_and_the_prompt_alone() -> None:
    options = LineOptions("m", seed=3)
    fields = batch(COMPLETIONS, prompt=["a", "a"])

    def seeds(number: int, options: LineOptions = options) -> list[int | None]:
        return [params.seed for params in parse(fields, options, number).params]  # type: ignore[union-attr]

    assert seeds(1) == seeds(1)
    assert len({*seeds(1), *seeds(2), *seeds(1, LineOptions("m", seed=4))}) == 6
    assert seeds(1, LineOptions("m")) == [None, None]
    assert params_of(batch(COMPLETIONS, seed=9), options).seed == 9


def test_the_lines_and_answers_of_the_documentation_are_some() -> None:
    text = (ROOT / "docs" / "JOBS.md").read_text(encoding="utf-8")
    lines = [line.encode() for line in text.splitlines() if line.startswith("{")]
    requests = [line for line in lines if answered(json_text.dump(json.loads(line))) is None]
    answers = [answered(json_text.dump(json.loads(line))) for line in lines if line not in requests]
    kinds = [parse_line(Line(1, line), OPTIONS).kind for line in requests]
    assert kinds == ["chat", "generate"]
    assert answers == [(17, False), (18, True), (17, False), (18, True)]


# --- the plain form -------------------------------------------------------------------------------


def test_which_lines_are_plain() -> None:
    page = {"prompt": "Hi", "url": "https://example.org", "body": "text", "custom_id": "7"}
    request = parse(page)
    assert not request.is_batch
    assert request.carried == {"url": "https://example.org", "body": "text", "custom_id": "7"}
    assert parse(page, LineOptions("m", form="batch")).custom_id == "7"
    assert parse({"messages": HI}).kind == "chat"


def test_what_a_plain_answer_repeats() -> None:
    line = {"id": 7, "prompt": "Hi", "top_k": 3, "text": "doc", "stop": None, "none": None}
    request = parse(line)
    assert request.carried == {"id": 7, "text": "doc", "none": None}
    kept = parse(line, LineOptions("m", keep_prompt=True))
    assert kept.carried == {"id": 7, "prompt": "Hi", "text": "doc", "none": None}


def test_names_that_an_answer_needs_itself() -> None:
    line = {"prompt": "Hi", "text": 1, "line": 2, "error": 3, "input_text": 4, "prompt_tokens": 5}
    shown = json.loads(answer(parse(line), [result()]).data)
    assert shown == {
        "line": 1,
        "input_line": 2,
        "input_error": 3,
        "input_text": 1,
        "input_input_text": 4,
        "input_prompt_tokens": 5,
        "text": "so",
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }


# --- what is wrong with a line --------------------------------------------------------------------

WRONG: list[tuple[Any, str, str | None]] = [
    (b"", "invalid_json", None),
    (b"{", "invalid_json", None),
    (b'{"prompt": "\xff"}', "invalid_json", None),
    (b'{"prompt": "a", "x": NaN}', "invalid_json", None),
    (b'{"prompt": "a", "x": 1e999}', "invalid_json", None),
    (b'{"prompt": "a", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json", None),
    ('{"prompt": "a"}'.encode("utf-16"), "invalid_json", None),
    (b"\0\0\0", "invalid_json", None),
    ([1], "not_an_object", None),
    ({}, "missing_required_parameter", "prompt"),
    ({"prompt": None}, "missing_required_parameter", "prompt"),
    ({"prompt": ["a", "b"]}, "invalid_value", "prompt"),
    ({"prompt": {"a": 1}}, "invalid_type", "prompt"),
    ({"prompt": [True]}, "invalid_type", "prompt"),
    ({"prompt": []}, "invalid_value", "prompt"),
    ({"messages": "Hi"}, "invalid_type", "messages"),
    ({"messages": [HI]}, "invalid_type", "messages"),
    ({"messages": []}, "invalid_value", "messages"),
    ({"prompt": "a", "temperature": "hot"}, "invalid_type", "temperature"),
    ({"prompt": "a", "max_completion_tokens": 0}, "invalid_value", "max_completion_tokens"),
    ({"prompt": "a", "n": 2, "temperature": 0}, "invalid_value", "n"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "invalid_value", "logit_bias"),
    ({"prompt": "a", "logit_bias": {"1": 1000}}, "invalid_value", "logit_bias"),
    ({"prompt": "a", "logit_bias": [1]}, "invalid_type", "logit_bias"),
    ({"prompt": "a", "top_logprobs": 2}, "invalid_value", "top_logprobs"),
    ({"prompt": "a", "logprobs": True, "top_logprobs": "2"}, "invalid_type", "top_logprobs"),
    ({"prompt": "a", "logprobs": "yes"}, "invalid_type", "logprobs"),
    ({"prompt": "a", "best_of": 3}, "invalid_type", "best_of"),
    ({"prompt": "a", "guided_regex": 5}, "invalid_type", None),
    ({"prompt": "a", "guided_regex": "a", "guided_json": {}}, "invalid_value", "guided_regex"),
    ({"prompt": [1], "echo": True}, "unsupported_value", "echo"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "unsupported_value", "echo"),
    ({"prompt": "a", "echo": "yes"}, "invalid_type", "echo"),
    ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
    ({"input": "a", "truncate_prompt_tokens": "x"}, "invalid_type", "truncate_prompt_tokens"),
    ({"url": CHAT, "body": {"messages": HI}}, "missing_required_parameter", "custom_id"),
    ({**batch(CHAT), "custom_id": 5}, "invalid_type", "custom_id"),
    ({**batch(CHAT), "method": "GET"}, "invalid_method", "method"),
    ({**batch(CHAT), "url": "/v1/responses"}, "unknown_url", "url"),
    ({**batch(CHAT), "url": ["x"]}, "unknown_url", "url"),
    ({"custom_id": "a", "url": CHAT}, "missing_required_parameter", "body"),
    ({**batch(CHAT), "body": "x"}, "invalid_type", "body"),
    ({**batch(CHAT), "body": {}}, "missing_required_parameter", "messages"),
    ({**batch(COMPLETIONS), "body": {}}, "missing_required_parameter", "prompt"),
    ({**batch(EMBEDDINGS), "body": {}}, "missing_required_parameter", "input"),
    (batch(CHAT, stream=True), "unsupported_parameter", "stream"),
    (batch(CHAT, temprature=1), "unknown_parameter", "temprature"),
    (batch(CHAT, echo=True), "unsupported_parameter", "echo"),
    (batch(CHAT, tool_choice="required"), "unsupported_value", "tool_choice"),
    (batch(CHAT, modalities=["audio"]), "unsupported_parameter", "modalities"),
    (batch(CHAT, chat_template_kwargs=1), "invalid_type", "chat_template_kwargs"),
    (batch(CHAT, response_format="json"), "invalid_type", "response_format"),
    (batch(CHAT, response_format={"type": "x"}), "invalid_value", "response_format"),
    (
        batch(CHAT, response_format={"type": "json_schema"}),
        "missing_required_parameter",
        "response_format",
    ),
    (
        batch(CHAT, response_format={"type": "json_schema", "schema": "{"}),
        "invalid_value",
        "response_format",
    ),
    (batch(CHAT, add_special_tokens=True), "unsupported_value", "add_special_tokens"),
    (batch(COMPLETIONS, suffix="end"), "unsupported_parameter", "suffix"),
    (batch(EMBEDDINGS, temperature=1), "unknown_parameter", "temperature"),
    (batch(EMBEDDINGS, encoding_format="int8"), "invalid_value", "encoding_format"),
]


@pytest.mark.parametrize("fields, code, param", WRONG)
def test_what_is_wrong_with_a_line_is_named(fields: Any, code: str, param: str | None) -> None:
    error = wrong(fields)
    assert (error.code, error.param, error.status) == (code, param, 400)


def test_lines_that_a_reader_could_not_read() -> None:
    too_long = wrong(b" " * (MAX_LINE_BYTES + 1))
    assert too_long.code == "line_too_long"
    data = unreadable(LineError("column x: no", "unsupported_value", "x"), custom_id="seven")
    assert repr(wrong(data)) == repr(LineError("column x: no", "unsupported_value", "x"))
    assert wrong(data).param == "x"
    shown = json.loads(error_answer(3, data, wrong(data), OPTIONS).data)
    assert shown["custom_id"] == "seven"


def test_errors_travel_between_processes() -> None:
    error = LineError("no", "a_code", "a_param", 500)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.param, copy.status) == ("no", "a_code", "a_param", 500)


# --- answers --------------------------------------------------------------------------------------


def completion(text: str = "so", finish_reason: str = "stop", **items: Any) -> CompletionOutput:
    return CompletionOutput(
        {
            "text": text,
            "token_ids": [8, 9],
            "finish_reason": finish_reason,
            "stop_reason": None,
            "logprobs": None,
            **items,
        }
    )


def result(*completions: CompletionOutput) -> RequestOutput:
    """A result of a prompt of three tokens."""
    completions = completions or (completion(),)
    made = RequestOutput(completions[0], prompt_token_ids=[1, 2, 3], num_cached_tokens=2)
    if len(completions) > 1:
        made["completions"] = list(completions)
    return made


def embedding(*values: float) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        embedding=list(values), prompt_token_ids=[1, 2], num_cached_tokens=0
    )


def in_batch(made: Answer) -> dict[str, Any]:
    """The body of an answer in the batch form."""
    line = json.loads(made.data)
    assert line["id"] == f"batch_req_{made.number}"
    assert line["error"] is None
    assert line["response"]["status_code"] == 200
    assert isinstance(line["response"]["request_id"], str)
    return line["response"]["body"]


def test_a_chat_answer_is_one_of_openai() -> None:
    request = parse(batch(CHAT, n=2), number=17)
    made = answer(request, [result(completion(), completion("la", "length"))])
    body = in_batch(made)
    parsed = ChatCompletion.model_validate(body, strict=True)
    assert [choice.message.content for choice in parsed.choices] == ["so", "la"]
    assert [choice.finish_reason for choice in parsed.choices] == ["stop", "length"]
    assert [choice.index for choice in parsed.choices] == [0, 1]
    assert parsed.model == "the-model"
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (3, 4)
    assert parsed.usage.total_tokens == 7
    assert parsed.usage.prompt_tokens_details.cached_tokens == 2  # type: ignore[union-attr]
    assert (made.number, made.prompt_tokens, made.completion_tokens) == (17, 3, 4)
    assert made.error is None


def test_a_completion_answer_is_one_of_openai() -> None:
    request = parse(batch(COMPLETIONS, prompt=["a", "b"], n=2, echo=True))
    two = [result(completion("x"), completion("y")), result(completion("z"), completion("w"))]
    parsed = Completion.model_validate(in_batch(answer(request, two)), strict=True)
    assert [choice.text for choice in parsed.choices] == ["ax", "ay", "bz", "bw"]
    assert [choice.index for choice in parsed.choices] == [0, 1, 2, 3]
    assert parsed.usage is not None
    assert (parsed.usage.prompt_tokens, parsed.usage.completion_tokens) == (6, 8)


def test_an_embedding_answer_is_one_of_openai() -> None:
    vectors = [embedding(0.5, -1.0, 1e-30), embedding(3.0, 0.0, -0.125)]
    request = parse(batch(EMBEDDINGS, input=["a", "b"]))
    parsed = CreateEmbeddingResponse.model_validate(in_batch(answer(request, vectors)))
    assert [each.embedding for each in parsed.data] == [each.embedding for each in vectors]
    assert [each.index for each in parsed.data] == [0, 1]
    assert (parsed.usage.prompt_tokens, parsed.usage.total_tokens) == (4, 4)
    request = parse(batch(EMBEDDINGS, input=["a", "b"], encoding_format="base64"))
    body = in_batch(answer(request, vectors))
    for each, made in zip(body["data"], vectors, strict=True):
        decoded = np.frombuffer(base64.b64decode(each["embedding"]), "<f4")
        assert decoded == pytest.approx(made.embedding)
    plain = json.loads(answer(parse({"input": "a", "id": 5}), vectors[:1]).data)
    assert plain == {"line": 1, "id": 5, "embedding": [0.5, -1, 1e-30], "prompt_tokens": 2}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_vectors_keep_all_digits_of_float32(values: list[float]) -> None:
    read = json.loads(json_text.dump({"v": json_text.numbers(values), "w": json_text.STAND_IN[1:]}))
    assert np.asarray(read["v"], np.float32).tolist() == values
    assert read["w"] == json_text.STAND_IN[1:]


def decode(token_id: int) -> str:
    return {1: "a", 2: "é", 3: "\ufffd", 4: "\ufffd"}[token_id]


LOGPROBS = [
    TokenLogprobs([1, 1, 2], [-0.5, -0.5, -1.0], 1).as_dict(decode),
    TokenLogprobs([3, 2, 4], [-5.0, -0.5, -1.0], 9).as_dict(decode),
    TokenLogprobs([2, 3, 4], [-math.inf, 0.0, -math.inf], 7).as_dict(decode),
]


def test_log_probabilities_of_a_chat() -> None:
    request = parse(batch(CHAT, logprobs=True, top_logprobs=2))
    body = in_batch(answer(request, [result(completion(logprobs=LOGPROBS))]))
    content = ChatCompletion.model_validate(body, strict=True).choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert [(each.token, each.logprob) for each in content] == [
        ("a", -0.5),
        ("\ufffd", -5.0),
        ("é", -9999.0),
    ]
    assert [each.bytes for each in content] == [[97], None, [0xC3, 0xA9]]
    request.token_bytes = lambda token_id: bytes([0xC0 + token_id])
    body = in_batch(answer(request, [result(completion(logprobs=LOGPROBS))]))
    exact = body["choices"][0]["logprobs"]["content"]
    assert [each["bytes"] for each in exact] == [[97], [0xC3], [0xC3, 0xA9]]
    assert [top["bytes"] for top in exact[2]["top_logprobs"]] == [[0xC3], [0xC4]]
    assert [[(top.token, top.logprob) for top in each.top_logprobs] for each in content] == [
        [("a", -0.5), ("é", -1.0)],
        [("é", -0.5), ("\ufffd", -1.0)],
        [("\ufffd", 0.0), ("\ufffd", -9999.0)],
    ]


def test_log_probabilities_of_a_completion() -> None:
    request = parse(batch(COMPLETIONS, logprobs=2, prompt_logprobs=2, return_token_ids=True))
    made = result(completion(logprobs=LOGPROBS))
    made["prompt_logprobs"] = [None, LOGPROBS[0]]
    body = in_batch(answer(request, [made]))
    logprobs = Completion.model_validate(body, strict=True).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "\ufffd", "é"]
    assert logprobs.token_logprobs == [-0.5, -5.0, -9999.0]
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs == [
        {"a": -0.5, "é": -1.0},
        {"é": -0.5, "\ufffd": -1.0},
        {"\ufffd": 0.0, "é": -9999.0},
    ]
    choice = body["choices"][0]
    assert choice["token_ids"] == [8, 9]
    assert choice["prompt_token_ids"] == [1, 2, 3]
    assert choice["prompt_logprobs"] == [
        None,
        {
            "1": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
            "2": {"logprob": -1.0, "rank": 2, "decoded_token": "é"},
        },
    ]


def test_several_completions_of_a_plain_line() -> None:
    request = parse({"prompt": "a", "n": 2, "logprobs": 0})
    several = [completion("x", logprobs=LOGPROBS[:1]), completion("y", logprobs=LOGPROBS[:1])]
    shown = json.loads(answer(request, [result(*several)]).data)
    assert [each["text"] for each in shown["completions"]] == ["x", "y"]
    assert shown["text"] == "x"
    assert shown["completions"][1]["logprobs"] == [
        {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    ]


def test_the_form_of_answers_can_be_chosen() -> None:
    as_plain = LineOptions("m", form="plain")
    shown = json.loads(answer(parse(batch(CHAT, "seven"), as_plain), [result()]).data)
    assert shown["custom_id"] == "seven"
    assert shown["text"] == "so"
    two = parse(batch(COMPLETIONS, prompt=["a", "b"]), as_plain)
    shown = json.loads(answer(two, [result(), result(completion("la"))]).data)
    assert [each["text"] for each in shown["results"]] == ["so", "la"]
    as_batch = LineOptions("m", form="batch")
    made = answer(parse({"messages": HI}, as_batch, number=4), [result()])
    ChatCompletion.model_validate(in_batch(made), strict=True)
    assert json.loads(made.data)["custom_id"] == "4"


@pytest.mark.parametrize("line", [batch(CHAT, logprobs=True), {"prompt": "a", "logprobs": 0}])
def test_log_probabilities_of_nan_make_their_line_an_error(line: dict[str, Any]) -> None:
    nan = TokenLogprobs([1], [math.nan], 1).as_dict(decode)
    with pytest.raises(LineError, match="NaN") as caught:
        answer(parse(line), [result(completion(logprobs=[nan]))])
    assert caught.value.status == 500


@pytest.mark.parametrize("finish_reason", ["error", "abort"])
def test_a_completion_that_failed_makes_its_line_an_error(finish_reason: str) -> None:
    request = parse(batch(CHAT, n=2))
    failed = completion(finish_reason=finish_reason, stop_reason="NaN")
    with pytest.raises(LineError) as caught:
        answer(request, [result(completion(), failed)])
    assert caught.value.status == 500


def test_a_vector_of_nan_makes_its_line_an_error() -> None:
    with pytest.raises(LineError, match="NaN"):
        answer(parse({"input": "a"}), [embedding(1.0, math.nan)])


# --- answers that are errors ----------------------------------------------------------------------


def error_line(data: bytes, error: BaseException, options: LineOptions = OPTIONS) -> dict[str, Any]:
    made = error_answer(5, data, error, options)
    assert made.number == 5
    assert made.error is not None
    assert answered(made.data) == (5, True)
    return json.loads(made.data)


def test_an_error_in_the_batch_form_is_one_of_openai() -> None:
    data = json.dumps(batch(CHAT, "seven")).encode()
    shown = error_line(data, LineError("no", "unknown_parameter", "x"))
    assert shown["custom_id"] == "seven"
    assert shown["error"] is None
    assert shown["response"]["status_code"] == 400
    error = ErrorObject.model_validate(shown["response"]["body"]["error"], strict=True)
    assert (error.message, error.code, error.param) == ("no", "unknown_parameter", "x")
    assert error.type == "invalid_request_error"


def test_an_error_in_the_plain_form() -> None:
    data = json.dumps({"prompt": "a" * 1000, "id": 7, "error": "mine"}).encode()
    shown = error_line(data, RuntimeError("the engine is gone"))
    assert shown == {
        "line": 5,
        "error": {"code": "server_error", "message": "the engine is gone", "param": None},
        "id": 7,
        "input_error": "mine",
    }


def test_the_custom_id_is_found_where_the_line_is_no_json() -> None:
    error = LineError("no", "invalid_json")
    assert error_line(b'{"custom_id": "se\\"ven", "body": {', error)["custom_id"] == 'se"ven'
    inside_of_a_text = b'{"prompt": "say \\"custom_id\\": \\"x\\"", '
    forced = error_line(inside_of_a_text, error, LineOptions("m", form="batch"))
    assert forced["custom_id"] is None


@pytest.mark.parametrize(
    "data, is_plain",
    [
        (b"garbage", False),
        (b"[1]", False),
        (b'{"custom_id": "a", "body": {"prompt": "', False),
        (b'{"prompt": "a', True),
        (b'{"x": "\\"prompt\\": ', False),
        (b'{"x": 1}', True),
        (unreadable(LineError("no", "a_code")), True),
        (unreadable(LineError("no", "a_code"), "seven"), False),
    ],
)
def test_the_form_of_an_error_about_a_broken_line(data: bytes, is_plain: bool) -> None:
    error = LineError("no", "invalid_json")
    assert ("line" in error_line(data, error)) == is_plain
    assert "line" in error_line(data, error, LineOptions("m", form="plain"))
    assert "custom_id" in error_line(data, error, LineOptions("m", form="batch"))


def test_what_exceptions_of_the_engine_become() -> None:
    data = json.dumps(batch(CHAT)).encode()
    for error, status in (
        (ValueError("temperature must be"), 400),
        (TypeError("tools"), 400),
        (RuntimeError("the engine"), 500),
        (KeyError("x"), 500),
    ):
        shown = error_line(data, error)
        assert shown["response"]["status_code"] == status
    huge = error_line(data, ValueError("x" * 10**6))
    assert len(huge["response"]["body"]["error"]["message"]) < 10**4


def test_output_lines_are_recognised_by_their_ends() -> None:
    good = [
        answer(parse(batch(CHAT, 'a"\\'), number=12), [result()]),
        answer(parse({"prompt": "Hi", "error": 1}, number=12), [result()]),
    ]
    for made in good:
        assert answered(made.data) == (12, False)
        assert answered(made.data[:-1]) is None
    for foreign in (b"", b"{}", b'{"line":"x"}', b'{"id":"batch_7"}', b"garbage}"):
        assert answered(foreign) is None


# --- whatever comes -------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from(
    [
        *("temperature", "n", "stop", "seed", "max_tokens", "logit_bias", "logprobs"),
        *("top_logprobs", "tools", "tool_choice", "response_format", "structured_outputs"),
        *("guided_json", "chat_template_kwargs", "echo", "stream", "dimensions", "custom_id"),
        *("encoding_format", "truncate_prompt_tokens", "metadata", "text", "line", "error", "x"),
    ]
)
FIELDS = st.dictionaries(NAMES, JSON, max_size=4)
SUBJECTS = st.sampled_from(["prompt", "messages", "input"])
PLAIN = st.builds(lambda name, value, more: {name: value, **more}, SUBJECTS, JSON, FIELDS)
BATCH = st.builds(
    lambda url, body, more: {"custom_id": "a", "url": url, "body": {**body, **more}},
    st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS]),
    FIELDS,
    st.sampled_from(list(SUBJECT.values())),
)


MARKED = st.fixed_dictionaries(
    {name: JSON | st.just("x") for name in ("message", "code", "param", "custom_id")}
)


def as_data(fields: Any) -> bytes:
    return json.dumps(fields).encode()


def answer_to(line: Line, options: LineOptions) -> Answer:
    """What a worker does, with an engine that says "so"."""
    try:
        request = parse_line(line, options)
        if request.kind == "embed":
            return answer(request, [embedding(0.5)] * len(request.prompts))
        return answer(request, [result()] * len(request.params))
    except LineError as error:
        return error_answer(line.number, line.data, error, options)


def test_a_long_custom_id_is_read_back_in_little_memory() -> None:
    start = b'{"id":"batch_req_7","custom_id":"' + b"x" * 1_000_000
    data = start + b'","response":{"status_code":200,"body":{}},"error":null}'
    tracemalloc.start()
    try:
        assert answered(data) == (7, False)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@settings(max_examples=80)
@given(
    st.binary() | (PLAIN | BATCH | JSON).map(as_data) | MARKED.map(as_data).map(b"\0".__add__),
    st.sampled_from(["auto", "batch", "plain"]),
)
def test_every_line_is_answered_in_one_line_of_json(data: bytes, form: str) -> None:
    options = LineOptions("m", form=form, seed=0)
    made = answer_to(Line(3, data), options)
    assert answered(made.data) == (3, made.error is not None)
    assert len(made.data.decode().splitlines()) == 1
    json.loads(made.data, parse_constant=pytest.fail)


@given(JSON)
def test_what_is_written_is_what_was_read(value: Any) -> None:
    data = json.dumps(value).encode()
    try:
        read = json_text.load(data)
    except ValueError:
        assert "Infinity" in data.decode()
        return
    assert json_text.load(json_text.dump(read)) == value


# --- the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM(DEMO_MODEL, max_model_len=128, kvcache_block_size=16, num_kvcache_blocks=64)
    yield llm
    llm.exit()


def run(llm: LLM, fields: dict[str, Any]) -> dict[str, Any]:
    """Answer a line with the engine, one line alone."""
    data = json.dumps(fields).encode()
    try:
        request = parse_line(Line(1, data), OPTIONS)
        results: list[Any] = []
        if request.kind == "chat":
            [params] = request.params
            options: Any = {**request.template_options, "use_tqdm": False}
            results = llm.chat(request.messages, params, **options)  # type: ignore[arg-type]
        elif request.kind == "generate":
            results = llm.generate(request.prompts, list(request.params), use_tqdm=False)  # type: ignore[arg-type]
        else:
            results = llm.embed(
                request.prompts,  # type: ignore[arg-type]
                pooling_params=list(request.params),  # type: ignore[arg-type]
                truncate_prompt_tokens=request.truncate_prompt_tokens,
                use_tqdm=False,
            )
        return json.loads(answer(request, results).data)
    except Exception as error:
        return json.loads(error_answer(1, data, error, OPTIONS).data)


def test_the_engine_answers_all_kinds_of_lines(llm: LLM) -> None:
    limits = dict(max_tokens=6, temperature=0)
    chat = run(llm, batch(CHAT, logprobs=True, top_logprobs=2, **limits))["response"]["body"]
    choice = ChatCompletion.model_validate(chat, strict=True).choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(each.token for each in choice.logprobs.content) == choice.message.content
    for each in choice.logprobs.content:  # greedy: what was drawn is the likeliest
        assert each.top_logprobs[0].logprob == each.logprob
        assert len(each.top_logprobs) == 2
    text = run(llm, batch(COMPLETIONS, logprobs=0, **limits))["response"]["body"]
    completion = Completion.model_validate(text, strict=True)
    [expected] = llm.generate(["Hi"], SamplingParams(**limits), use_tqdm=False)  # type: ignore[arg-type]
    assert completion.choices[0].text == expected["text"]
    plain = run(llm, {"prompt": "Hi", **limits})
    assert plain["text"] == expected["text"]
    vectors = run(llm, batch(EMBEDDINGS, input=["Hi", "Ho"]))["response"]["body"]
    parsed = CreateEmbeddingResponse.model_validate(vectors)
    embedded = llm.embed(["Ho"], use_tqdm=False)[0]["embedding"]
    assert parsed.data[1].embedding == pytest.approx(embedded, abs=1e-6)


def test_the_engines_own_errors_name_the_field(llm: LLM) -> None:
    long = "word " * 200
    for fields, code, param in (
        ({"prompt": long}, "context_length_exceeded", "prompt"),
        ({"messages": [{"role": "user", "content": long}]}, "context_length_exceeded", "messages"),
        ({"input": long}, "context_length_exceeded", "input"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": [10**6]}, "invalid_value", "prompt"),
        ({"prompt": "a", "logprobs": 10**4}, "invalid_value", "logprobs"),
        ({"prompt": "\ud800"}, "invalid_value", "prompt"),
        ({"messages": [{"content": "a"}]}, "invalid_value", "messages"),
        ({"messages": HI, "chat_template_kwargs": {"x": 1}}, "invalid_type", None),
        ({"input": "a", "dimensions": 10**6}, "invalid_value", "dimensions"),
    ):
        error = run(llm, fields)["error"]
        assert (error["code"], error["param"]) == (code, param), error
        assert "prompt 0" not in error["message"]  # a line is one prompt, and has no number
        assert "conversation 0" not in error["message"]
