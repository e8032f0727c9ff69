"""Where the answers of a job go: a file that a killed job can be continued in, or a stream.

A file is only ever appended to, a whole line with one call of the operating system, so that killing
the process loses no line that was written, and spoils at most the last one. The file itself says
which lines are done: each answer has its line's number in it.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from nanovllm.jobs.command.numbers import NumberSet
from nanovllm.jobs.lines.answers import answered

BUFFER = 1 << 20  # bytes that are read at a time
REWRITTEN = ".rewritten"  # ends the name of what is to take the output's place
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".parquet")
NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)  # on some file systems
REMEDIES = {
    errno.ENOSPC: "; the disk is full: make room, or move the file elsewhere",
    errno.EDQUOT: "; the quota is used up: make room, or move the file elsewhere",
    errno.EFBIG: "; files here cannot be larger: split the input (--shard), or write elsewhere",
    errno.EPIPE: "; its reader has gone",
}


class OutputError(Exception):
    """Why answers cannot be written, or not there, in a sentence for the user."""


@dataclass(slots=True)
class Finished:
    """What an output holds of earlier runs."""

    numbers: NumberSet = field(default_factory=NumberSet)  # of lines that are not to be run again
    num_errors: int = 0  # how many of them are errors
    last_number: int = 0  # the largest
    is_in_order: bool = True  # whether their numbers only ever increase


@dataclass(slots=True)
class OutputLine:
    """A line of an output, which is an answer."""

    line: bytes  # with its end
    number: int  # of the input's line that it answers
    is_error: bool


class Stream:
    """Answers to standard output, a pipe or a device: nothing is read back, so nothing resumes."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd

    def write(self, data: bytes) -> None:
        """Write an answer and the end of its line, or raise an OutputError."""
        line = memoryview(data + b"\n")
        while line:
            try:
                line = line[os.write(self._fd, line) :]
            except OSError as error:
                self.undo()
                raise OutputError(explain(self.name, error)) from error

    def undo(self) -> None:
        """Take the beginning of a line back. Here it is gone."""

    def sync(self) -> None:
        """Have the disk hold what was written. Here there is none."""

    def close(self) -> None:
        """Write no more."""
        with suppress(OSError):
            os.close(self._fd)


class OutputFile(Stream):
    """Answers in a file, which this process alone has until `close`."""

    def __init__(self, path: str) -> None:
        super().__init__(open_alone(path), path)
        self._end = os.fstat(self._fd).st_size  # of the last whole line
        with suppress(FileNotFoundError):
            os.unlink(path + REWRITTEN)  # of a job that was killed while it rewrote the file

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing that could be lost."""
        return self._end == 0

    def write(self, data: bytes) -> None:
        """Append an answer and the end of its line, or raise an OutputError."""
        super().write(data)
        self._end += len(data) + 1

    def undo(self) -> None:
        """Cut off the beginning of a line, which a full disk may leave."""
        with suppress(OSError):
            os.ftruncate(self._fd, self._end)

    def clear(self) -> None:
        """Drop all that is there."""
        os.ftruncate(self._fd, 0)
        self._end = 0

    def read_back(self, retry_errors: bool = False) -> Finished:
        """Find out which lines are done, and cut off the beginning of a line at the end.

        retry_errors: whether lines that were answered with an error are to be run again, and so
            leave the file.

        Raises:
            OutputError: if there is a line that is no answer.
        """
        finished = Finished()
        num_dropped = 0
        end = 0
        for answer in self._read_lines():
            end += len(answer.line)
            if answer.is_error and retry_errors:
                num_dropped += 1
                continue
            finished.numbers.add(answer.number)
            finished.num_errors += answer.is_error
            finished.is_in_order = finished.is_in_order and answer.number > finished.last_number
            finished.last_number = max(finished.last_number, answer.number)
        os.ftruncate(self._fd, end)
        self._end = end
        if num_dropped:
            self.rewrite(answer.line for answer in self._read_lines() if not answer.is_error)
        return finished

    def put_in_order(self) -> None:
        """Sort the answers by their lines' numbers, in constant memory.

        The file must consist of a few parts that are in order, as it does when some of its lines
        were run again: their answers are the second part.
        """
        parts: list[Iterator[OutputLine]] = []
        last_number = 0
        start = 0  # of the part that is being looked through
        end = 0
        for answer in self._read_lines():
            if answer.number < last_number:
                parts.append(self._read_lines(start, end))
                start = end
            last_number = answer.number
            end += len(answer.line)
        parts.append(self._read_lines(start, end))
        by_number = heapq.merge(*parts, key=lambda answer: answer.number)
        self.rewrite(answer.line for answer in by_number)

    def rewrite(self, lines: Iterator[bytes]) -> None:
        """Have the file hold these lines, each with its end, instead. If the process is killed, or
        the disk is full, the file is as it was, or as it is to be.
        """
        path = self.name + REWRITTEN
        try:
            fd = open_alone(path)
            with open(fd, "wb", buffering=BUFFER, closefd=False) as file:
                file.writelines(lines)
                file.flush()
                os.fchmod(fd, stat.S_IMODE(os.fstat(self._fd).st_mode))
                os.fsync(fd)
            os.replace(path, self.name)
        except OSError as error:
            with suppress(OSError):
                os.unlink(path)
            raise OutputError(explain(path, error)) from error
        os.close(self._fd)
        self._fd = fd
        self._end = os.fstat(fd).st_size

    def sync(self) -> None:
        """Have the disk hold what was written, or raise an OutputError: a file of another machine
        may be without room, or lost, and only this call says so.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in NO_SUCH_CALL:
                raise OutputError(explain(self.name, error)) from error

    def close(self) -> None:
        """Have the disk hold what was written, and let other processes have the file."""
        with suppress(OutputError):  # a job that ends well has called it before
            self.sync()
        super().close()

    def _read_lines(self, start: int = 0, end: int | None = None) -> Iterator[OutputLine]:
        """The lines from byte `start` to byte `end`, or to the last one that ends. Raises an
        OutputError for one that is no answer, which `read_back` finds.
        """
        position = start
        with open(self.name, "rb", buffering=BUFFER) as file:
            file.seek(start)
            for row, line in enumerate(file, start=1):
                if position == end or not line.endswith(b"\n"):
                    return
                position += len(line)
                answer = answered(line[:-1])
                if answer is None:
                    raise OutputError(
                        f"line {row} of {self.name!r} is no answer of a job: {line[:60]!r}; remove "
                        "it, pass --overwrite to begin anew, or write to another file (-o)"
                    )
                number, is_error = answer
                yield OutputLine(line, number, is_error)


