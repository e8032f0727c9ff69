"""One run over many lines: what is read, what is answered, and how far ahead the reader may be."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from queue import SimpleQueue

from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.replicas.task import Task

# From the oldest line whose answer nobody has taken to the newest that is read: who writes answers
# in the order of the lines keeps so many, and not more.
MAX_DISTANCE = 32768
MAX_HELD_BYTES = 128 << 20  # of lines, and of their answers until somebody takes them


@dataclass(frozen=True, slots=True)
class EndOfLines:
    """Nothing more is read: there are no more lines, or reading them has raised this."""

    error: BaseException | None


class RunTask(Task):
    """A line of a run."""

    __slots__ = ("is_taken", "num_bytes", "run")

    def __init__(self, line: Line, run: Run) -> None:
        super().__init__(line)
        self.run = run
        self.num_bytes = len(line.data)  # of it, and of its answer
        self.is_taken = False  # the answer

    def begin(self) -> bool:
        """Return whether the answer is still wanted."""
        return not self.run.is_abandoned

    def finish(self, answer: Answer) -> None:
        """Hand over the answer."""
        del self.line
        self.run.add_answer(self, answer)

    def fail(self, error: BaseException) -> None:
        """Say that there will be no answer: the run is told once for all its lines."""


class Run:
    """What three threads share: one reads lines, the pool's has them answered, and one, whoever
    called `ReplicaPool.run`, takes the answers.
    """

    def __init__(self) -> None:
        self.is_abandoned = False  # nobody will take the answers
        self.results: SimpleQueue[tuple[RunTask, Answer] | EndOfLines | BaseException] = (
            SimpleQueue()
        )
        self._lock = threading.Lock()  # of the rest
        self._is_full = False  # when the reader last asked
        self._num_held_bytes = 0
        # The lines that are read, from the oldest whose answer is not taken.
        self._window: deque[RunTask] = deque()

    @property
    def may_read(self) -> bool:
        """Whether there is memory for another line."""
        with self._lock:
            has_memory = len(self._window) < MAX_DISTANCE and self._num_held_bytes < MAX_HELD_BYTES
            self._is_full = len(self._window) > 0 and not has_memory
            return not self._is_full

    def add_line(self, line: Line) -> RunTask:
        """A line has been read."""
        task = RunTask(line, self)
        with self._lock:
            self._num_held_bytes += task.num_bytes
            self._window.append(task)
        return task

    def end(self, error: BaseException | None = None) -> None:
        """The last line has been read, or reading has raised an error."""
        self.results.put(EndOfLines(error))

    def add_answer(self, task: RunTask, answer: Answer) -> None:
        """A line has been answered."""
        with self._lock:
            self._num_held_bytes += len(answer.data)
            task.num_bytes += len(answer.data)
        self.results.put((task, answer))

    def fail(self, error: BaseException) -> None:
        """The pool can answer nothing more."""
        self.results.put(error)

    def take(self, task: RunTask) -> bool:
        """An answer has been taken. Returns whether the reader may be waiting for that."""
        with self._lock:
            task.is_taken = True
            self._num_held_bytes -= task.num_bytes
            while self._window and self._window[0].is_taken:
                self._window.popleft()
            return self._is_full

    @property
    def is_empty(self) -> bool:
        """Whether all answers to lines that have been read are taken."""
        with self._lock:
            return not self._window
