"""What travels between the parts of a job: lines of its input, and what each is answered with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# The `error` of an answer that says nothing of its line, which the engine has lost: a step failed,
# or the engine has ended. The line is to be run again.
ENGINE_FAILED = "engine_failed"


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a job, as the input has it."""

    number: int  # counted from 1 in the whole input
    data: bytes  # a JSON object, without the end of the line; nobody has looked into it yet
    # The number of an earlier line with the same custom_id: this one is not run, and its answer is
    # an error. None: there is none.
    duplicate_of: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What the output is to say about a line."""

    number: int  # the line's
    data: bytes  # a JSON object in one line, without its end
    error: str | None = None  # a short code such as "context_length_exceeded"; None: no error
    prompt_tokens: int = 0
    completion_tokens: int = 0


class LineError(ValueError):
    """What is wrong with a line, in the terms of OpenAI's error objects."""

    def __init__(self, message: str, code: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.code = code  # such as "invalid_json"
        self.param = param  # the field that is wrong, if it is one
        self.status = status  # of HTTP

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all of it: an exception alone keeps what its base class was given."""
        return type(self), (str(self), self.code, self.param, self.status)
