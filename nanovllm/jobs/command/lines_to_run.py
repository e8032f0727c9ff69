"""The lines of the input that are still to be run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from nanovllm.jobs.command.custom_ids import CustomIds, find_custom_id
from nanovllm.jobs.command.numbers import NumberSet
from nanovllm.jobs.lines.line import Line

if TYPE_CHECKING:
    from nanovllm.jobs.sources.readers import Input


class LinesToRun:
    """An iterator over lines, which a thread of the pool reads: it never raises.

    Finished lines are read too, as an id that is used twice is to be found, whichever run of the
    job has answered the first of the two.
    """

    def __init__(self, source: Input, finished: NumberSet, expect: Callable[[int], None]) -> None:
        self.error: Exception | None = None  # why the input could not be read to its end
        self._lines = iter(source)
        self._finished = finished
        self._expect = expect  # is told the number of each line, in order
        self._custom_ids = CustomIds()

    def __iter__(self) -> Iterator[Line]:
        return self

    def __next__(self) -> Line:
        while True:
            line = self._read()
            custom_id = find_custom_id(line.data)
            if custom_id is not None:
                first = self._custom_ids.first_line(custom_id, line.number)
                if first != line.number:
                    line = replace(line, duplicate_of=first)
            if line.number not in self._finished:
                self._expect(line.number)
                return line

    def _read(self) -> Line:
        try:
            return next(self._lines)
        except StopIteration:
            raise
        except Exception as error:  # a disk that fails, a file that was compressed and cut off
            # Raised here it would end the pool's thread. What is in flight is to be answered.
            self.error = error
            raise StopIteration from error
