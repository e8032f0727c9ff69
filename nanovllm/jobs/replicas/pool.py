"""Engines in processes of their own, fed from one queue."""

from __future__ import annotations

import os
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from os.path import expanduser, isdir
from typing import Any

from nanovllm.jobs.lines.answers import error_answer
from nanovllm.jobs.lines.line import ENGINE_FAILED, Answer, Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.replicas.devices import replica_environments
from nanovllm.jobs.replicas.engine_worker import EngineWorker
from nanovllm.jobs.replicas.replica_process import Worker, WorkerOrder
from nanovllm.jobs.replicas.run import EndOfLines, Run
from nanovllm.jobs.replicas.supervisor import Supervisor
from nanovllm.jobs.replicas.task import FutureTask

DEFAULT_BLOCK_SIZE = 256
JOIN_SECONDS = 1.0  # for a reader, which may wait for its input


class ReplicaPool:
    """Answers lines with several engines, "replicas", each a process with GPUs of its own.

    >>> options = LineOptions(model="Qwen3-0.6B")
    >>> with ReplicaPool("/path/to/Qwen3-0.6B", {"max_model_len": 2048}, options, 2) as pool:
    ...     for answer in pool.run(lines):
    ...         print(answer.data)

    model: a directory or a hub id, which is fetched once for all replicas.
    engine_options: of `LLM`, the same for all.
    line_options: how lines are read and answers written; handed to the workers.
    replicas: how many. "auto": as many as there are GPUs, divided by `tensor_parallel_size`; 1 on a
        CPU. CUDA_VISIBLE_DEVICES says which GPUs there are.
    make_worker: called in each replica with `model`, `engine_options` and `line_options`.

    An engine that cannot start raises its own error here. One that fails later is started anew, and
    the lines that were in it are run again, at most twice each: see `Suspects`. What fails alone is
    answered with the error "engine_failed". A replica that fails again and again without a good
    answer is given up. When all are, everything raises a RuntimeError.

    This process uses no GPU. Replicas end when it does, in whatever way.
    """

    def __init__(
        self,
        model: str,
        engine_options: dict[str, Any],
        line_options: LineOptions,
        replicas: int | str = 1,
        make_worker: Callable[[str, dict[str, Any], LineOptions], Worker] = EngineWorker,
    ) -> None:
        environments = replica_environments(replicas, engine_options)
        model, engine_options = find_model(model, engine_options)
        order = WorkerOrder(make_worker, model, engine_options, line_options, os.getpid())
        block_size = engine_options.get("kvcache_block_size")
        if type(block_size) is not int or block_size <= 0:
            block_size = DEFAULT_BLOCK_SIZE  # if it is wrong the engine says so
        self._supervisor = Supervisor(
            pickle.dumps(order),
            environments,
            block_size=block_size,
            error_answer=partial(engine_failed_answer, line_options),
        )
        # Also if this object is forgotten, or Python ends. The thread does not know this object.
        self._end = weakref.finalize(self, self._supervisor.close)

    def __enter__(self) -> ReplicaPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_restarts(self) -> int:
        """How often a replica was started anew."""
        return self._supervisor.num_restarts

    def pids(self) -> list[int]:
        """The process ids of the replicas that are there now."""
        return self._supervisor.pids()

    def submit(self, line: Line) -> Future[Answer]:
        """Have a line answered; from any thread. Raises a RuntimeError once nothing can be answered
        any more. A future can be cancelled while its line waits. Its callbacks run in the thread
        that serves all replicas, so they must not wait.
        """
        task = FutureTask(line)
        self._supervisor.add(task)
        return task.future

    def run(self, lines: Iterable[Line]) -> Iterator[Answer]:
        """Have many lines answered, and yield each answer when it is there, in any order.

        A thread reads `lines`, which may wait: a few thousand ahead, and at most 32,768 beyond the
        oldest line whose answer has not been taken. An exception of theirs is raised here, after
        the answers to all lines before it. Whoever leaves early does not get the other answers.
        """
        supervisor = self._supervisor
        run = Run()
        supervisor.open(run)
        reader = threading.Thread(
            target=feed, args=(supervisor, run, lines), name="reader of lines", daemon=True
        )
        reader.start()
        is_ended = False
        error: BaseException | None = None
        try:
            while not (is_ended and run.is_empty):
                result = run.results.get()
                if isinstance(result, BaseException):
                    raise RuntimeError(str(result)) from result
                if isinstance(result, EndOfLines):
                    is_ended = True
                    error = result.error
                    continue
                task, answer = result
                yield answer
                if run.take(task):
                    with supervisor.lock:
                        supervisor.room.notify_all()
            if error is not None:
                raise error
        finally:
            supervisor.leave(run)
            reader.join(JOIN_SECONDS)

    def close(self) -> None:
        """End all replicas. What is not answered fails with a RuntimeError."""
        self._end()


def feed(supervisor: Supervisor, run: Run, lines: Iterable[Line]) -> None:
    """In a thread: add the lines of a run, as far ahead as there is room for."""
    try:
        for line in lines:
            with supervisor.lock:
                while not (run.is_abandoned or (supervisor.has_room and run.may_read)):
                    supervisor.check()
                    supervisor.room.wait()
            if run.is_abandoned:
                return
            supervisor.add(run.add_line(line))
    except BaseException as error:
        run.end(error)
    else:
        run.end()


def find_model(model: str, engine_options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The model's directory, and the options with that of its tokenizer. What is on the hub is
    fetched now, so that replicas need not do it, all at the same time.
    """
    options = dict(engine_options)
    # What is wrong is passed on, too: the engine says so.
    needs_tokenizer = options.get("tokenizer") is not None and not options.get(
        "skip_tokenizer_init"
    )
    if is_on_hub(model) or (needs_tokenizer and is_on_hub(options["tokenizer"])):
        from nanovllm.checkpoints import hub  # which imports PyTorch

        directory = options.get("download_dir")
        if is_on_hub(model):
            source = hub.HubSource(options.get("revision"), directory)
            model = hub.resolve_model(model, options.get("load_format") != "dummy", source)
        if needs_tokenizer and is_on_hub(options["tokenizer"]):
            source = hub.HubSource(options.get("tokenizer_revision"), directory)
            options["tokenizer"] = hub.resolve_tokenizer(options["tokenizer"], source)
    return model, options


def is_on_hub(name: Any) -> bool:
    """Whether this, of a model or a tokenizer, is no directory here."""
    return isinstance(name, str) and not isdir(expanduser(name))


def engine_failed_answer(line_options: LineOptions, line: Line, message: str) -> Answer:
    """The answer to a line that is given up."""
    error = LineError(message, ENGINE_FAILED, status=500)
    return error_answer(line.number, line.data, error, line_options)
