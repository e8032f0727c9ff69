"""How far a job is, as a bar and in a log."""

import io
import re
import sys

import pytest

from nanovllm.jobs.command import counts as counts_module
from nanovllm.jobs.command import job_progress as job_progress_module
from nanovllm.jobs.command.counts import Counts, duration
from nanovllm.jobs.command.job_progress import job_progress
from nanovllm.jobs.lines.line import Answer


class Clock:
    """Seconds, as somebody sets them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (job_progress_module, counts_module):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def answer_lines(counts: Counts, num_lines: int, error: str | None = None) -> None:
    for number in range(num_lines):
        counts.add(Answer(number, b"{}", error, prompt_tokens=100, completion_tokens=10))


def test_a_log_has_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    counts = Counts(num_lines_before=500)
    with job_progress(counts, lambda: 2000, is_shown=True) as report:
        for _ in range(100):
            clock.now += 0.5
            answer_lines(counts, 10)
            report()
            answer_lines(counts, 1 if counts.num_lines < 5 else 0, "invalid_json")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "run-batch: 1,100 of 2,000 lines, 0 failed, 2,000 tok/s in, 200 out, 45.0 s left",
    ]


def test_a_log_of_an_input_without_an_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    counts = Counts()
    with job_progress(counts, lambda: None, is_shown=True) as report:
        answer_lines(counts, 3, "model_error")
        clock.now += 31
        report()
    assert "run-batch: 3 lines, 3 failed" in capsys.readouterr().err


def test_a_bar_is_drawn_a_few_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    counts = Counts(num_lines_before=50, num_errors_before=1)
    total = 150
    with job_progress(counts, lambda: total, is_shown=True) as report:
        for _ in range(100):
            clock.now += 0.01
            answer_lines(counts, 1)
            report()
        total = 160
    drawn = re.split(r"[\r\n]+", screen.getvalue())
    assert 4 <= len([each for each in drawn if "lines" in each]) <= 10
    last = [each for each in drawn if "lines" in each][-1]
    assert "150/160" in last
    assert "failed=1" in last and "in=10,000tok/s" in last and "out=1,000tok/s" in last


def test_nothing_is_shown_to_who_wants_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with job_progress(Counts(), lambda: None, is_shown=False) as report:
        clock.now += 1000
        report()
    assert capsys.readouterr().err == ""


def test_spans_of_time() -> None:
    spans = [duration(seconds) for seconds in (0.44, 59.4, 60, 3599, 3600, 100_000)]
    assert spans == ["0.4 s", "59.4 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "27 h 46 min"]


def test_a_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    counts = Counts(num_lines_before=7, num_errors_before=2)
    answer_lines(counts, 8)
    answer_lines(counts, 2, "invalid_json")
    clock.now += 10
    assert counts.summary("out.jsonl").splitlines() == [
        "17 lines are answered in out.jsonl, 4 of them with an error",
        "  by earlier runs: 7, 2 of them with an error",
        "  invalid_json: 2",
        "  1,000 prompt tokens, 100 new ones, in 10.0 s: 100 tok/s in, 10 out",
    ]
