"""Jobs over a pool without a model: each line is answered once, however often a job is stopped."""

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_pool import FakePool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import DEMO_MODEL
from nanovllm.jobs.command import output as output_module
from nanovllm.jobs.command.batch_job import BatchJob
from nanovllm.jobs.command.cli import main, run_batch
from nanovllm.jobs.command.cluster_job import ClusterJob
from nanovllm.jobs.command.counts import Counts
from nanovllm.jobs.command.job_options import JobOptions, JobStopped, UsageError
from nanovllm.jobs.command.stop_signals import Interrupted, StopSignals
from nanovllm.jobs.lines.line import Answer

GOOD = b'{"prompt": "Hello"}'
BROKEN = b'{"prompt": '
BLANK = b"  "


def options_for(tmp_path: Path, **options: Any) -> JobOptions:
    return JobOptions(
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "out.jsonl"),
        model=DEMO_MODEL,
        engine={"device": "cpu", "max_model_len": 256},
        progress=False,
        **options,
    )


def write_input(tmp_path: Path, lines: list[bytes]) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))


def read_output(tmp_path: Path) -> list[dict[str, Any]]:
    data = (tmp_path / "out.jsonl").read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.splitlines()]


def number_of(answer: dict[str, Any]) -> int:
    return answer["line"] if "line" in answer else int(answer["id"].removeprefix("batch_req_"))


def numbers_in(tmp_path: Path) -> list[int]:
    return [number_of(answer) for answer in read_output(tmp_path)]


def run(options: JobOptions, pool: FakePool) -> Counts:
    with StopSignals() as signals:
        return BatchJob(options).run(signals, pool)


def test_a_job(tmp_path: Path) -> None:
    write_input(tmp_path, [GOOD, BROKEN, BLANK, GOOD, b'{"prompt": 5}', b"\xff", GOOD])
    pool = FakePool()
    counts = run(options_for(tmp_path, replicas=3), pool)
    assert pool.call is not None and pool.call["replicas"] == 3
    assert pool.call["model"] == DEMO_MODEL and pool.call["engine_options"]["device"] == "cpu"
    assert (pool.num_started, pool.num_closed) == (1, 1)
    assert sorted(numbers_in(tmp_path)) == [1, 2, 4, 5, 6, 7]
    assert numbers_in(tmp_path) != sorted(numbers_in(tmp_path))
    assert (counts.num_lines, counts.num_failed) == (6, 3)
    assert (counts.prompt_tokens, counts.completion_tokens) == (30, 6)
    # Again: nothing is left to do, so no engine is started.
    again = run(options_for(tmp_path), pool)
    assert pool.num_started == 1
    assert (again.num_answered, again.num_lines, again.num_failed) == (6, 0, 3)
    assert len(numbers_in(tmp_path)) == 6


def test_an_empty_input(tmp_path: Path) -> None:
    write_input(tmp_path, [])
    pool = FakePool()
    assert run(options_for(tmp_path), pool).num_answered == 0
    assert read_output(tmp_path) == [] and pool.num_started == 0


def raise_runtime_error() -> None:
    raise RuntimeError("all replicas are gone")


