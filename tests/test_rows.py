"""Rows of tables become lines of a job, and answers become columns. Nothing here needs Ray."""

import base64
import datetime
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nanovllm.jobs.lines.line import Answer, Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.parse import parse_line
from nanovllm.jobs.ray.rows import (
    BATCH_FORM_COLUMNS,
    PLAIN_COLUMNS,
    RowAnswer,
    request_rows,
    row_answer,
    row_line,
    with_answers,
)


def lines_of(table: pa.Table, embedding_format: str | None = None) -> list[Any]:
    """What the lines of a table's rows hold."""
    rows = enumerate(request_rows(table), 1)
    return [json.loads(row_line(number, row, embedding_format)) for number, row in rows]


def test_a_row_asks_for_what_its_columns_say_and_null_is_nothing() -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "temperature": [0.5, None],
            "max_tokens": [None, 7],
            "top_p": [float("nan"), 0.9],  # pandas writes null as NaN
            "stop": [["x", "y"], None],
            "label": [1, 2],  # no part of a request
        }
    )
    assert lines_of(table) == [
        {"prompt": "a", "temperature": 0.5, "stop": ["x", "y"]},
        {"prompt": "b", "max_tokens": 7, "top_p": 0.9},
    ]


def test_prompts_may_be_token_ids_and_may_be_embedded() -> None:
    table = pa.table({"prompt": [[1, 2], [3]]})
    assert lines_of(table) == [{"prompt": [1, 2]}, {"prompt": [3]}]
    assert lines_of(table, "base64")[1] == {"input": [3], "encoding_format": "base64"}


def test_a_column_of_structs_has_nulls_where_a_row_has_no_such_field() -> None:
    messages = [
        [{"role": "user", "content": "hi"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
    ]
    assert lines_of(pa.table({"messages": messages})) == [
        {"messages": each}
        for each in [
            [{"role": "user", "content": "hi"}],
            [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
        ]
    ]


def test_json_may_be_given_as_text_which_keeps_its_nulls() -> None:
    schema = {"json": {"enum": ["a", None]}}
    table = pa.table(
        {
            "messages": [json.dumps([{"role": "user", "content": "hi"}])],
            "structured_outputs": [json.dumps(schema)],
        }
    )
    assert lines_of(table) == [
        {"messages": [{"role": "user", "content": "hi"}], "structured_outputs": schema}
    ]


def test_the_batch_form_as_structs_and_as_text() -> None:
    bodies = [{"model": "m", "prompt": "a", "n": None}, {"model": "m", "prompt": None, "n": 2}]
    table = pa.table({"custom_id": [5, None], "url": ["/v1/completions"] * 2, "body": bodies})
    assert lines_of(table) == [
        {"custom_id": "5", "url": "/v1/completions", "body": {"model": "m", "prompt": "a"}},
        {"custom_id": "2", "url": "/v1/completions", "body": {"model": "m", "n": 2}},
    ]
    table = pa.table({"url": ["/v1/completions"], "body": [json.dumps(bodies[0])]})
    assert lines_of(table)[0]["body"] == bodies[0]


def test_values_of_tables_that_json_does_not_know() -> None:
    prompts = [
        (np.array([1, 2]), [1, 2]),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        ("é".encode(), "é"),
    ]
    for value, expected in prompts:
        assert json.loads(row_line(1, {"prompt": value}, None)) == {"prompt": expected}


@pytest.mark.parametrize(
    "row, code, param",
    [
        ({"prompt": object()}, "unsupported_value", "prompt"),
        ({"messages": "hello"}, "invalid_json", "messages"),
        ({"body": "{"}, "invalid_json", "body"),
        ({"temperature": 1.0}, "missing_required_parameter", "prompt"),
        ({"prompt": "a", "temperature": -1.0}, "invalid_value", "temperature"),
        ({"url": "/v2", "body": {"prompt": "a"}}, "unknown_url", "url"),
    ],
)
def test_what_is_wrong_with_a_row_is_found_when_its_line_is_parsed(
    row: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(Line(1, row_line(1, row, None)), LineOptions(model="m"))
    assert (caught.value.code, caught.value.param) == (code, param)


def batch_answer(body: dict[str, Any], status: int = 200, **fields: Any) -> Answer:
    line = {
        "id": "batch_req_1",
        "custom_id": "1",
        "response": {"status_code": status, "request_id": "req_1", "body": body},
        "error": None,
    }
    return Answer(1, json.dumps(line).encode(), **fields)


def test_answers_are_taken_apart() -> None:
    one = {"choices": [{"text": "A", "finish_reason": "stop"}]}
    answer = batch_answer(one, prompt_tokens=2, completion_tokens=3)
    assert row_answer(answer) == RowAnswer(
        answer=answer.data.decode(),
        generated_text="A",
        finish_reason="stop",
        prompt_tokens=2,
        completion_tokens=3,
    )
    message = {"role": "assistant", "content": None}
    two = {
        "choices": [
            {"message": {"role": "assistant", "content": "A"}, "finish_reason": "length"},
            {"message": message, "finish_reason": "stop"},
        ]
    }
    found = row_answer(batch_answer(two))
    assert (found.generated_text, found.generated_texts) == ("A", ["A", ""])
    assert found.finish_reason == "length"


@pytest.mark.parametrize(
    "data", [[0.1, -2.0], base64.b64encode(np.array([0.1, -2.0], "<f4").tobytes()).decode()]
)
def test_embeddings_are_numbers_however_they_come(data: Any) -> None:
    found = row_answer(batch_answer({"data": [{"embedding": data}]}))
    assert found.embedding is not None and found.embedding.dtype == np.float32
    assert found.embedding.tolist() == np.array([0.1, -2.0], np.float32).tolist()
    assert found.generated_text is None


def test_errors_have_a_sentence_and_a_code() -> None:
    error = {"message": "too long", "code": "context_length_exceeded"}
    found = row_answer(batch_answer({"error": error}, status=400, error=error["code"]))
    assert (found.error, found.error_code) == ("too long", "context_length_exceeded")
    assert found.generated_text is None and found.prompt_tokens is None


@pytest.mark.parametrize("columns", [PLAIN_COLUMNS, BATCH_FORM_COLUMNS])
def test_the_schema_is_the_same_whether_rows_fail_or_not_or_there_are_none(
    columns: dict[str, pa.DataType],
) -> None:
    table = pa.table({"id": pa.array([1], pa.int64())})
    good = RowAnswer("{}", generated_text="A", embedding=np.zeros(2, np.float32), prompt_tokens=1)
    bad = RowAnswer("{}", error="no", error_code="x")
    tables = [with_answers(table, [each], columns) for each in (good, bad)]
    tables.append(with_answers(table.slice(0, 0), [], columns))
    assert tables[0].schema == tables[1].schema == tables[2].schema
    assert tables[0].column_names == ["id", *columns]


def test_a_column_of_the_same_name_is_not_overwritten() -> None:
    table = pa.table({"error": ["mine"]})
    with pytest.raises(ValueError, match="columns named error.*drop_columns"):
        with_answers(table, [RowAnswer("{}")], PLAIN_COLUMNS)
