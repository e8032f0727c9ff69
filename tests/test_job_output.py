"""The output of a job: what is written stays, what is torn goes, and no other process writes."""

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from nanovllm.jobs.command import output as output_module
from nanovllm.jobs.command.output import (
    REWRITTEN,
    OutputError,
    OutputFile,
    Stream,
    check_output,
    open_output,
)


def line(number: int, is_error: bool = False) -> bytes:
    """An answer in the plain form, whose text varies in length."""
    error = b'"error":{},' if is_error else b""
    return b'{"line":%d,%s"text":"%s"}' % (number, error, b"x" * (number % 5))


def write(path: Path, lines: Iterable[bytes]) -> None:
    path.write_bytes(b"".join(each + b"\n" for each in lines))


def open_file(path: Path) -> OutputFile:
    output = open_output(str(path))
    assert isinstance(output, OutputFile)
    return output


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    output = open_file(path)
    assert output.is_empty
    for number in (3, 1, 2):
        output.write(line(number, is_error=number == 1))
    output.close()
    output = open_file(path)
    finished = output.read_back()
    assert not output.is_empty
    assert [number in finished.numbers for number in range(5)] == [False, True, True, True, False]
    assert len(finished.numbers) == 3 and finished.num_errors == 1 and finished.last_number == 3
    assert not finished.is_in_order
    output.write(line(9))
    output.close()
    assert path.read_bytes().splitlines() == [line(3), line(1, True), line(2), line(9)]


def test_whatever_byte_it_was_cut_at_all_whole_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    lines = [line(number) for number in (1, 2, 3)]
    whole = b"".join(each + b"\n" for each in lines)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        output = open_file(path)
        finished = output.read_back()
        output.write(line(7))
        output.close()
        num_whole = whole[:cut].count(b"\n")
        assert len(finished.numbers) == num_whole
        assert path.read_bytes().splitlines() == [*lines[:num_whole], line(7)]


def test_a_line_of_another_program_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, [line(1), b'{"name": "no answer"}', line(2)])
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"line 2 of .*no answer of a job.*--overwrite"):
        open_file(path).read_back()
    assert path.read_bytes() == before


def test_errors_that_are_tried_again_leave_the_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.touch(0o640)
    write(path, [line(1), line(2, True), line(3), line(4, True)])
    (tmp_path / ("out.jsonl" + REWRITTEN)).write_bytes(b"of a process that was killed")
    output = open_file(path)
    finished = output.read_back(retry_errors=True)
    assert path.read_bytes().splitlines() == [line(1), line(3)]
    assert [number in finished.numbers for number in (1, 2, 3, 4)] == [True, False, True, False]
    assert finished.num_errors == 0 and finished.is_in_order
    assert path.stat().st_mode & 0o777 == 0o640
    output.write(line(2))  # to the new file, which is locked like the old one
    with pytest.raises(OutputError, match="another process writes"):
        open_output(str(path))
    output.close()
    assert path.read_bytes().splitlines() == [line(1), line(3), line(2)]
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_rewriting_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    write(path, [line(1), line(2, True), line(3)])
    before = path.read_bytes()
    output = open_file(path)

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_module.os, "fsync", fail)
    with pytest.raises(OutputError, match="disk is full"):
        output.read_back(retry_errors=True)
    output.close()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_parts_that_are_in_order_are_merged(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, [line(number) for number in (2, 5, 9, 1, 6, 10, 3, 4)])
    output = open_file(path)
    assert not output.read_back().is_in_order
    output.put_in_order()
    output.write(line(11))
    output.close()
    numbers = (1, 2, 3, 4, 5, 6, 9, 10, 11)
    assert path.read_bytes().splitlines() == [line(number) for number in numbers]


def test_a_second_process_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = open_file(path)
    code = f"from nanovllm.jobs.command.output import open_output; open_output({str(path)!r})"
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 1 and "another process writes" in second.stderr
    first.close()
    open_file(path).close()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target.jsonl"
    write(target, [line(1, True), line(2)])
    link = tmp_path / "link.jsonl"
    link.symlink_to(target)
    output = open_file(link)
    output.read_back(retry_errors=True)
    output.close()
    assert link.is_symlink() and target.read_bytes().splitlines() == [line(2)]


# --- disks that are full --------------------------------------------------------------------------

LIMITED = """
import resource, signal, sys
from nanovllm.jobs.command.output import OutputError, open_output
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
output = open_output(sys.argv[1])
for number in range(1, 100):
    try:
        output.write(b'{"line":%d,"error":false,"text":"%s"}' % (number, b"x" * 60))
    except OutputError as error:
        print(number - 1, error)
        break
"""


def test_a_line_for_which_there_is_no_room_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    command = [sys.executable, "-c", LIMITED, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    num_written, _, message = result.stdout.partition(" ")
    assert "cannot be larger" in message
    assert path.stat().st_size < 1000  # the system has written a part of the next line
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == int(num_written) > 5
    assert all(each.endswith(b"}\n") for each in lines)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_full_device() -> None:
    output = open_output("/dev/full")
    assert not isinstance(output, OutputFile)
    with pytest.raises(OutputError, match="the disk is full: make room"):
        output.write(b"{}")
    output.close()


def test_a_pipe_gets_whole_lines_and_says_when_nobody_reads_it() -> None:
    reading, writing = os.pipe()
    stream = Stream(writing, "a pipe")
    stream.write(b"{}")
    assert os.read(reading, 10) == b"{}\n"
    os.close(reading)
    with pytest.raises(OutputError, match="its reader has gone"):
        stream.write(b"{}")
    stream.close()


# --- outputs that are none ------------------------------------------------------------------------


def test_outputs_that_cannot_be_written_are_named_beforehand(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.touch()
    (tmp_path / "link.jsonl").symlink_to(source)
    for name, message in [
        ("missing/out.jsonl", "there is no directory"),
        (".", "is a directory"),
        ("in.jsonl", "is the input"),
        ("link.jsonl", "is the input"),
        ("out.jsonl.gz", "name it .jsonl"),
    ]:
        with pytest.raises(OutputError, match=message):
            check_output(str(tmp_path / name), str(source))
    for path in ("-", "/dev/null", str(tmp_path / "out.jsonl")):
        check_output(path, str(source))
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "link.jsonl"]


def test_an_output_that_would_become_input_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    (source / "deeper").mkdir(parents=True)
    (tmp_path / "link.jsonl").symlink_to(source / "out.jsonl")
    for name in ("in/out.jsonl", "in/deeper/../out.jsonl", "link.jsonl"):
        with pytest.raises(OutputError, match="would be part of the input"):
            check_output(str(tmp_path / name), str(source))
    for name in ("out.jsonl", "in/deeper/out.jsonl"):
        check_output(str(tmp_path / name), str(source))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.touch(0o400)
    with pytest.raises(OutputError, match="may not be changed"):
        check_output(str(path), "-")