def fail_unexpectedly() -> None:
    raise AssertionError("something that cannot be")


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(
        st.sampled_from(
            [GOOD, BROKEN, BLANK]
            + [b'{"custom_id": "%d", "prompt": "a"}' % number for number in range(4)]
        ),
        max_size=40,
    ),
    stops=st.lists(
        st.tuples(
            st.integers(0, 15), st.sampled_from([raise_runtime_error, press_ctrl_c, terminate])
        ),
        max_size=3,
    ),
    in_order=st.booleans(),
    torn=st.integers(0, 30),
    retry=st.booleans(),
)
def test_whenever_it_is_stopped_nothing_is_lost_and_nothing_is_there_twice(
    tmp_path: Path,
    lines: list[bytes],
    stops: list[tuple[int, Callable[[], None]]],
    in_order: bool,
    torn: int,
    retry: bool,
) -> None:
    write_input(tmp_path, lines)
    output = tmp_path / "out.jsonl"
    output.unlink(missing_ok=True)
    options = options_for(tmp_path, in_order=in_order)
    for seed, (after, stop) in enumerate(stops):
        pool = FakePool(seed=seed, stop_after=after, stop=stop)
        try:
            run(replace(options, retry_errors=retry and seed > 0), pool)
        except (JobStopped, Interrupted):
            assert stop is raise_runtime_error or stop is press_ctrl_c or stop is terminate
        with output.open("ab") as file:  # as a kill -9 in the middle of a line would leave it
            file.write(b'{"line":1,"asked":{"prompt":"Hello"}}'[:torn])
    pool = FakePool(seed=99)
    counts = run(replace(options, retry_errors=retry), pool)
    answers = read_output(tmp_path)
    expected = [number for number, line in enumerate(lines, start=1) if line.strip()]
    numbers = [number_of(answer) for answer in answers]
    assert (numbers if in_order else sorted(numbers)) == expected
    first: dict[bytes, int] = {}
    failed = set()
    for number, line in enumerate(lines, start=1):
        is_repeated = b"custom_id" in line and first.setdefault(line, number) != number
        if line == BROKEN or is_repeated:
            failed.add(number)
    assert {number_of(answer) for answer in answers if "asked" not in answer} == failed
    assert counts.num_answered == len(expected) and counts.num_failed == len(failed)


def test_lines_with_errors_are_run_again_when_asked(tmp_path: Path) -> None:
    lines = [GOOD, BROKEN, GOOD, BROKEN, GOOD]
    write_input(tmp_path, lines)
    run(options_for(tmp_path, in_order=True), FakePool())
    size = (tmp_path / "in.jsonl").stat().st_size

    class NowFine(FakePool):
        """As if what was wrong had been the engine's fault."""

        def answer(self, line: Any) -> Answer:
            return super().answer(replace(line, data=GOOD))

    counts = run(options_for(tmp_path, in_order=True, retry_errors=True), NowFine())
    assert numbers_in(tmp_path) == [1, 2, 3, 4, 5]
    assert counts.num_failed == 0 and counts.num_lines == 2 and counts.num_answered == 5
    assert all(answer["asked"] == {"prompt": "Hello"} for answer in read_output(tmp_path))
    assert (tmp_path / "in.jsonl").stat().st_size == size


def test_ids_of_lines_that_were_answered_before_count(tmp_path: Path) -> None:
    line = b'{"custom_id": "a", "prompt": "b"}'
    write_input(tmp_path, [line, GOOD, line])
    with pytest.raises(JobStopped):
        run(
            options_for(tmp_path, in_order=True),
            FakePool(seed=3, stop_after=2, stop=raise_runtime_error),
        )
    assert numbers_in(tmp_path) in ([1], [1, 2])
    run(options_for(tmp_path, in_order=True), FakePool())
    assert numbers_in(tmp_path) == [1, 2, 3]
    assert "as line 1" in json.dumps(read_output(tmp_path)[2])


