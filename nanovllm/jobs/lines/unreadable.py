"""Rows of an input that cannot become a line: a reader passes on what is wrong with them instead.

They travel as the bytes of any other line do. No JSON begins with a NUL byte, so these do.
"""

from __future__ import annotations

import json
import re

from nanovllm.jobs.lines.line import LineError

MARK = b"\0"
FIELDS = {"message", "code", "param", "custom_id"}  # that follow it
# A custom_id in the text of a line that is no JSON. Behind a backslash it is part of a string.
CUSTOM_ID = re.compile(rb'(?<!\\)"custom_id"\s*:\s*("(?:[^"\\]|\\.){0,512}")')
SUBJECT = re.compile(rb'(?<!\\)"(?:messages|prompt|input)"\s*:')  # of a plain line
SEARCHED = 2**16  # bytes at the beginning of a line that are searched for them
MAX_LINE_BYTES = 64 * 2**20  # of a line; nobody's prompt is longer, but a broken file's line may be


def unreadable(error: LineError, custom_id: str | None = None) -> bytes:
    """What a `Line` has as its data if the reader met an error."""
    fields = {
        "message": str(error),
        "code": error.code,
        "param": error.param,
        "custom_id": custom_id,
    }
    return MARK + json.dumps(fields).encode()


def fields_of(data: bytes) -> dict[str, str | None]:
    """What `unreadable` has put into the data of a line; an empty dict if it is none of its."""
    if not data.startswith(MARK):
        return {}
    try:
        fields = json.loads(data[len(MARK) :])
    except (ValueError, RecursionError):
        fields = None
    # The input itself may have any bytes in the place of a line.
    is_ours = isinstance(fields, dict) and fields.keys() == FIELDS
    if not is_ours or not all(isinstance(value, str | None) for value in fields.values()):
        return {}
    return fields


def raise_if_unreadable(data: bytes) -> None:
    """Raise the LineError that a reader has left in the data of a line, if it has."""
    if len(data) > MAX_LINE_BYTES:
        raise too_long(len(data))
    fields = fields_of(data)
    if fields:
        raise LineError(str(fields["message"]), str(fields["code"]), fields["param"])


def too_long(num_bytes: int) -> LineError:
    """The error of a line of so many bytes, or more."""
    return LineError(
        f"the line has {num_bytes} bytes or more; at most {MAX_LINE_BYTES} are read",
        code="line_too_long",
    )


def custom_id_in(data: bytes) -> str | None:
    """The custom_id in the text of a line that cannot be parsed, if it shows near the beginning."""
    found = CUSTOM_ID.search(data[:SEARCHED])
    if found is None:
        return None
    try:
        return str(json.loads(found[1].decode()))
    except ValueError:
        return None


def names_subject(data: bytes) -> bool:
    """Whether the text of a line that cannot be parsed has a prompt, messages or input in it."""
    return SUBJECT.search(data[:SEARCHED]) is not None
