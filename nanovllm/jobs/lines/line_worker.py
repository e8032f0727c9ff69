"""Lines of a job's input, run by an `AsyncLLM`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any

from nanovllm.jobs.async_llm import AsyncLLM
from nanovllm.jobs.lines.answers import answer, error_answer
from nanovllm.jobs.lines.line import ENGINE_FAILED, Answer, Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_request import LineRequest
from nanovllm.jobs.lines.parse import parse_line
from nanovllm.jobs.owner import EngineError
from nanovllm.text.decoder import decoder_of

LOGGER = logging.getLogger("nanovllm")
Done = Callable[[Answer], None]


class LineWorker:
    """A thread that reads lines, has an engine run them, and writes their answers.

    All that Python has to do for a line is done here, and not in the engine's thread. It catches
    all exceptions there are: when a library in Rust panics it raises one that is no Exception, and
    a thread that ended of it would leave all lines without an answer.
    """

    def __init__(self, llm: AsyncLLM, options: LineOptions) -> None:
        """Start the thread. Raises a ValueError if the model's generation_config.json is wrong."""
        self._llm = llm
        self._options = options.with_recommended(llm.llm.get_default_sampling_params())
        tokenizer = llm.llm._inputs.tokenizer
        self._token_bytes = None if tokenizer is None else decoder_of(tokenizer).token_bytes
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: the end
        self._thread = threading.Thread(target=self._run, name="nanovllm-lines", daemon=True)
        self._thread.start()

    def submit(self, line: Line, done: Done) -> None:
        """Have a line run, without waiting: `done` is called in the worker's thread, once.

        Whatever is wrong with the line is in its answer. Where that has the error ENGINE_FAILED,
        there is no telling, and the line should be run again, by another engine if `llm.failure`
        says that this one has ended.
        """
        self._jobs.put(partial(self._start, line, done))

    def close(self) -> None:
        """End the thread when it has done what it has to do by now. To have all lines answered,
        close the engine first.
        """
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            try:
                job()
            except BaseException:
                LOGGER.exception("a callback of a line has failed")
            del job  # what the last line was is of no use while this waits

    def _start(self, line: Line, done: Done) -> None:
        try:
            request = self._read(line)
            futures = self._submit(request)
        except BaseException as error:
            done(self._error_answer(line, error))
            return
        running = RunningLine(line, done, request, futures, num_left=len(futures))
        for future in futures:
            future.add_done_callback(lambda _: self._jobs.put(partial(self._count, running)))

    def _read(self, line: Line) -> LineRequest:
        if line.duplicate_of is not None:
            raise LineError(
                f"custom_id is already that of line {line.duplicate_of}; give each line one of its "
                "own",
                code="duplicate_custom_id",
                param="custom_id",
            )
        request = parse_line(line, self._options)
        request.token_bytes = self._token_bytes
        return request

    def _submit(self, request: LineRequest) -> list[Future[Any]]:
        """Queue what a line asks for, all of it or nothing."""
        futures: list[Future[Any]] = []
        try:
            if request.kind == "chat":
                futures.append(self._submit_chat(request))
            params: Any
            for prompt, params in zip(request.prompts, request.params, strict=False):
                futures.append(self._submit_prompt(request, prompt, params))
        except BaseException as error:
            for future in futures:
                future.cancel()
            if isinstance(error, RuntimeError) and not isinstance(error, RecursionError):
                raise EngineError(str(error)) from error  # it has ended
            raise
        return futures

    def _submit_chat(self, request: LineRequest) -> Future[Any]:
        params: Any = request.params[0]
        return self._llm.submit_chat(request.messages, params, request.template_options)

    def _submit_prompt(self, request: LineRequest, prompt: Any, params: Any) -> Future[Any]:
        if request.kind == "embed":
            truncation = request.truncate_prompt_tokens
            return self._llm.submit_embed(prompt, params, truncate_prompt_tokens=truncation)
        return self._llm.submit(prompt, params)

    def _count(self, running: RunningLine) -> None:
        """One of a line's requests has ended."""
        running.num_left -= 1
        if running.num_left == 0:
            running.done(self._answer(running))

    def _answer(self, running: RunningLine) -> Answer:
        try:
            return answer(running.request, [future.result() for future in running.futures])
        except BaseException as error:
            return self._error_answer(running.line, error)

    def _error_answer(self, line: Line, error: BaseException) -> Answer:
        if isinstance(error, EngineError):
            error = LineError(str(error), ENGINE_FAILED, status=500)
        return error_answer(line.number, line.data, error, self._options)


@dataclass(slots=True)
class RunningLine:
    """A line between its beginning and its answer."""

    line: Line
    done: Done
    request: LineRequest
    futures: list[Future[Any]]  # of each of its prompts
    num_left: int  # of those that have not ended