def test_shards_are_the_whole(tmp_path: Path) -> None:
    write_input(tmp_path, [GOOD] * 20)
    numbers: list[int] = []
    for index in (1, 2, 3):
        options = replace(
            options_for(tmp_path, shard=(index, 3)), output=str(tmp_path / f"{index}.jsonl")
        )
        run(options, FakePool())
        lines = (tmp_path / f"{index}.jsonl").read_bytes().splitlines()
        assert 6 <= len(lines) <= 7
        numbers += [json.loads(line)["line"] for line in lines]
    assert sorted(numbers) == list(range(1, 21))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"engine": {"device": "cpu", "max_model_len": 100}}, "max_model_len was 256, and is 100"),
        ({"defaults": {"temperature": 0}}, "temperature was null, and is 0"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs: x was null, and is 1"),
        ({"format": "batch"}, 'format was "auto", and is "batch"'),
        ({"in_order": True}, "in_order was false, and is true"),
        ({"shard": (1, 2)}, "shard was null, and is [1, 2]"),
    ],
)
def test_another_job_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write_input(tmp_path, [GOOD, GOOD])
    options = options_for(tmp_path)
    run(options, FakePool())
    with pytest.raises(UsageError, match=re.escape(message)):
        run(replace(options, **change), FakePool())
    assert len(numbers_in(tmp_path)) == 2
    run(replace(options, **change, overwrite=True), FakePool())
    expected = 1 if "shard" in change else 2
    assert len(numbers_in(tmp_path)) == expected
    # Options that change no answer may change between two runs.
    faster = {**change.get("engine", options.engine), "max_num_seqs": 3}
    run(replace(options, **{**change, "engine": faster}), FakePool())


def test_answers_beside_the_model_are_no_other_model(tmp_path: Path) -> None:
    write_input(tmp_path, [GOOD, GOOD])
    shutil.copytree(DEMO_MODEL, tmp_path, dirs_exist_ok=True)
    options = replace(options_for(tmp_path), model=str(tmp_path))
    run(options, FakePool())
    assert run(options, FakePool()).num_lines_before == 2


def test_another_input_is_refused(tmp_path: Path) -> None:
    write_input(tmp_path, [GOOD, GOOD])
    run(options_for(tmp_path), FakePool())
    write_input(tmp_path, [GOOD, BROKEN])
    with pytest.raises(UsageError, match="input: size was 39, and is 31"):
        run(options_for(tmp_path), FakePool())


def test_a_cluster_writes_no_answers_into_the_input(tmp_path: Path) -> None:
    write_input(tmp_path, [GOOD])
    for output in (tmp_path, tmp_path / "answers"):
        options = replace(options_for(tmp_path), input=str(tmp_path), output=str(output))
        with pytest.raises(UsageError, match="would be part of the input"):
            ClusterJob(replace(options, use_ray=True))


def test_an_input_that_ends_too_early_stops_the_job_after_what_there_is(tmp_path: Path) -> None:
    import gzip

    chooser = random.Random(0)
    data = b"".join(b'{"prompt": "%d"}\n' % chooser.randrange(10**9) for _ in range(5_000))
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(gzip.compress(data)[:-1000])
    options = replace(options_for(tmp_path), input=str(path))
    with pytest.raises(JobStopped, match="input cannot be read any further"):
        run(options, FakePool())
    numbers = sorted(numbers_in(tmp_path))
    assert numbers == list(range(1, len(numbers) + 1))
    assert 3_000 < len(numbers) < 5_000


