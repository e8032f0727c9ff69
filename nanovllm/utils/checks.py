"""Checks of options: a TypeError or ValueError that names the option, what it may be and what it is."""

from dataclasses import fields
from math import inf, ulp
from typing import Annotated, Any, get_args, get_origin

ABOVE_0 = ulp(0.0)  # as a lowest value: the smallest number there is
NOUNS = {bool: "True or False", int: "an integer", float: "a number"}


def check_value(name: str, value: Any, kind: type, low: float = -inf, high: float = inf, *, suffix: str = "") -> None:
    """Raise unless `value` is a bool, an int, or (for float) a number, from `low` to `high`."""
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise TypeError(f"{name} must be {NOUNS[kind]}{suffix}, not {value!r}")
    if not low <= value <= high:  # NaN fails too
        lowest, highest = "above 0" if low == ABOVE_0 else f"at least {low}", f" and at most {high}" * (high != inf)
        raise ValueError(f"{name} must be {lowest}{highest}{suffix}, not {value!r}")


def check_fields(options: Any) -> None:
    """Check each bool, int and float of a dataclass; `Annotated[int | None, 1, 8]` is None or from 1 to 8."""
    for field in fields(options):
        value, is_ranged = getattr(options, field.name), get_origin(field.type) is Annotated
        kind, *bounds = get_args(field.type) if is_ranged else (field.type,)
        kind, *none = get_args(kind) or (kind,)
        if kind in NOUNS and not (none and value is None):
            check_value(field.name, value, kind, *bounds, suffix=" or None" if none else "")
