"""Checks of options: a TypeError or ValueError that names the option, what it may be and what it is."""

from dataclasses import fields
from functools import lru_cache
from math import inf
from typing import Annotated, Any, get_args, get_origin

ABOVE_0 = 2.0**-126  # as a lowest value: float32's smallest normal number
NOUNS = {bool: "True or False", int: "an integer", float: "a number"}


@lru_cache
def field_types(options: type) -> list[tuple[str, Any, Any, list, list]]:
    """Of each field of a dataclass: name, default, type, limits, and whether (not empty) it may be None."""
    types = []
    for field in fields(options):
        kind, *limits = (
            get_args(field.type) if get_origin(field.type) is Annotated else (field.type,)
        )
        kind, *none = get_args(kind) or (kind,)
        types.append((field.name, field.default, kind, limits, none))
    return types


def check_fields(options: Any) -> None:
    """Check a dataclass: `Annotated[int | None, 1, 8]` is None or 1 to 8, `Annotated[str, "a", "b"]` one of these."""
    for name, default, kind, limits, none in field_types(type(options)):
        value = getattr(options, name)
        if value is default:
            continue
        if kind is str and limits and value not in limits:
            raise ValueError(f"{name} must be one of {', '.join(limits)}, not {value!r}")
        if kind in NOUNS and not (none and value is None):
            check_value(name, value, kind, *limits, suffix=" or None" if none else "")


def check_value(
    name: str, value: Any, kind: type, low: float = -inf, high: float = inf, *, suffix: str = ""
) -> None:
    """Raise unless `value` is a bool, an int, or (for float) a number, from `low` to `high`."""
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(
        value, bool
    ) != (kind is bool):
        raise TypeError(f"{name} must be {NOUNS[kind]}{suffix}, not {value!r}")
    if not low <= value <= high:  # NaN fails too
        lowest, highest = (
            "above 0" if low == ABOVE_0 else f"at least {low}",
            f" and at most {high}" * (high != inf),
        )
        raise ValueError(f"{name} must be {lowest}{highest}{suffix}, not {value!r}")