@pytest.mark.parametrize(
    "defaults, message",
    [
        ({"temperature": -1}, "temperature must be at least 0"),
        ({"logit_bias": {"a": 1}}, "invalid literal for int"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"structured_outputs": {"json": "{"}}, "json"),
        ({"structured_outputs": {"jsn": "{}"}}, "jsn"),
    ],
)
def test_wrong_defaults_of_lines_are_found_first(
    tmp_path: Path, defaults: dict[str, Any], message: str
) -> None:
    write_input(tmp_path, [GOOD])
    with pytest.raises(UsageError, match=message):
        BatchJob(options_for(tmp_path, defaults=defaults))
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_defaults_of_lines(tmp_path: Path) -> None:
    write_input(tmp_path, [GOOD])
    defaults = {
        "structured_outputs": {"choice": ["a", "b"]},
        "logit_bias": {"5": 1},
        "max_tokens": None,
    }
    pool = FakePool()
    run(options_for(tmp_path, defaults=defaults), pool)
    assert pool.line_options is not None
    passed = pool.line_options.defaults
    assert passed["structured_outputs"].choice == ("a", "b")
    assert passed["logit_bias"] == {5: 1} and passed["max_tokens"] is None
    assert run(options_for(tmp_path, defaults=defaults), pool).num_answered == 1  # the same job


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines, stop, status",
    [
        ([GOOD] * 3, None, 0),
        ([GOOD, BROKEN], None, 1),
        ([GOOD] * 3, raise_runtime_error, 3),
        ([GOOD] * 3, fail_unexpectedly, 3),
        ([GOOD] * 3, press_ctrl_c, 130),
        ([GOOD] * 3, terminate, 143),
    ],
)
def test_exit_statuses(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    lines: list[bytes],
    stop: Callable[[], None] | None,
    status: int,
) -> None:
    write_input(tmp_path, lines)
    pool = FakePool(stop_after=None if stop is None else 1, stop=stop or (lambda: None))
    assert run_batch(options_for(tmp_path), make_pool=pool) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("The same command goes on from there." in captured.err) == (status > 1)
    num_lines = 1 if status > 1 else len(lines)
    assert f"{num_lines} lines are answered in {tmp_path}" in captured.err
    assert ("invalid_json: 1" in captured.err) == (status == 1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert pool.num_closed == 1


@contextmanager
def file_size_limit(directory: Path, num_bytes: int) -> Iterator[None]:
    """No file of this process may become larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def small_disk(directory: Path, num_bytes: int) -> Iterator[None]:
    """A disk of that size, which becomes larger afterwards. Only root can have it."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(directory)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield
    except BaseException:
        subprocess.run(["umount", str(directory)], check=True)
        raise
    larger = ["mount", "-o", "remount,size=10M", str(directory)]
    subprocess.run(larger, check=True)


@pytest.mark.parametrize("is_full", [file_size_limit, small_disk])
@pytest.mark.parametrize("in_order", [False, True])
def test_a_job_goes_on_when_the_disk_has_room_again(
    tmp_path: Path, in_order: bool, is_full: Callable[[Path, int], Any]
) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    write_input(tmp_path, [GOOD] * 1500)
    output = directory / "out.jsonl"
    options = replace(options_for(tmp_path, in_order=in_order), output=str(output))
    try:
        with (
            is_full(directory, 40_000),
            pytest.raises(JobStopped, match="make room|cannot be larger"),
        ):
            run(options, FakePool())
        written = output.read_bytes()
        assert 30_000 < len(written) <= 40_000 and written.endswith(b"}\n")
        counts = run(options, FakePool(seed=1))
        assert counts.num_lines_before == written.count(b"\n")
        assert output.read_bytes().startswith(written)
        numbers = [json.loads(line)["line"] for line in output.read_bytes().splitlines()]
        assert (numbers if in_order else sorted(numbers)) == list(range(1, 1501))
    finally:
        if os.path.ismount(directory):
            subprocess.run(["umount", str(directory)], check=True)


def test_answers_that_the_disk_does_not_keep_are_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_input(tmp_path, [GOOD] * 3)
    sync = os.fsync

    def fail(fd: int) -> None:
        if os.path.samestat(os.fstat(fd), os.stat(tmp_path / "out.jsonl")):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        sync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(output_module.os, "fsync", fail)
        assert run_batch(options_for(tmp_path), make_pool=FakePool()) == 3
    assert "the quota is used up" in capsys.readouterr().err
    assert run_batch(options_for(tmp_path), make_pool=FakePool()) == 0


@pytest.mark.parametrize("error, status", [(ValueError, 2), (MemoryError, 3), (RuntimeError, 3)])
def test_an_engine_that_cannot_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: type[Exception], status: int
) -> None:
    def fail(model: str, **options: Any) -> FakePool:
        raise error("there is not enough memory")

    write_input(tmp_path, [GOOD])
    options = options_for(tmp_path, overwrite=True)
    assert run_batch(options, make_pool=fail) == status
    said = capsys.readouterr().err
    assert "there is not enough memory" in said
    assert ("command without --overwrite goes on" in said) == (status == 3)
    assert run_batch(options_for(tmp_path), make_pool=FakePool()) == 0


