"""A stand-in for ReplicaPool: it answers lines without a model, in any order, and can fail."""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nanovllm.jobs.lines.answers import error_answer
from nanovllm.jobs.lines.line import Answer, Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.parse import parse_line

WINDOW = 8  # most lines between the oldest that is unanswered and the newest that was read


@dataclass
class FakePool:
    """Makes pools like itself, as `ReplicaPool` is called, and is each of them.

    seed: of the order of the answers.
    stop_after: how many answers a pool gives before `stop` is called, which raises what it likes.
    """

    seed: int = 0
    stop_after: int | None = None
    stop: Callable[[], None] = lambda: None
    line_options: LineOptions | None = None
    num_started: int = 0
    num_closed: int = 0
    call: dict[str, Any] | None = None

    def __call__(self, model: str, line_options: LineOptions, **options: Any) -> "FakePool":
        self.line_options = line_options
        self.call = {"model": model, **options}
        return self

    def __enter__(self) -> "FakePool":
        self.num_started += 1
        return self

    def __exit__(self, *error: object) -> None:
        self.num_closed += 1

    def run(self, lines: Iterable[Line]) -> Iterator[Answer]:
        choices = random.Random(self.seed)
        source = iter(lines)
        in_flight: list[Line] = []
        num_answers = 0
        is_read = False
        while True:
            while not is_read and (not in_flight or len(in_flight) < WINDOW):
                oldest = in_flight[0].number if in_flight else None
                line = next(source, None)
                if line is None:
                    is_read = True
                    break
                in_flight.append(line)
                if oldest is not None and line.number - oldest >= WINDOW:
                    break
            if not in_flight:
                return
            if num_answers == self.stop_after:
                self.stop()
            yield self.answer(in_flight.pop(choices.randrange(len(in_flight))))
            num_answers += 1

    def answer(self, line: Line) -> Answer:
        assert self.line_options is not None
        try:
            if line.duplicate_of is not None:
                raise LineError(f"as line {line.duplicate_of}", "duplicate_custom_id")
            parse_line(line, self.line_options)
        except LineError as error:
            return error_answer(line.number, line.data, error, self.line_options)
        fields = {"line": line.number, "asked": json.loads(line.data)}
        return Answer(line.number, json.dumps(fields, separators=(",", ":")).encode(), None, 10, 2)
