"""What sleeps of an engine, and what is asked of it meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

TAGS = ("weights", "kv_cache")


class Place(Enum):
    """Where the weights are."""

    DEVICE = auto()  # where steps read them
    HOST = auto()  # copied to pinned memory of the host
    NOWHERE = auto()


@dataclass
class SleepState:
    """Which parts of an engine are awake."""

    weights: Place = Place.DEVICE
    has_cache: bool = True
    # Whether the graphs are those of the addresses that they have since they first woke up.
    is_prepared: bool = False
    loaded: set[str] = field(default_factory=set)  # names of tensors, since the last were dropped
    missing: list[str] = field(default_factory=list)  # those that were dropped, without `loaded`

    @property
    def is_awake(self) -> bool:
        """Whether all parts are where steps need them."""
        return self.weights is Place.DEVICE and self.has_cache

    def check_awake(self) -> None:
        """Raise a RuntimeError unless the engine can run requests."""
        if not self.is_awake:
            parts = [] if self.weights is Place.DEVICE else ["weights"]
            parts += [] if self.has_cache else ["kv_cache"]
            raise RuntimeError(f"the engine sleeps ({', '.join(parts)}); call wake_up() first")
        if self.missing:
            raise RuntimeError(
                f"sleep(level=2) has dropped the weights, and {len(self.missing)} tensors have not "
                f"been loaded since ({self.missing[0]}, ...); call load_weights() with all of them"
            )


def check_level(level: int) -> None:
    """Raise a ValueError for what is no level of sleep."""
    if isinstance(level, bool) or level not in (1, 2):
        raise ValueError(
            f"level must be 1 (weights go to the host) or 2 (they are dropped), not {level!r}"
        )


def checked_tags(tags: str | list[str] | None) -> tuple[str, ...]:
    """The tags as a tuple, all of them for None; a ValueError for one that does not exist."""
    if tags is None:
        return TAGS
    if not isinstance(tags, (str, list, tuple, set)):
        raise TypeError(f"tags must be a string, a list of strings or None, not {tags!r}")
    listed = (tags,) if isinstance(tags, str) else tuple(tags)
    for tag in listed:
        if tag not in TAGS:
            raise ValueError(f"tags must be of {', '.join(TAGS)}, or None for all, not {tag!r}")
    return listed
