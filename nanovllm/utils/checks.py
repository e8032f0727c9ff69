"""Checks of options: a TypeError or ValueError that says what an option may be and what it is.

The fields of a dataclass say in their annotations what they may hold, and `check_fields` checks
them all:

    max_num_seqs: Annotated[int, Range(1)] = 512
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None
    device: Annotated[str, Choice("auto", "cuda", "cpu")] = "auto"
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from math import inf
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

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


ANYTHING = Range()


class Choice:
    """One of the strings named."""

    def __init__(self, *names: str) -> None:
        self.names = names


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What one field of a dataclass may hold, as read from its annotation."""

    name: str
    default: object  # always accepted
    kind: Any  # the type, without `| None`; checked if it is one of NOUNS
    may_be_none: bool
    limits: Range | Choice


@lru_cache
def field_rules(options: "type[DataclassInstance]") -> list[FieldRule]:
    """The rules of a dataclass, in the order of its fields."""
    rules = []
    for field in fields(options):
        kind: Any = field.type
        limits: Range | Choice = ANYTHING
        if get_origin(kind) is Annotated:
            kind, limits = get_args(kind)
        alternatives = get_args(kind) or (kind,)  # of int | None: int and NoneType
        rules.append(
            FieldRule(
                name=field.name,
                default=field.default,
                kind=alternatives[0],
                may_be_none=NoneType in alternatives,
                limits=limits,
            )
        )
    return rules


def check_fields(options: "DataclassInstance") -> None:
    """Raise unless every field of a dataclass holds what its annotation allows.

    A Choice, a bool and a number are checked; other types (a dict, a list of strings) are not.
    """
    for rule in field_rules(type(options)):
        value = getattr(options, rule.name)
        if value is rule.default:  # as nearly all are: this keeps a SamplingParams cheap to make
            continue
        if isinstance(rule.limits, Choice):
            check_choice(rule.name, value, rule.limits)
        elif rule.kind in NOUNS and not (rule.may_be_none and value is None):
            check_value(rule.name, value, rule.kind, rule.limits, rule.may_be_none)


def check_choice(name: str, value: object, choice: Choice) -> None:
    """Raise a ValueError unless `value` is one of the strings named."""
    if value not in choice.names:
        raise ValueError(f"{name} must be one of {', '.join(choice.names)}, not {value!r}")


def check_value(
    name: str, value: Any, kind: type, limits: Range = ANYTHING, may_be_none: bool = False
) -> None:
    """Raise unless `value` is of `kind`, which is bool, int or float, and within `limits`.

    An int is good enough for a float. `may_be_none` only adds to the message that None would do.
    """
    or_none = " or None" if may_be_none else ""
    is_kind = isinstance(value, (int, float) if kind is float else kind)
    is_bool = isinstance(value, bool)  # Python counts True and False as ints; here they are not
    if not is_kind or is_bool != (kind is bool):
        raise TypeError(f"{name} must be {NOUNS[kind]}{or_none}, not {value!r}")
    if not limits.low <= value <= limits.high:
        raise ValueError(f"{name} must be {limits}{or_none}, not {value!r}")
