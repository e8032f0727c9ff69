"""What all places that lines come from have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

from nanovllm.jobs.lines.line import Line

HEAD_BYTES = 2**20  # of a file, which its fingerprint is made of
Wanted = Callable[[int], bool]  # whether the line of a number is to be read


class Source(ABC):
    """One place that lines come from. Numbers are counted from 1, and in it alone."""

    size: int | None = None  # in bytes; None where nobody can know
    last_number = 0  # of the last line, be it blank, once all is read
    knows_total = False  # whether `total` is exact from the beginning, at no cost

    @property
    def fingerprint(self) -> str | None:
        """A hash of its head; None where what was read to make one could not be read again."""
        return None

    @abstractmethod
    def total(self) -> int | None:
        """How many lines it has, or an estimate that becomes better; None: nobody knows yet."""

    @abstractmethod
    def lines(self, is_wanted: Wanted) -> Iterator[Line]:
        """The lines that are wanted, in order."""


def hash_of(data: bytes) -> str:
    """A short hash, to compare inputs with."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def hash_of_head(path: Path) -> str:
    """The same of the first bytes of a file."""
    with path.open("rb") as file:
        return hash_of(file.read(HEAD_BYTES))
