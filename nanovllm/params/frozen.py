"""A list and a dict that cannot be changed, for options that have been checked."""

from typing import Any, NoReturn


class FrozenList(tuple[Any, ...]):
    """A tuple that equals, and is printed as, a list of the same items. It has a tuple's hash."""

    __slots__ = ()
    __hash__ = tuple.__hash__

    def __eq__(self, other: object) -> bool:
        return tuple.__eq__(self, tuple(other) if isinstance(other, list) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __repr__(self) -> str:
        return repr(list(self))


class FrozenDict(dict[Any, Any]):
    """A dict whose items stay as they are; `dict(it)` is a copy that can be changed."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError(
            "options that have been checked cannot be changed one by one; assign a whole new dict, "
            "or let dataclasses.replace make a changed copy of a SamplingParams"
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type, tuple[dict[Any, Any]]]:
        """Pickle it as a call: unpickling would else set the items one by one, and be refused."""
        return type(self), (dict(self),)
