"""From JSON in bytes to Python's objects and back, strictly: what others' parsers would refuse is
neither taken nor written.
"""

import json
import math
import re
from functools import partial
from itertools import chain
from typing import Any
from uuid import uuid4

# Characters that `str.splitlines` takes for ends of lines, and lone surrogates, which UTF-8 lacks.
UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")

STAND_IN = uuid4().hex  # a string that no value holds


def load(data: bytes) -> Any:
    """What JSON in UTF-8 stands for; a ValueError that says where it is wrong."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8: {error.reason}"
        ) from None
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def refuse_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python's parser takes."""
    raise ValueError(f"{name} is no value in JSON; null is")


def finite(digits: str) -> float:
    """The number that digits stand for, unless it is too large for one."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits:.40} is too large for a number")
    return number


# `json.loads` would make one for each text.
DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite)


class Raw:
    """A value that is JSON already."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def numbers(values: list[float]) -> Raw:
    """A list of numbers that were float32, with as many digits as tell each from all others.

    A vector is thousands of them: the 17 digits that Python's writer gives a float make its lines
    twice as long, and take twice as long to make.
    """
    return Raw(f"[{','.join(map('{:.9g}'.format, values))}]")


def dump(value: Any) -> bytes:
    """JSON in one line, in UTF-8, without blanks.

    value: may have values in it that are `Raw`.

    Raises:
        TypeError, ValueError: for what JSON has no form for, NaN among it.
    """
    raw: list[str] = []

    def stand_in(value: Any) -> str:
        if not isinstance(value, Raw):
            raise TypeError(f"JSON has no form for {value!r:.60}")
        raw.append(value.text)
        return STAND_IN

    encode = partial(json.dumps, value, default=stand_in, allow_nan=False, separators=(",", ":"))
    text = encode(ensure_ascii=False)
    if UNSAFE.search(text):
        raw.clear()
        text = encode()  # with all but ASCII as \uXXXX
    if raw:
        parts = text.split(f'"{STAND_IN}"')
        text = "".join(chain.from_iterable(zip(parts, [*raw, ""], strict=True)))
    return text.encode()