def check_output(path: str, source: str) -> None:
    """Raise an OutputError if no answers can be written to a path, and change nothing there.

    source: of the input, which must be another file.
    """
    if path == "-":
        return
    if path.endswith(COMPRESSED):
        raise OutputError(
            f"the output is JSON lines, but {path!r} is named as if it were not; name it .jsonl, "
            "or compress it on the way: -o - | gzip > ..."
        )
    directory = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(directory):
        raise OutputError(f"there is no directory {directory!r} for the output; make it first")
    if os.path.isdir(path):
        raise OutputError(f"the output {path!r} is a directory; name a file in it")
    check_apart(path, source)
    if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
        raise OutputError(f"the output {path!r} is the input; write to another file")
    places = [path] if os.path.exists(path) else []
    if not places or os.path.isfile(path):  # beside a pipe or a device nothing is made
        places.append(directory)
    for place in places:
        if not os.access(place, os.W_OK):
            raise OutputError(f"cannot write {path!r}: {place!r} may not be changed by this user")


def check_apart(path: str, source: str) -> None:
    """Raise an OutputError if the input is a directory, and the output or its manifest in it: they
    would be read as lines when the job goes on, and answered, and their answers, too.
    """
    output = os.path.realpath(path)
    if os.path.isdir(source) and os.path.realpath(source) in (output, os.path.dirname(output)):
        raise OutputError(
            f"the output {path!r} would be part of the input {source!r}; write to another directory"
        )


def open_output(path: str) -> OutputFile | Stream:
    """Open the output of a job; `-` is standard output, to which then nothing else is written.

    Raises:
        OutputError: if no answers can be written there.
    """
    try:
        if path == "-":
            fd = os.dup(1)
            os.dup2(2, 1)  # whatever else this process prints must not come between the answers
            return Stream(fd, "standard output")
        path = os.path.realpath(path)  # a link stays a link when the file behind it is rewritten
        if os.path.exists(path) and not os.path.isfile(path):
            return Stream(os.open(path, os.O_WRONLY), path)  # a pipe or a device
        return OutputFile(path)
    except OSError as error:
        raise OutputError(explain(path, error)) from error


def open_alone(path: str) -> int:
    """Open a file to append to, and lock it until it is closed; return the file descriptor.

    Raises:
        OutputError: if another process has it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        lock(fd, path)
        # Between the two calls another process may have put a new file into the place of this one.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


def open_directory_alone(path: str) -> int:
    """The same of a directory, which is made if need be; nothing is written to the descriptor."""
    os.makedirs(path, exist_ok=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    lock(fd, path)
    return fd


def lock(fd: int, path: str) -> None:
    """Have no other process lock a file until it is closed.

    Raises:
        OutputError: if another process has locked it. `fd` is closed then.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # some file systems have no locks, and a job must be able to run there
        os.close(fd)
        raise OutputError(
            f"another process writes {path!r}; wait for it, end it, or pass another -o"
        ) from error


def explain(path: str, error: OSError) -> str:
    """Why a file cannot be written, and what to do."""
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"cannot write {path!r}: {error.strerror}{remedy}"
