"""Rows of a table become lines of a job, and answers become columns: how Ray's workers see both.

Nothing here knows Ray: a table is pyarrow's.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa

from nanovllm.jobs.lines.line import Answer, LineError
from nanovllm.jobs.lines.unreadable import unreadable
from nanovllm.jobs.sources.rows import row_data
from nanovllm.sampling_params import SamplingParams

# The columns of a request in OpenAI's batch form; "body" makes a row one.
BATCH_COLUMNS = ("custom_id", "method", "url", "body")
# A column of one of these names is the parameter of each row's request, where it is not null.
PARAMETER_COLUMNS = tuple(field.name for field in fields(SamplingParams))
# What is JSON by nature, and may be given as its text: Arrow gives all structs of a column the same
# fields, which JSON schemas and messages do not have.
JSON_COLUMNS = ("messages", "body", "structured_outputs", "logit_bias")

# The columns of the answers. They are the same whether rows fail or not, or are all of one kind,
# because the files of a dataset are to have one schema.
ERROR_COLUMNS = {"error": pa.string(), "error_code": pa.string()}
PLAIN_COLUMNS = {
    "generated_text": pa.string(),
    "generated_texts": pa.list_(pa.string()),
    "finish_reason": pa.string(),
    "embedding": pa.list_(pa.float32()),
    "prompt_tokens": pa.int64(),
    "completion_tokens": pa.int64(),
    **ERROR_COLUMNS,
}
BATCH_FORM_COLUMNS = {"answer": pa.string(), **ERROR_COLUMNS}


# --- rows to lines --------------------------------------------------------------------------------


def request_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Each row's request: its columns that belong to one, without nulls; the others are carried."""
    wanted = ("prompt", "messages", *BATCH_COLUMNS, *PARAMETER_COLUMNS)
    names = [name for name in wanted if name in table.column_names]
    for row in table.select(names).to_pylist():
        yield {name: value for name, value in row.items() if not is_missing(value)}


def row_line(number: int, row: dict[str, Any], embedding_format: str | None) -> bytes:
    """The data of a line that asks for what a row asks for.

    What is wrong with a row is found when its line is parsed; if it cannot be a line, that is what
    the data says (`row_data`).

    Args:
        number: of the line.
        row: columns of a request, without nulls: "body" and the others of BATCH_COLUMNS, or
            "prompt" (text or token ids) or "messages", with sampling parameters beside.
        embedding_format: if a "prompt" is to be embedded: "float" or "base64", as OpenAI has them.
            None: it is to be continued.
    """
    try:
        values = {name: column_value(name, value) for name, value in row.items()}
    except LineError as error:
        return unreadable(error, None)
    if "body" in values:
        line = {name: values[name] for name in BATCH_COLUMNS if name in values}
        line["custom_id"] = str(values.get("custom_id", number))
    elif embedding_format is not None and "prompt" in values:
        line = {"input": values["prompt"], "encoding_format": embedding_format}
    else:
        line = {name: value for name, value in values.items() if name not in BATCH_COLUMNS}
    return row_data(line)


def is_missing(value: Any) -> bool:
    """Whether a cell is empty; pandas and NumPy have NaN for that."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def column_value(name: str, value: Any) -> Any:
    """What a cell holds. JSON is parsed if it is text; structs lose their nulls."""
    if name not in JSON_COLUMNS or not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value)
    except ValueError as error:
        raise LineError(f"{name} is text, but no JSON: {error}", "invalid_json", name) from error


def without_nulls(value: Any) -> Any:
    """Leave out the fields that are null: that is how a column of structs says that one is absent.

    Lists keep theirs.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


# --- answers to columns ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """One row of the columns that answers become; the fields that do not apply are None."""

    answer: str  # the whole line, in OpenAI's batch form
    generated_text: str | None = None  # of the first completion
    generated_texts: list[str] | None = None  # of all, where n is above 1
    finish_reason: str | None = None  # of the first
    embedding: np.ndarray | None = None  # [hidden_size] float32
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None  # a sentence
    error_code: str | None = None  # such as "context_length_exceeded"


def row_answer(answer: Answer) -> RowAnswer:
    """Take an answer in OpenAI's batch form apart."""
    text = answer.data.decode()
    body = json.loads(text)["response"]["body"]
    if "error" in body:
        error = body["error"]
        return RowAnswer(text, error=error["message"], error_code=error["code"])
    if "choices" not in body:
        vector = embedding(body["data"][0]["embedding"])
        return RowAnswer(text, embedding=vector, prompt_tokens=answer.prompt_tokens)
    choices = body["choices"]
    texts = [choice_text(choice) for choice in choices]
    return RowAnswer(
        answer=text,
        generated_text=texts[0],
        generated_texts=texts if len(texts) > 1 else None,
        finish_reason=choices[0]["finish_reason"],
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def choice_text(choice: dict[str, Any]) -> str:
    """The text of a choice of a completion or of a chat completion."""
    if "message" in choice:
        return choice["message"]["content"] or ""
    return choice["text"]


def embedding(data: list[float] | str) -> np.ndarray:
    """`[hidden_size]` float32, from numbers or, as OpenAI has them too, from their bytes."""
    if isinstance(data, str):
        return np.frombuffer(base64.b64decode(data), dtype="<f4")
    return np.asarray(data, dtype=np.float32)


def with_answers(
    table: pa.Table, answers: Sequence[RowAnswer], columns: dict[str, pa.DataType]
) -> pa.Table:
    """The table with the columns of its rows' answers behind its own.

    Raises:
        ValueError: the table has a column of one of these names.
    """
    taken = sorted(set(columns) & set(table.column_names))
    if taken:
        raise ValueError(
            f"the dataset has columns named {', '.join(taken)}, and so have the answers; "
            "rename or drop its own before (Dataset.rename_columns, Dataset.drop_columns)"
        )
    for name, data_type in columns.items():
        values = [getattr(answer, name) for answer in answers]
        table = table.append_column(name, pa.array(values, type=data_type))
    return table
