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
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nanovllm.jobs.answer_writer import AnswerWriter
from nanovllm.jobs.answers import answered
from nanovllm.jobs.counts import Counts
from nanovllm.jobs.job_progress import job_progress
from nanovllm.jobs.line import Answer, Line
from nanovllm.jobs.line_options import LineOptions
from nanovllm.jobs.lines_to_run import LinesToRun
from nanovllm.jobs.manifest import (
    ManifestError,
    check_manifest,
    describe_engine,
    describe_input,
)
from nanovllm.jobs.output import (
    Finished,
    OutputError,
    OutputFile,
    Stream,
    check_output,
    open_output,
)
from nanovllm.jobs.readers import open_input
from nanovllm.jobs.stop_signals import StopSignals

if TYPE_CHECKING:
    from nanovllm.config import Config


class UsageError(Exception):
    """Why a job cannot begin."""


class JobStopped(Exception):
    """Why a job ended before its last line. What is written is not run again."""


class Pool(Protocol):
    """What a job needs of a `ReplicaPool`."""

    def run(self, lines: Iterable[Line]) -> Iterator[Answer]:
        """Answer lines, in any order, and read only as far ahead as the engines need."""


@dataclass(frozen=True, slots=True)
class JobOptions:
    """What a job is to do; the command line has these options by the same names."""

    input: str  # a path, or "-" for stdin
    output: str  # a path, or "-" for stdout
    model: str
    engine: dict[str, Any] = field(default_factory=dict)  # fields of Config
    defaults: dict[str, Any] = field(default_factory=dict)  # of SamplingParams, as JSON has them
    format: str = "auto"  # see LineOptions
    keep_prompt: bool = False  # the same
    in_order: bool = False  # whether the output has the order of the input
    replicas: int | Literal["auto"] = 1
    retry_errors: bool = False  # whether lines that earlier runs answered with errors are run again
    shard: tuple[int, int] | None = None  # (i, n): the i-th part of n, i from 1
    overwrite: bool = False  # whether what the output holds is dropped
    progress: bool = True  # whether stderr shows how far the job is


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
            self.config = make_config(options.model, options.engine)
            self.line_options = LineOptions(
                model=options.model,
                form=options.format,
                defaults=from_json(options.defaults),
                seed=self.config.seed,
                keep_prompt=options.keep_prompt,
            )
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
                output.put_in_order(answered)
            return self.counts
        except OutputError as error:
            raise JobStopped(str(error)) from error
        finally:
            output.close()

    def _open_output(self) -> OutputFile | Stream:
        """Open the output, if it is this job's."""
        job = self.describe()
        try:
            output = open_output(self.options.output)
        except OutputError as error:
            raise UsageError(str(error)) from error
        if isinstance(output, OutputFile):
            try:
                if self.options.overwrite:
                    output.clear()
                check_manifest(output.name, job, may_replace=output.is_empty)
            except (OutputError, ManifestError) as error:
                output.close()
                raise UsageError(str(error)) from error
        return output

    def describe(self) -> dict[str, Any]:
        """What decides the output: its manifest."""
        options = self.options
        return {
            "input": describe_input(self.input),
            "engine": describe_engine(self.config),
            "defaults": options.defaults,
            "format": options.format,
            "keep_prompt": options.keep_prompt,
            "in_order": options.in_order,
            "shard": options.shard,
            "note": {"input": os.path.abspath(options.input), "model": self.config.model},
        }

    def _find_finished(self, output: OutputFile | Stream) -> Finished:
        """What earlier runs have done, which also counts."""
        if not isinstance(output, OutputFile):
            return Finished()
        try:
            finished = output.read_back(answered, self.options.retry_errors)
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
                replicas=self.options.replicas,
            )
        except (ValueError, TypeError) as error:
            raise UsageError(str(error)) from error
        except RuntimeError as error:
            raise JobStopped(str(error)) from error

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


def from_json(params: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters as JSON has them, as SamplingParams takes them."""
    from nanovllm.params.structured import StructuredOutputsParams

    params = dict(params)
    form = params.get("structured_outputs")
    if isinstance(form, dict):
        params["structured_outputs"] = StructuredOutputsParams(**form)
    bias = params.get("logit_bias")
    if isinstance(bias, dict):
        params["logit_bias"] = {int(token_id): value for token_id, value in bias.items()}
    return params


def make_config(model: str, options: dict[str, Any]) -> Config:
    """Check the engine's options and find the model's files, as the engine will. A GPU is not
    touched, and no weights are read.
    """
    from nanovllm.config import Config
    from nanovllm.models import MODELS

    return Config.from_options(model, options, architectures=MODELS)
