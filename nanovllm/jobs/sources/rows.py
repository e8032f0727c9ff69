"""Rows of tables as lines of JSON."""

from __future__ import annotations

import base64
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from nanovllm.jobs.lines import json_text
from nanovllm.jobs.lines.line import LineError
from nanovllm.jobs.lines.unreadable import MAX_LINE_BYTES, too_long, unreadable


def row_data(row: dict[str, Any]) -> bytes:
    """A row as the data of a line; if it cannot be one, what is wrong with it is in its place."""
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str):
        custom_id = None
    try:
        data = row_json(row)
    except LineError as error:
        return unreadable(error, custom_id)
    if len(data) > MAX_LINE_BYTES:
        return unreadable(too_long(len(data)), custom_id)
    return data


def row_json(row: dict[str, Any]) -> bytes:
    """A row as JSON. Raises a LineError that names the column for which JSON has no form."""
    try:
        return json_text.dump(row)  # as most rows can be
    except (TypeError, ValueError):
        pass
    converted = {}
    for name, value in row.items():
        try:
            converted[name] = plain(value)
        except TypeError as error:
            raise LineError(f"column {name}: {error}", "unsupported_value", name) from None
    return json_text.dump(converted)


def plain(value: Any) -> Any:
    """A value in terms that JSON has.

    Times become text in ISO's form, durations seconds, decimal numbers text (a float would not keep
    their digits), NaN and infinities null; bytes become the text that they are in UTF-8, or else
    base64.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return plain(value.tolist())
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return text_of(bytes(value))
    raise TypeError(f"{value!r:.60} is a {type(value).__name__}, for which JSON has no form")


def text_of(data: bytes) -> str:
    """Bytes as text. Some programs write texts as columns of bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return base64.b64encode(data).decode()
