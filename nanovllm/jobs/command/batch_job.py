"""A job: each line of the input is answered once in the output, whatever happens on the way.

The main process reads lines, hands them to the replicas and writes their answers; it runs no model:

    open_input -> LinesToRun -> ReplicaPool.run -> AnswerWriter -> OutputFile

What is done is read back from the output. So there is no other record that could disagree with it,
and the same command continues a job that was killed at any moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Protocol

from nanovllm.jobs.command.answer_writer import AnswerWriter
from nanovllm.jobs.command.counts import Counts
from nanovllm.jobs.command.job_options import (
    JobOptions,
    JobStopped,
    UsageError,
    describe_job,
    make_config,
)
from nanovllm.jobs.command.job_progress import job_progress
from nanovllm.jobs.command.lines_to_run import LinesToRun
from nanovllm.jobs.command.manifest import check_manifest
from nanovllm.jobs.command.output import (
    Finished,
    OutputError,
    OutputFile,
    Stream,
    check_output,
    open_output,
)
from nanovllm.jobs.command.stop_signals import StopSignals
from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.sources.readers import open_input


class Pool(Protocol):
    """What a job needs of a `ReplicaPool`."""

    def run(self, lines: Iterable[Line]) -> Iterator[Answer]:
        """Answer lines, in any order, and read only as far ahead as the engines need."""


MakePool = Callable[..., AbstractContextManager[Pool]]


class BatchJob:
    """One run of a job. What is wrong with its options is a UsageError before anything is changed.

    `counts` says how far it has come, also after an exception.
    """

    def __init__(self, options: JobOptions) -> None:
        self.options = options
        self.counts = Counts()
        try:
            self.input = open_input(options.input, options.shard)
            check_output(options.output, options.input)
            # From here on PyTorch is imported: what was quick to find out has been said.
            config = make_config(options.model, options.engine)
            self.line_options = options.line_options(config)
            self._description = describe_job(options, self.input, config)
        except (OSError, ValueError, TypeError, ImportError, OutputError) as error:
            raise UsageError(str(error)) from error

    @property
    def can_resume(self) -> bool:
        """Whether what is written can be read back."""
        path = self.options.output
        return path != "-" and (os.path.isfile(path) or not os.path.exists(path))

    def run(self, signals: StopSignals, make_pool: MakePool) -> Counts:
        """Answer what is not answered yet.

        Args:
            signals: in whose `with` this is called.
            make_pool: `ReplicaPool`, or what stands in for it.

        Raises:
            UsageError: if the output holds something else, or belongs to another process.
            JobStopped: if the input cannot be read, the output cannot be written, or no engine can
                be started any more.
            Interrupted: when a signal has asked for it.
        """
        output = self._open_output()
        try:
            finished = self._find_finished(output)
            writer = AnswerWriter(output, finished, self.counts, self.options.in_order)
            lines = LinesToRun(self.input, finished.numbers, writer.expect)
            first = next(lines, None)
            if first is not None:  # engines take a while to start, and there may be nothing to do
                with self._start(make_pool) as pool:
                    self._answer(pool.run(chain([first], lines)), writer, signals)
            if lines.error is not None:
                raise JobStopped(f"the input cannot be read any further: {lines.error}")
            if self.options.in_order and not writer.is_in_order:
                assert isinstance(output, OutputFile)  # a stream begins empty, and is written once
                output.put_in_order()
            output.sync()
            return self.counts
        except OutputError as error:
            raise JobStopped(str(error)) from error
        finally:
            output.close()

    def _open_output(self) -> OutputFile | Stream:
        """Open the output, if it is this job's."""
        try:
            output = open_output(self.options.output)
        except OutputError as error:
            raise UsageError(str(error)) from error
        if isinstance(output, OutputFile):
            try:
                if self.options.overwrite:
                    output.clear()
                check_manifest(output.name, self._description, may_replace=output.is_empty)
            except OutputError as error:
                output.close()
                raise UsageError(str(error)) from error
        return output

    def _find_finished(self, output: OutputFile | Stream) -> Finished:
        """What earlier runs have done, which also counts."""
        if not isinstance(output, OutputFile):
            return Finished()
        try:
            finished = output.read_back(self.options.retry_errors)
        except OutputError as error:
            raise UsageError(str(error)) from error
        self.counts.num_lines_before = len(finished.numbers)
        self.counts.num_errors_before = finished.num_errors
        return finished

    def _start(self, make_pool: MakePool) -> AbstractContextManager[Pool]:
        """Start the replicas."""
        try:
            return make_pool(
                self.options.model,
                engine_options=self.options.engine,
                line_options=self.line_options,
                replicas=self.options.replicas or 1,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        except Exception as error:  # of the engine: it is out of memory, a file cannot be read
            raise JobStopped(f"no engine could be started: {error}") from error

    def _answer(
        self, answers: Iterator[Answer], writer: AnswerWriter, signals: StopSignals
    ) -> None:
        """Write answers as they come, and show how far the job is."""
        self.counts.restart_clock()
        with job_progress(self.counts, self._total, self.options.progress) as report:
            try:
                for answer in answers:
                    with signals.held:
                        writer.put(answer)
                    report()
            except RuntimeError as error:  # the pool's: no replica can be started any more
                raise JobStopped(str(error)) from error
        assert writer.num_waiting == 0, "the pool has left lines without an answer"

    def _total(self) -> int | None:
        return self.input.total
