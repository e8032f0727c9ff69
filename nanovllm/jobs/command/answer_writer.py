"""Writes answers, each once, as they come or in the order of the input."""

from __future__ import annotations

from collections import deque

from nanovllm.jobs.command.counts import Counts
from nanovllm.jobs.command.output import Finished, Stream
from nanovllm.jobs.lines.line import Answer


class AnswerWriter:
    """Takes answers in any order. In order, those that come early wait for the line before them;
    how many, is bounded by how far the pool reads ahead of its oldest unanswered line.
    """

    def __init__(self, output: Stream, finished: Finished, counts: Counts, in_order: bool) -> None:
        self._output = output
        self._written = finished.numbers
        self._last_number = finished.last_number
        self._counts = counts
        self.is_in_order = finished.is_in_order  # whether the numbers in the output only increase
        self._in_order = in_order
        self._expected: deque[int] = deque()  # numbers of lines without an answer, in order
        self._waiting: dict[int, Answer] = {}  # answers whose turn has not come

    @property
    def num_waiting(self) -> int:
        """How many answers are not written yet."""
        return len(self._waiting)

    def expect(self, number: int) -> None:
        """Take down that a line is to be answered. Another thread may call this than `put`."""
        if self._in_order:
            self._expected.append(number)

    def put(self, answer: Answer) -> None:
        """Write an answer, now or in its turn. Raises an OutputError."""
        if not self._in_order:
            self._write(answer)
            return
        self._waiting[answer.number] = answer
        while self._expected and self._expected[0] in self._waiting:
            self._write(self._waiting.pop(self._expected.popleft()))

    def _write(self, answer: Answer) -> None:
        assert answer.number not in self._written, f"line {answer.number} is answered twice"
        self._output.write(answer.data)
        self._written.add(answer.number)
        self.is_in_order = self.is_in_order and answer.number > self._last_number
        self._last_number = max(self._last_number, answer.number)
        self._counts.add(answer)
