"""Checks of options: a TypeError or ValueError that names the option, what it may be and what it is."""

from dataclasses import fields
from math import inf, ulp
from typing import Any, get_args

ABOVE_0 = ulp(0.0)  # as a lowest value: the smallest number there is
NOUNS = {bool: "True or False", int: "an integer", float: "a number"}


def check_value(name: str, value: Any, kind: type, low: float = -inf, high: float = inf, or_none: str = "") -> None:
    """Raise unless `value` is a bool, an int, or (for float) a number, from `low` to `high`."""
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name} must be {NOUNS[kind]}{or_none}, not {value!r}")
    if not low <= value <= high:  # NaN fails too
        lowest = "above 0" if low == ABOVE_0 else f"at least {low}"
        bounds = lowest if high == inf else f"{lowest} and at most {high}"
        raise ValueError(f"{name} must be {bounds}{or_none}, not {value!r}")


def check_fields(options: Any, ranges: dict[str, tuple[float, ...]]) -> None:
    """Check each bool, int and float field of a dataclass by its annotation and, if it has one, its (low, high)."""
    for field in fields(options):
        value, (kind, *none) = getattr(options, field.name), get_args(field.type) or (field.type,)
        if kind in NOUNS and not (none and value is None):
            check_value(field.name, value, kind, *ranges.get(field.name, ()), or_none=" or None" if none else "")
