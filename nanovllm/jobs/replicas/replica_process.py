"""The process of a replica: an engine of its own, which answers lines that come through a pipe.

Three threads share the work, so that neither side ever waits for the other while it should read:

    reader   pipe -> `inbox`; the end of the pipe ends the process
    main     `inbox` -> the worker, whose engine has a thread of its own
    sender   `outbox` -> pipe, all answers that are there in one message
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from nanovllm.jobs.lines.line import ENGINE_FAILED, Answer, Line
from nanovllm.jobs.lines.line_options import LineOptions

MAX_CLOSE_SECONDS = 5.0  # for the engine, once the process is to end


class Worker(Protocol):
    """What runs lines in a replica."""

    max_num_seqs: int  # of its engine

    @property
    def failure(self) -> BaseException | None:
        """What its engine has failed of, if it has; set before lines are answered so."""

    def submit(self, line: Line, done: Callable[[Answer], None]) -> None:
        """Have a line answered: `done` is called once, from any thread. Raises nothing.

        The error of the answer is ENGINE_FAILED if a step failed with the line in it, or the engine
        has ended.
        """

    def close(self) -> None:
        """Free what would outlive the process."""


@dataclass(frozen=True)
class WorkerOrder:
    """What a replica is to run; pickled."""

    make_worker: Callable[[str, dict[str, Any], LineOptions], Worker]
    model: str
    engine_options: dict[str, Any]
    line_options: LineOptions
    parent_pid: int


@dataclass(frozen=True)
class Ready:
    """A replica's first message: its engine has started."""

    max_num_seqs: int


@dataclass(frozen=True)
class Failed:
    """A replica's last message: its engine cannot start, or has ended."""

    error: BaseException
    traceback: str


Lines = list[tuple[int, Line]]  # a message to a replica: lines with their tickets
Answers = list[tuple[int, Answer]]  # a message from it


def serve(link: Connection, order_bytes: bytes) -> None:
    """Be a replica: the entry of its process, which ends when the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows from Ctrl-C is the parent's affair
    try:
        order: WorkerOrder = pickle.loads(order_bytes)
        threading.Thread(target=exit_with_parent, args=(order.parent_pid,), daemon=True).start()
        worker = order.make_worker(order.model, order.engine_options, order.line_options)
    except BaseException as error:
        send_failure(link, error)
        os._exit(1)
    link.send(Ready(worker.max_num_seqs))
    inbox: SimpleQueue[tuple[int, Line]] = SimpleQueue()
    outbox: SimpleQueue[tuple[int, Answer]] = SimpleQueue()
    threading.Thread(target=read_lines, args=(link, inbox, worker), daemon=True).start()
    threading.Thread(target=send_answers, args=(link, outbox, worker), daemon=True).start()
    while True:
        ticket, line = inbox.get()
        worker.submit(line, partial(put_answer, outbox, ticket))


def put_answer(outbox: SimpleQueue[tuple[int, Answer]], ticket: int, answer: Answer) -> None:
    """Have an answer sent."""
    outbox.put((ticket, answer))


def read_lines(link: Connection, inbox: SimpleQueue[tuple[int, Line]], worker: Worker) -> None:
    """In a thread: take what comes through the pipe; end the process when nothing can come."""
    try:
        while True:
            lines: Lines = link.recv()
            for ticket, line in lines:
                inbox.put((ticket, line))
    except (EOFError, OSError):
        end_process(worker)


def send_answers(link: Connection, outbox: SimpleQueue[tuple[int, Answer]], worker: Worker) -> None:
    """In a thread: send what is answered, at once and in as few messages as that allows."""
    while True:
        answers: Answers = [outbox.get()]
        with suppress(Empty):
            while True:
                answers.append(outbox.get_nowait())
        # All lines that were in an engine when it failed are answered with that error. They are
        # not to blame, all but one at most: they are run again, in an engine of which more is known
        # than that it may go on.
        failed = [answer for _, answer in answers if answer.error == ENGINE_FAILED]
        if failed:
            answers = [(ticket, answer) for ticket, answer in answers if answer.error is None]
        try:
            link.send(answers)
            if failed:
                send_failure(link, worker.failure or RuntimeError(error_message(failed[0])))
                end_process(worker)
        except OSError:  # the parent is gone
            end_process(worker)


def error_message(answer: Answer) -> str:
    """What an error answer says, in either form."""
    fields = json.loads(answer.data)
    error = fields["error"] or fields["response"]["body"]["error"]
    return error["message"]


def send_failure(link: Connection, error: BaseException) -> None:
    """Send an error; if it cannot be pickled, a RuntimeError that says the same."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    link.send(Failed(error, text))


def end_process(worker: Worker) -> None:
    """End the process, and what the engine has outside of it: ranks, shared memory."""
    watchdog = threading.Timer(MAX_CLOSE_SECONDS, os._exit, args=(1,))
    watchdog.daemon = True
    watchdog.start()
    try:
        worker.close()
    finally:
        os._exit(0)


def exit_with_parent(pid: int) -> None:
    """In a thread: end the process once its parent has, also if the pipe does not tell so.

    It does not while the engine starts, when nobody reads it, nor if a fork of the parent has it
    open.
    """
    while os.getppid() == pid:
        time.sleep(1.0)
    os._exit(1)
