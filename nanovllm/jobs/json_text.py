"""From JSON in bytes to Python's objects and back, strictly: what others' parsers would refuse is
neither taken nor written.
"""

import json
import math
import re
from typing import Any

# Characters that `str.splitlines` takes for ends of lines, and lone surrogates, which UTF-8 lacks.
UNSAFE = re.compile("[\x85\u2028\u2029\ud800-\udfff]")


def load(data: bytes) -> Any:
    """What JSON in UTF-8 stands for; a ValueError that says where it is wrong."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"byte {error.start} (0x{data[error.start]:02x}) is not UTF-8: {error.reason}"
        ) from None
    try:
        return json.loads(text, parse_constant=refuse_constant, parse_float=finite)
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


def dump(value: Any) -> bytes:
    """JSON in one line, in UTF-8, without blanks.

    Raises:
        TypeError, ValueError: for what JSON has no form for, NaN among it.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    if UNSAFE.search(text):
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # all as \uXXXX
    return text.encode()
