"""Checks of options: a TypeError or ValueError that says what an option may be and what it is.

The fields of a dataclass say in their annotations what they may hold, as in
`seed: Annotated[int | None, Range(0, 2**63 - 1)] = None`, and `check_fields` checks them all.
NumPy's numbers are accepted and kept as Python's. None stands for a number that is the default.
"""

from dataclasses import Field, dataclass, fields
from functools import lru_cache
from math import inf
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ABOVE_0 = 2.0**-126  # as the low end of a Range: float32's smallest normal number, called "above 0"
NOUNS = {bool: "True or False", int: "an integer", float: "a number"}  # the types that are checked


@dataclass(frozen=True, slots=True)
class Range:
    """From `low` to `high`, both included. A NaN is in no range."""

    low: float = -inf
    high: float = inf

    def __str__(self) -> str:
        lowest = "above 0" if self.low == ABOVE_0 else f"at least {self.low}"
        return lowest if self.high == inf else f"{lowest} and at most {self.high}"


class Choice:
    """One of the strings named."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What one field of a dataclass may hold, as read from its annotation."""

    field: Field[Any]  # its default is always accepted
    kind: Any  # the type, without `| None`; checked if it is one of NOUNS
    may_be_none: bool
    limits: Range | Choice


@lru_cache
def field_rules(options: "type[DataclassInstance]") -> list[FieldRule]:
    """The rules of a dataclass, in the order of its fields."""
    rules = []
    for field in fields(options):
        kind: Any = field.type
        limits: Range | Choice = Range()
        if get_origin(kind) is Annotated:
            kind, limits = get_args(kind)
        alternatives = get_args(kind) or (kind,)  # of int | None: int and NoneType
        rules.append(FieldRule(field, alternatives[0], NoneType in alternatives, limits))
    return rules


def check_fields(options: "DataclassInstance") -> None:
    """Raise unless every field of a dataclass holds what its annotation allows.

    A Choice, a bool and a number are checked; other types (a dict, a list of strings) are not.
    """
    for rule in field_rules(type(options)):
        name = rule.field.name
        value = getattr(options, name)
        if value is rule.field.default:  # as most are: this keeps a SamplingParams cheap to make
            continue
        if isinstance(rule.limits, Choice):
            if not isinstance(value, str) or value not in rule.limits.names:
                choices = ", ".join(rule.limits.names)
                raise ValueError(f"{name} must be one of {choices}, not {value!r}")
        elif rule.kind in NOUNS and not (rule.may_be_none and value is None):
            if value is None and rule.kind is not bool:
                checked = rule.field.default
            else:
                checked = check_value(name, value, rule.kind, rule.limits, rule.may_be_none)
            if checked is not value:
                object.__setattr__(options, name, checked)  # it may be a frozen dataclass


def check_value(name: str, value: Any, kind: type, limits: Range, or_none: bool = False) -> Any:
    """Return `value` as Python's own bool, int or float, whichever `kind` is, or raise unless it is
    one and within `limits`.

    An int is good enough for a float. `or_none` only adds to the message that None would do.
    """
    alternative = " or None" if or_none else ""
    number = plain_number(value)
    is_kind = isinstance(number, (int, float) if kind is float else kind)
    is_bool = isinstance(number, bool)  # Python counts True and False as ints; here they are not
    if not is_kind or is_bool != (kind is bool):
        raise TypeError(f"{name} must be {NOUNS[kind]}{alternative}, not {value!r}")
    if not limits.low <= number <= limits.high:
        raise ValueError(f"{name} must be {limits}{alternative}, not {value!r}")
    return number


def plain_number(value: Any) -> Any:
    """Python's own number for one of NumPy's; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value
