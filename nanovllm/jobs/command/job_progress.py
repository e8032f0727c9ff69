"""How far a job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import monotonic

from nanovllm.jobs.command.counts import Counts, duration

BAR_SECONDS = 0.25  # between two drawings
LOG_SECONDS = 30.0  # between two lines

# To be called after each answer: it looks at the clock, and little more.
Report = Callable[[], None]
Total = Callable[[], "int | None"]  # how many lines there are, which may become known on the way


@contextmanager
def job_progress(counts: Counts, total: Total, is_shown: bool) -> Iterator[Report]:
    """Show on stderr what `counts` says."""
    if not is_shown:
        yield lambda: None
    elif sys.stderr.isatty():
        with bar(counts, total) as report:
            yield report
    else:
        yield at_intervals(LOG_SECONDS, lambda: log_line(counts, total()))


@contextmanager
def bar(counts: Counts, total: Total) -> Iterator[Report]:
    """Draw tqdm's bar, which works out the time left."""
    from nanovllm.progress import progress_bar  # here, as a mistyped command needs none

    shown = counts.num_answered
    with progress_bar(
        total=total(), initial=shown, unit=" lines", dynamic_ncols=True, mininterval=0
    ) as update:

        def draw() -> None:
            nonlocal shown
            beside = {
                "failed": f"{counts.num_failed:,}",
                "in": f"{counts.prompt_tokens_per_second:,.0f}tok/s",
                "out": f"{counts.completion_tokens_per_second:,.0f}tok/s",
            }
            update(counts.num_answered - shown, beside, total())
            shown = counts.num_answered

        yield at_intervals(BAR_SECONDS, draw)
        draw()


def log_line(counts: Counts, total: int | None) -> None:
    """Print a line, if anybody reads it."""
    done = f"{counts.num_answered:,}"
    left = ""
    if total is not None:
        done += f" of {total:,}"
        num_left = max(total - counts.num_answered, 0)
        left = f", {duration(num_left * counts.seconds / max(counts.num_lines, 1))} left"
    with suppress(OSError, ValueError):  # stderr may be closed
        print(
            f"run-batch: {done} lines, {counts.num_failed:,} failed, {counts.throughput()}{left}",
            file=sys.stderr,
            flush=True,
        )


def at_intervals(seconds: float, action: Callable[[], None]) -> Report:
    """A function that calls `action` when so much time has passed since it last did."""
    last = monotonic()

    def report() -> None:
        nonlocal last
        now = monotonic()
        if now - last >= seconds:
            last = now
            action()

    return report
