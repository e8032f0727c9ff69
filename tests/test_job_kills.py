"""`run-batch` with real engines, ended again and again: nothing is lost, nothing is there twice,
and each answer is the one of a job that nobody has ended.

NANOVLLM_KILL_MOMENTS says how often it is ended (2): at random, each time in another way.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nanovllm import DEMO_MODEL
from nanovllm.jobs.async_llm import AsyncLLM
from nanovllm.jobs.command.lines_to_run import LinesToRun
from nanovllm.jobs.command.numbers import NumberSet
from nanovllm.jobs.lines.line import Answer
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_worker import LineWorker
from nanovllm.jobs.sources.readers import open_input

NUM_MOMENTS = int(os.environ.get("NANOVLLM_KILL_MOMENTS", "2"))
LINES_PER_MOMENT = 100
ROOT = Path(__file__).parents[1]
WAYS = ("kill the job", "kill a replica", "Ctrl-C", "SIGTERM")
SECONDS = 120.0  # after which something hangs
OPTIONS = {"max_model_len": 128, "max_num_seqs": 8, "device": "cpu"}

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc")


def make_line(number: int) -> bytes:
    """Most lines are good; some are wrong, each in its own way."""
    if number % 20 == 7:
        return b'{"prompt": '
    if number % 20 == 11:
        return b""
    if number % 20 == 13:
        return json.dumps({"prompt": "much too long " * 200}).encode()
    custom_id = f"line {number - 1 if number % 20 == 17 else number}"  # one is used twice
    line = {"custom_id": custom_id, "prompt": f"Count from {number}", "max_tokens": 24}
    if number % 2:
        line["temperature"] = 0
    return json.dumps(line).encode()


def children_of(pid: int) -> list[int]:
    """Process ids of the processes that a process has started."""
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            try:
                stat = (directory / "stat").read_text()
            except OSError:
                continue  # it has ended meanwhile
            if int(stat.rpartition(")")[2].split()[1]) == pid:
                found.append(int(directory.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(is_so: Any, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"{what}: not after {SECONDS} seconds"
        time.sleep(0.02)


class Job:
    """A command in a directory, which is started as often as it takes."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.output = directory / "out.jsonl"
        self.directory = directory
        self.command = [
            *(sys.executable, "-m", "nanovllm", "run-batch", "-i", "in.jsonl", "-o", "out.jsonl"),
            *("--model", DEMO_MODEL, "--no-progress", *options),
        ]
        for name, value in OPTIONS.items():
            self.command += [f"--{name}", str(value)]

    def start(self) -> "subprocess.Popen[bytes]":
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self.directory / "stderr.txt").open("ab") as file:
            return subprocess.Popen(
                self.command, cwd=self.directory, env=environment, stderr=file, stdout=file
            )

    def num_lines(self) -> int:
        return self.output.read_bytes().count(b"\n") if self.output.exists() else 0

    def said(self) -> str:
        return (self.directory / "stderr.txt").read_text()


def number_of(answer: dict[str, Any]) -> int:
    return answer["line"] if "line" in answer else int(answer["id"].removeprefix("batch_req_"))


def end_in_a_way(job: Job, way: str, chooser: random.Random) -> bool:
    """Start the job, and end it (or a replica of it, and then the job) at a random moment. Returns
    whether there was anything left to end.
    """
    process = job.start()

    def wait_for(num_lines: int) -> None:
        wait_until(
            lambda: job.num_lines() >= num_lines or process.poll() is not None, "answers come"
        )

    # One in four moments is in the seconds in which the engine starts.
    if chooser.random() < 0.25:
        time.sleep(chooser.uniform(0.5, 5))
    else:
        wait_for(job.num_lines() + chooser.randrange(1, LINES_PER_MOMENT // 2))
    replicas = children_of(process.pid)
    is_ended = process.poll() is not None
    if way == "kill a replica" and replicas:
        os.kill(chooser.choice(replicas), signal.SIGKILL)
        wait_for(job.num_lines() + chooser.randrange(1, LINES_PER_MOMENT // 2))  # it goes on
        replicas = [*replicas, *children_of(process.pid)]
    number = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}.get(way, signal.SIGKILL)
    process.send_signal(number)
    status = process.wait(SECONDS)
    if status == 3:  # the replica was killed before its engine had started, which stops the job
        assert way == "kill a replica" and "SIGKILL while its engine started" in job.said()
    elif number == signal.SIGKILL:
        assert status in (-number, 1), (status, job.said())
    else:
        assert status in (128 + number, 1), (status, job.said())
    wait_until(lambda: not any(map(is_running, replicas)), f"after {way} the replicas end")
    return not is_ended


def test_a_job_that_is_ended_again_and_again(tmp_path: Path) -> None:
    chooser = random.Random(NUM_MOMENTS)
    lines = [make_line(number) for number in range(1, (NUM_MOMENTS + 1) * LINES_PER_MOMENT)]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    job = Job(tmp_path, "--in-order", "--replicas", "2" if NUM_MOMENTS > 2 else "1")
    was_running = [
        end_in_a_way(job, WAYS[moment % len(WAYS)], chooser) for moment in range(NUM_MOMENTS)
    ]
    assert all(was_running), f"more lines are needed: {was_running}"
    last = job.start()
    assert last.wait(SECONDS) == 1, job.said()
    answers = [json.loads(line) for line in job.output.read_bytes().splitlines()]
    expected = [number for number, line in enumerate(lines, start=1) if line]
    assert [number_of(answer) for answer in answers] == expected
    check_answers(tmp_path / "in.jsonl", {number_of(answer): answer for answer in answers})


def check_answers(path: Path, answers: dict[int, Any]) -> None:
    """Compare with the answers of an engine in this process, which nobody ends."""
    expected: list[Answer] = []
    options = LineOptions(DEMO_MODEL, seed=0)
    lines = list(LinesToRun(open_input(str(path)), NumberSet(), lambda number: None))
    with AsyncLLM(DEMO_MODEL, **{**OPTIONS, "max_num_seqs": 256}) as llm:
        worker = LineWorker(llm, options)
        for line in lines:
            worker.submit(line, expected.append)
        wait_until(lambda: len(expected) == len(lines), "the expected answers")
    for answer in expected:
        assert answers[answer.number] == json.loads(answer.data)
