"""What a job has done so far: for its progress bar, and for the summary at its end."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from time import monotonic

from nanovllm.jobs.lines.line import Answer


@dataclass(slots=True)
class Counts:
    """Of this run, but for the two that say otherwise."""

    num_lines_before: int = 0  # lines that earlier runs answered
    num_errors_before: int = 0  # how many of them with an error
    num_lines: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # by code
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # When lines began to be run, in seconds.
    start: float = field(default_factory=lambda: monotonic())

    def restart_clock(self) -> None:
        """Count the seconds from now on: what came before was the start of the engines."""
        self.start = monotonic()

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        self.num_lines += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        if answer.error is not None:
            self.errors[answer.error] += 1

    @property
    def num_answered(self) -> int:
        """Lines of the output, errors too."""
        return self.num_lines_before + self.num_lines

    @property
    def num_failed(self) -> int:
        """Lines of the output that are errors."""
        return self.num_errors_before + self.errors.total()

    @property
    def seconds(self) -> float:
        """How long lines have been run; never 0, so that it can be divided by."""
        return max(monotonic() - self.start, 1e-3)

    @property
    def prompt_tokens_per_second(self) -> float:
        """The throughput of this run, in tokens read."""
        return self.prompt_tokens / self.seconds

    @property
    def completion_tokens_per_second(self) -> float:
        """The throughput of this run, in tokens written."""
        return self.completion_tokens / self.seconds

    def throughput(self) -> str:
        """Both, for people."""
        num_in = self.prompt_tokens_per_second
        num_out = self.completion_tokens_per_second
        return f"{num_in:,.0f} tok/s in, {num_out:,.0f} out"

    def summary(self, output: str) -> str:
        """What is to be said at the end, in a few lines."""
        lines = [
            f"{self.num_answered:,} lines are answered in {output}, {self.num_failed:,} of them "
            "with an error"
        ]
        if self.num_lines_before:
            lines.append(
                f"  by earlier runs: {self.num_lines_before:,}, {self.num_errors_before:,} of them "
                "with an error"
            )
        for code, count in self.errors.most_common():
            lines.append(f"  {code}: {count:,}")
        if self.num_lines:
            lines.append(
                f"  {self.prompt_tokens:,} prompt tokens, {self.completion_tokens:,} new ones, in "
                f"{duration(self.seconds)}: {self.throughput()}"
            )
        return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time span for people: two units of it are enough."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
