"""A replica as the main process sees it: a process with an engine, and the pipe to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from nanovllm.jobs.replicas.replica_process import Lines

# A new interpreter that runs none of the main script's code, so that the script needs no
# `if __name__ == "__main__"` and may come from stdin. It finds modules where this process does.
BOOTSTRAP = """\
import sys
from multiprocessing.connection import Connection
link = Connection(int(sys.argv[1]))
sys.path[:] = link.recv()
from nanovllm.jobs.replicas.replica_process import serve
serve(link, link.recv_bytes())
"""
STDERR = 2


class Replica:
    """A process that starts now. Its pipe is at its end as soon as the process is."""

    def __init__(self, order_bytes: bytes, environment: dict[str, str]) -> None:
        self.link, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOTSTRAP, str(theirs.fileno())],
                env={**os.environ, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,  # that of this process may be the job's input
                stdout=STDERR,  # and its stdout the job's output
                start_new_session=True,  # so the terminal sends it no Ctrl-C
            )
        with suppress(OSError):  # it has ended already, which is found out when it is read from
            self.link.send(sys.path)
            self.link.send_bytes(order_bytes)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        """Whether its process has."""
        return self.process.poll() is not None

    def send(self, lines: Lines) -> None:
        """Send lines; if it has ended they are lost, which is found out when it is read from."""
        with suppress(OSError):
            self.link.send(lines)

    def receive(self) -> Any:
        """Its next message, `Ready`, `Failed` or `Answers`. Raises EOFError if it has ended."""
        try:
            return self.link.recv()
        except OSError as error:  # it has ended in the middle of a message
            raise EOFError from error

    def hang_up(self) -> None:
        """Tell it to end."""
        self.link.close()

    def end(self, timeout: float = 0.0) -> str:
        """Wait until it has ended, kill it after a timeout in seconds; returns how it ended."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.link.close()
        code = self.process.returncode
        if code < 0:
            with suppress(ValueError):
                return f"signal {signal.Signals(-code).name}"
        return f"exit code {code}"
