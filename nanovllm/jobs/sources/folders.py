"""Directories as the input of a job: datasets that `datasets` has saved, or files of one kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from nanovllm.jobs.lines.line import Line
from nanovllm.jobs.sources.line_files import COUNTED_BYTES
from nanovllm.jobs.sources.source import Source, Wanted, hash_of
from nanovllm.jobs.sources.tables import DatasetSource

# Ends of names that files with lines have; others are left alone.
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")


def open_folder(path: Path, open_file: Callable[[Path], Source]) -> Source:
    """Find out what a directory holds.

    open_file: makes the source of a file in it.

    Raises:
        ValueError: if it is nothing that can be read.
    """
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text()).get("splits", [])
        choices = ", ".join(str(path / name) for name in names)
        raise ValueError(f"{path} is a dataset of several splits; pass one of {choices}")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return DatasetSource(path)
    files = sorted(file for file in path.iterdir() if has_lines(file))
    if not files:
        raise ValueError(
            f"{path} is no dataset of save_to_disk, and no file in it ends with one of "
            f"{', '.join(SUFFIXES)} (or with {' or '.join(COMPRESSED)} behind that)"
        )
    return FolderSource([open_file(file) for file in files])


def has_lines(file: Path) -> bool:
    """Whether the name of a file says that there are lines in it."""
    name = file.name
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return name.endswith(SUFFIXES) and not name.startswith((".", "_")) and file.is_file()


class FolderSource(Source):
    """Several files, one after the other, by their names; lines are numbered through."""

    size: int

    def __init__(self, parts: list[Source]) -> None:
        self.parts = parts
        self.size = sum(part.size or 0 for part in parts)
        self.read_bytes = 0  # of the files that are read to their ends, as `last_number` is

    @property
    def fingerprint(self) -> str:
        """A hash of those of the files."""
        return hash_of(repr([(part.size, part.fingerprint) for part in self.parts]).encode())

    def total(self) -> int | None:
        """The sum, if the files need not be counted for it or are small; before, an estimate."""
        is_known = all(part.knows_total for part in self.parts) or self.read_bytes == self.size
        if is_known or self.size <= COUNTED_BYTES:
            totals = [part.total() for part in self.parts]
            known = [total for total in totals if total is not None]
            return sum(known) if len(known) == len(totals) else None
        if self.read_bytes == 0:
            return None
        return round(self.last_number * self.size / self.read_bytes)

    def lines(self, is_wanted: Wanted) -> Iterator[Line]:
        """Read one file after the other."""
        self.last_number = 0
        self.read_bytes = 0
        for part in self.parts:
            before = self.last_number
            for line in part.lines(numbered_from(before, is_wanted)):
                yield Line(before + line.number, line.data)
            self.last_number = before + part.last_number
            self.read_bytes += part.size or 0


def numbered_from(before: int, is_wanted: Wanted) -> Wanted:
    """The same question about numbers that begin again at 1, behind so many lines."""
    return lambda number: is_wanted(before + number)
