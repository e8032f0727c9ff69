"""Workers of replicas without an engine: what a line says is what happens."""

import ctypes
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from nanovllm.jobs.lines.line import Answer, Line


class FakeWorker:
    """Answers with the line's number and its own process id.

    A line is {"prompt": ..., "do": ...}; `do` is one of

    "exit", "segfault", "raise"   the process ends so
    "break"                       the engine ends with a RuntimeError
    "fail"                        a step fails, with all lines that are in it
    "wait"                        for ever
    "refuse"                      an error line

    options: `delay`, in seconds, from a line to its answer; `start`, which is `do` at the start;
    `max_num_seqs`; `log`, a file to which the number of each line is appended when it is run.
    """

    def __init__(self, model: str, engine_options: dict[str, Any], line_options: Any) -> None:
        self.options = engine_options
        self.max_num_seqs = engine_options.get("max_num_seqs", 8)
        self.failure: BaseException | None = None
        self.running: list[tuple[Line, Callable[[Answer], None]]] = []
        self.lock = threading.Lock()
        self.wake = threading.Condition(self.lock)
        start = engine_options.get("start")
        if start is not None and not os.path.exists(start.get("unless", "")):
            self.start(start)
        threading.Thread(target=self.run_steps, daemon=True).start()

    def start(self, start: dict[str, Any]) -> None:
        if start["do"] == "raise":
            raise ValueError(start["message"])
        if start["do"] == "raise odd":
            raise OddError("one", "two")
        if start["do"] == "exit":
            os._exit(7)
        time.sleep(60)

    def submit(self, line: Line, done: Callable[[Answer], None]) -> None:
        if "log" in self.options:
            with open(self.options["log"], "a") as log:
                log.write(f"{line.number}\n")
        with self.lock:
            self.running.append((line, done))
            self.wake.notify()

    def run_steps(self) -> None:
        """As an engine does: all lines that are there, together."""
        while True:
            with self.lock:
                while not self.running:
                    self.wake.wait()
                batch, self.running = (
                    self.running[: self.max_num_seqs],
                    self.running[self.max_num_seqs :],
                )
            time.sleep(self.options.get("delay", 0.0))
            self.run_step(batch)

    def run_step(self, batch: list[tuple[Line, Callable[[Answer], None]]]) -> None:
        to_do = {json.loads(line.data).get("do") for line, _ in batch}
        if "exit" in to_do:
            os._exit(3)
        if "segfault" in to_do:
            ctypes.string_at(0)
        if "wait" in to_do:
            time.sleep(1000)
        if "break" in to_do:
            self.failure = RuntimeError("a rank has failed")
        for line, done in batch:
            error = None
            if to_do & {"break", "fail"}:
                error = "engine_failed"
            elif json.loads(line.data).get("do") == "refuse":
                error = "refused"
            body: dict[str, Any] = {"line": line.number, "pid": os.getpid()}
            if error is not None:
                body["error"] = {"message": f"{error}, says a fake"}
            done(Answer(line.number, json.dumps(body).encode(), error))

    def close(self) -> None:
        pass


class OddError(Exception):
    """Its second argument is not kept by `Exception`, so that it cannot be unpickled."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first)
