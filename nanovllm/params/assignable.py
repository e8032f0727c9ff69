"""Options whose fields can be assigned, each value checked as it is when they are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import wraps
from typing import Any, TypeVar

from nanovllm.vllm_compat.absent import Absent, without_absent

T = TypeVar("T", bound="Assignable")


class Assignable:
    """Base of a dataclass with frozen fields and slots, decorated by `checked_assignment`."""

    __slots__ = ()

    @classmethod
    def from_optional(cls: type[T], **options: Any) -> T:
        """Make one of options of which None stands for one that is not given."""
        return cls(**{name: value for name, value in options.items() if value is not None})

    def clone(self: T) -> T:
        """Return a copy, which later assignments leave as it is. Nothing is checked again."""
        copied = object.__new__(type(self))
        for name in self.__dataclass_fields__:  # type: ignore[attr-defined]
            object.__setattr__(copied, name, getattr(self, name))
        return copied


def checked_assignment(absent: dict[str, Absent]) -> Callable[[type[T]], type[T]]:
    """Decorate a frozen dataclass, so that its fields can be assigned.

    Frozen it stays below: that gives it a hash, and an `__init__` that does not come through here
    for every field. What is assigned must be right beside the other fields as they are then: for
    more `min_tokens` than `max_tokens`, raise `max_tokens` first.

    absent: options that `__init__` and assignments refuse, or leave out, by name.
    """

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @wraps(init)
        def checked_init(self: T, *args: Any, **options: Any) -> None:
            if not absent.keys().isdisjoint(options):
                options = without_absent(cls.__name__, options, absent).kept
            init(self, *args, **options)

        def assign(self: T, name: str, value: Any) -> None:
            if name in absent:  # harmless, or an error with its remedy
                without_absent(cls.__name__, {name: value}, absent)
                return
            names = [field.name for field in fields(self)]  # type: ignore[arg-type]
            if name not in names:
                raise AttributeError(
                    f"{cls.__name__} has no field {name!r} (fields: {', '.join(names)})"
                )
            changed: Any = replace(self, **{name: value})  # type: ignore[type-var]
            object.__setattr__(self, name, getattr(changed, name))

        cls.__init__ = checked_init  # type: ignore[method-assign, assignment]
        cls.__setattr__ = assign  # type: ignore[assignment]
        return cls

    return decorate
