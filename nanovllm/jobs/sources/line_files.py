"""JSON lines from files, compressed or not, and from what can be read only once."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from nanovllm.jobs.lines.line import Line
from nanovllm.jobs.lines.unreadable import MAX_LINE_BYTES, custom_id_in, too_long, unreadable
from nanovllm.jobs.sources.compressed import open_decompressed
from nanovllm.jobs.sources.source import Source, Wanted, hash_of_head

COUNTED_BYTES = 2**26  # files up to this size are counted before they are read: it takes 30 ms
UTF8_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class LineSource(Source):
    """JSON lines from something that can be read once: stdin, a pipe."""

    num_found = 0  # lines that were not blank, so far
    is_at_end = False

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        self.name = name
        self.file = file
        self.was_read = False

    def total(self) -> int | None:
        """How many lines there were, at the end; None before."""
        return self.num_found if self.is_at_end else None

    def lines(self, is_wanted: Wanted) -> Iterator[Line]:
        """Read it."""
        if self.was_read:
            raise ValueError(f"{self.name} can be read only once")
        self.was_read = True
        return self.read_all(self.file, is_wanted)

    def read_all(self, file: io.BufferedReader, is_wanted: Wanted) -> Iterator[Line]:
        """The lines of an open file, which is closed at the end."""
        with file:
            self.num_found = 0
            for number, data in enumerate(split_lines(self.name, file), start=1):
                self.last_number = number
                if not data or data.isspace():
                    continue
                self.num_found += 1
                self.note(file)
                if is_wanted(number):
                    yield Line(number, data)
            self.is_at_end = True

    def note(self, file: io.BufferedReader) -> None:
        """A line of it was read."""


class FileSource(LineSource):
    """JSON lines from a file, compressed or not."""

    size: int

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.size = path.stat().st_size
        self.position = 0  # in the file, about where the lines that were found end

    @property
    def fingerprint(self) -> str:
        """A hash of the first bytes."""
        return hash_of_head(self.path)

    @cached_property
    def counted(self) -> int | None:
        """The number of lines; None if it would take long to count them."""
        if self.size > COUNTED_BYTES:
            return None
        with self.path.open("rb") as file:
            if open_decompressed(self.name, file) is not file:
                return None
            return sum(1 for line in file if not line.isspace())

    def total(self) -> int | None:
        """The number of lines, or what it will be if the others are as long as those so far."""
        if self.is_at_end:
            return self.num_found
        if self.counted is not None:
            return self.counted
        if self.position == 0:
            return None
        return max(self.num_found, round(self.num_found * self.size / self.position))

    def lines(self, is_wanted: Wanted) -> Iterator[Line]:
        """Read it from the beginning."""
        yield from self.read_all(self.path.open("rb"), is_wanted)

    def note(self, file: io.BufferedReader) -> None:
        """Where the file is now tells how much of it is left."""
        self.position = file.tell()


def split_lines(name: str, file: io.BufferedReader) -> Iterator[bytes]:
    """All lines of a file, also blank ones, without what ends them.

    Of one that is too long only the beginning is held, and what comes is `unreadable`.

    Raises:
        ValueError: for UTF-16, in which no line would be one.
    """
    stream = open_decompressed(name, file)
    is_first = True
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if is_first:
            is_first = False
            if line.startswith(UTF16_MARKS):
                raise ValueError(f"{name} is UTF-16; JSON lines are UTF-8: convert it with iconv")
            line = line.removeprefix(UTF8_MARK)
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            yield skip_line(stream, line)
        else:
            yield line.rstrip(b"\r\n")


def skip_line(stream: io.BufferedReader, beginning: bytes) -> bytes:
    """Read on to the end of a line that is too long; returns what stands in its place."""
    num_bytes = len(beginning)
    custom_id = custom_id_in(beginning)
    del beginning
    while piece := stream.readline(2**20):
        num_bytes += len(piece)
        if piece.endswith(b"\n"):
            break
    return unreadable(too_long(num_bytes), custom_id)