def test_a_full_device_stops_the_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_input(tmp_path, [GOOD] * 3)
    options = replace(options_for(tmp_path), output="/dev/full")
    assert run_batch(options, make_pool=FakePool()) == 3
    said = capsys.readouterr().err
    assert "the disk is full: make room" in said and "0 lines are answered" in said
    assert "cannot be gone on with" in said


def test_the_second_ctrl_c_ends_a_job_that_hangs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hanging(FakePool):
        def __exit__(self, *error: object) -> None:
            press_ctrl_c()

    write_input(tmp_path, [GOOD] * 3)
    pool = Hanging(stop_after=1, stop=press_ctrl_c)
    assert run_batch(options_for(tmp_path), make_pool=pool) == 130
    assert "stopped at once" in capsys.readouterr().err
    assert len(numbers_in(tmp_path)) == 1


TO_STDOUT = """
import sys
from dataclasses import replace
from fake_pool import FakePool
from nanovllm.jobs.command.cli import main, run_batch
from nanovllm.jobs.command.job_options import JobOptions

class Noisy(FakePool):
    def answer(self, line):
        print("a library says something")
        return super().answer(line)

options = JobOptions("-", "-", sys.argv[1], {"device": "cpu"}, in_order=True)
sys.exit(run_batch(options, make_pool=Noisy()))
"""


def test_answers_to_stdout_are_all_that_is_there() -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    result = subprocess.run(
        [sys.executable, "-c", TO_STDOUT, DEMO_MODEL],
        input=b"\n".join([GOOD, BROKEN, GOOD]),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    assert result.returncode == 1, result.stderr
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [number_of(answer) for answer in answers] == [1, 2, 3]
    assert result.stderr.count(b"a library says something") == 3
    assert b"3 lines are answered in standard output, 1 of them with an error" in result.stderr


WRONG = [
    (["--max-num-seq", "3"], "unknown option --max-num-seq; did you mean --max-num-seqs?"),
    (["--inorder"], "unknown option --inorder; did you mean --in-order?"),
    (["--temprature=0"], "unknown option --temprature; did you mean --temperature?"),
    (["more"], "unexpected argument 'more'"),
    (["--max_num_seqs", "x"], "must be an integer, not 'x'"),
    (["--shard", "3/2"], "must be I/N with I from 1 to N"),
    (["--chat-template-kwargs", "[]"], "must be a JSON object, not '[]'"),
    (["--replicas", "0"], "must be a number from 1 on, or auto"),
    (["--format", "xml"], "invalid choice: 'xml'"),
    (["-i", "missing.jsonl"], "there is no input 'missing.jsonl'"),
    (["-o", "missing/out.jsonl"], "there is no directory"),
    (["-o", "."], "is a directory"),
]


def command(arguments: list[str]) -> list[str]:
    job = ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl", "--model", DEMO_MODEL]
    return [*job, *arguments]


def status_of(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)


@pytest.mark.parametrize("arguments, message", WRONG)
def test_what_is_wrong_with_a_command_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").touch()
    assert status_of(command(arguments)) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["in.jsonl"]


@pytest.mark.parametrize("name", ["-i", "-o", "--model"])
def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words = command([])
    place = words.index(name)
    assert status_of(words[:place] + words[place + 2 :]) == 2
    assert f"{name} is missing" in capsys.readouterr().err


WITHOUT_TORCH = """
import json, sys
from nanovllm.jobs.command.cli import main
for arguments in json.loads(sys.stdin.read()):
    try:
        main(arguments)
    except SystemExit:
        pass
    assert "torch" not in sys.modules, arguments
"""


def test_none_of_that_takes_pytorch(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").touch()
    cases = [command(arguments) for arguments, _ in WRONG] + [["--help"], ["run-batch", "--help"]]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert result.returncode == 0, result.stderr
    assert "--max-num-seqs N" in result.stdout and "exit status:" in result.stdout
