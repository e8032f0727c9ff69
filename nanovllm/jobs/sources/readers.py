"""The input of a job, whatever holds it: lines of JSON, compressed or not, or rows of a table.

Nothing is read ahead of what is asked for, and no line makes more memory than MAX_LINE_BYTES be
held. A line that is no JSON is a `Line` like any other: what is wrong with it is said where it is
parsed, and the job goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from nanovllm.jobs.lines.line import Line
from nanovllm.jobs.sources.folders import open_folder
from nanovllm.jobs.sources.line_files import FileSource, LineSource
from nanovllm.jobs.sources.source import Source
from nanovllm.jobs.sources.tables import ArrowSource, ParquetSource


class Input:
    """The lines of a job, in order; each loop over it begins anew, but for stdin and pipes."""

    def __init__(self, source: Source, shard: tuple[int, int] | None) -> None:
        self.source = source
        self.shard = shard
        self.size = source.size  # in bytes, as the input lies there; None for stdin and pipes

    def __iter__(self) -> Iterator[Line]:
        return self.source.lines(self._is_wanted)

    def _is_wanted(self, number: int) -> bool:
        if self.shard is None:
            return True
        index, count = self.shard
        return number % count == index - 1

    @property
    def total(self) -> int | None:
        """How many lines there are to come in all.

        Exact for tables, for files up to 64 MiB, and once all is read; an estimate from the bytes
        that are read so far for other files; None where there is nothing to go by. (An empty line
        counts in files that are counted beforehand, and is found out when it is read.)
        """
        total = self.source.total()
        if total is None or self.shard is None:
            return total
        index, count = self.shard
        # The numbers from 1 to total that leave the remainder index - 1.
        return (total - (index - 1)) // count + (index > 1) if total >= index - 1 else 0

    @property
    def fingerprint(self) -> str | None:
        """Tells this input from others: a hash of its head; None for stdin and pipes."""
        return self.source.fingerprint


def open_input(path: str, shard: tuple[int, int] | None = None) -> Input:
    """Open the input of a job.

    Args:
        path: of a file of JSON lines, also one compressed with gzip or Zstandard; of a Parquet
            file; of a directory of any of these, or of a dataset that `datasets` has saved; or "-"
            for stdin. What a file is shows in its first bytes.
        shard: (i, n) for the lines whose number leaves the remainder i - 1 when divided by n, so
            that n machines, with i from 1 to n, share one input.

    Raises:
        OSError: for a file that is not there or cannot be read.
        ValueError: for one that is of no such kind, and for a shard that is none.
        ImportError: for one that needs a library that is missing; it names the extra.
        (All but the first come while it is read, too: of a file that ends too early, say.)
    """
    if shard is not None and not 1 <= shard[0] <= shard[1]:
        raise ValueError(f"shard must be (i, n) with i from 1 to n, not {shard!r}")
    return Input(open_source(path), shard)


def open_source(path: str) -> Source:
    """Find out what a path leads to."""
    if path == "-":
        # Not sys.stdin's own buffer: a thread that waits in that would break Python's exit.
        return LineSource("stdin", open(0, "rb", closefd=False))
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no input {path!r}")
    if os.path.isdir(path):
        return open_folder(Path(path), open_file)
    return open_file(Path(path))


def open_file(path: Path) -> Source:
    """The source for anything that is no directory."""
    if not path.is_file():  # a pipe, say: what a shell makes of <(zcat ...)
        return LineSource(str(path), path.open("rb"))
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        return ParquetSource(path)
    if path.suffix == ".arrow":
        return ArrowSource(path)
    return FileSource(path)
