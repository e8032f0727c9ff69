"""`run-batch --ray`: the lines of a file, answered on a cluster, into a directory of JSON parts.

    LineDatasource -> (CheckpointFilter) -> small blocks -> JobWorker actors -> PartSink

Ray Data's checkpoint remembers the numbers of the lines in each finished part; see `parts.py`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from ray.data.block import BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import Datasource, ReadTask

from nanovllm.jobs.command.counts import Counts
from nanovllm.jobs.command.lines_to_run import LinesToRun
from nanovllm.jobs.command.numbers import NumberSet
from nanovllm.jobs.lines.line import Line
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.ray.arguments import BATCH_SIZE, worker_arguments
from nanovllm.jobs.ray.parts import (
    ANSWER_SCHEMA,
    ID_COLUMN,
    PartSink,
    checkpoint_of,
    drop_errors,
    forget_lost_parts,
    read_parts,
)
from nanovllm.jobs.ray.worker import results
from nanovllm.jobs.replicas.pool import ReplicaPool
from nanovllm.jobs.sources.readers import open_input

LINE_SCHEMA = pa.schema(
    {ID_COLUMN: pa.int64(), "data": pa.binary(), "duplicate_of": pa.int64()}  # the fields of Line
)
ROWS_PER_PART = 1024  # at least, but for the last part; a killed job has to do up to so many again
BYTES_PER_BLOCK = 2**24  # of lines that are read together: lines may be long


def run_on_ray(
    *,
    input: str,
    output: str,
    model: str,
    engine_options: dict[str, Any],
    line_options: LineOptions,
    address: str | None = None,
    replicas: int | None = None,
    retry_errors: bool = False,
    progress: bool = True,
    batch_size: int = BATCH_SIZE,
    rows_per_part: int = ROWS_PER_PART,
) -> Counts:
    """Answer the lines of a file on a cluster; the same call goes on where one was interrupted.

    All paths must mean the same on every machine of the cluster. The output is a directory of
    parts, which `ray.data.read_json` reads; the lines have no order, but their numbers in them.
    Beside it lies Ray's checkpoint, OUTPUT.checkpoint: keep it as long as the job may go on.

    Args:
        input: the file, whatever `open_input` reads, but for stdin.
        output: the directory.
        model: directory or hub id.
        engine_options: options of `LLM`.
        line_options: how lines are read and answered.
        address: of the cluster, as `ray.init` takes it. None: RAY_ADDRESS, or the cluster that this
            machine is part of, or a new one on this machine alone.
        replicas: actors, each with an engine. None: as many as the cluster's GPUs are enough for.
        retry_errors: whether lines that earlier runs answered with errors are run again.
        progress: whether Ray shows how far the job is.
        batch_size: lines that are handed over together.
        rows_per_part: lines of a part, at least.

    Returns:
        What this run has done, and how much those before.

    Raises:
        ValueError: the input is stdin, or the output holds what no job has written.
        RuntimeError: the cluster has given up: no engine can be started, say, or the disk is full.
            The same call goes on from there.
    """
    if input == "-":
        raise ValueError("--ray cannot read stdin, which only this machine has; give it a file")
    input = os.path.abspath(input)
    output = os.path.abspath(output)
    if Path(model).is_dir():
        model = os.path.abspath(model)
    forget_lost_parts(output)
    if retry_errors:
        drop_errors(output)
    before = read_parts(output)
    counts = Counts(num_lines_before=len(before.numbers), num_errors_before=before.num_errors)
    if not has_more(input, before.numbers):  # engines take a while to start
        return counts
    if not ray.is_initialized():
        ray.init(address)
    sink = PartSink(output, counts, rows_per_part)
    lines = ray.data.read_datasource(LineDatasource(input), override_num_blocks=1)
    lines.context.checkpoint_config = CheckpointConfig(
        id_column=ID_COLUMN,
        checkpoint_path=checkpoint_of(output),
        delete_checkpoint_on_success=False,  # the same command once more is to do nothing
    )
    lines.context.enable_progress_bars = progress
    # Why blocks are small: see `map_prompts`.
    answers = lines.repartition(target_num_rows_per_block=batch_size).map_batches(
        JobWorker,
        fn_constructor_kwargs=dict(
            model=model, engine_options=engine_options, line_options=line_options
        ),
        **worker_arguments(
            concurrency=replicas,
            batch_size=batch_size,
            num_rows=open_input(input).total,
            **engine_options,
        ),
    )
    try:
        answers.write_datasink(sink)
    except ray.exceptions.RayError as error:
        raise RuntimeError(reason(error)) from error
    return counts


def reason(error: Exception) -> str:
    """What went wrong on the cluster, which is at the end of the tracebacks in Ray's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def has_more(input: str, finished: NumberSet) -> bool:
    """Whether a line is not finished. Reads up to the first such line."""
    lines = LinesToRun(open_input(input), finished, expect=lambda number: None)
    return next(lines, None) is not None or lines.error is not None


class JobWorker:
    """Of `run-batch --ray`: tables with the fields of Line in, of Answer out."""

    def __init__(
        self, model: str, engine_options: dict[str, Any], line_options: LineOptions
    ) -> None:
        self.pool = ReplicaPool(model, engine_options, line_options)

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Answer a batch; yields one table."""
        lines = [Line(**row) for row in batch.to_pylist()]
        answers = await results(self.pool.submit(line) for line in lines)
        yield pa.Table.from_pylist([asdict(answer) for answer in answers], schema=ANSWER_SCHEMA)


class LineDatasource(Datasource):
    """The lines of an input, read in one task: Ray's own readers do not count lines."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: the input may be compressed."""
        return None

    def get_read_tasks(self, parallelism: int, *arguments: Any, **keywords: Any) -> list[ReadTask]:
        """One task, whatever parallelism Ray would like."""
        metadata = BlockMetadata(
            num_rows=None, size_bytes=None, exec_stats=None, input_files=(self.path,)
        )
        return [ReadTask(partial(read_blocks, self.path), metadata)]


def read_blocks(path: str) -> Iterator[pa.Table]:
    """The lines of a file in tables of LINE_SCHEMA, in bounded memory.

    Raises:
        OSError, ValueError: the file cannot be read to its end. Ray then ends the job.
    """
    lines = LinesToRun(open_input(path), NumberSet(), expect=lambda number: None)
    block: list[Line] = []
    size = 0
    for line in lines:
        block.append(line)
        size += len(line.data)
        if len(block) == BATCH_SIZE or size > BYTES_PER_BLOCK:
            yield pa.Table.from_pylist([asdict(each) for each in block], schema=LINE_SCHEMA)
            block = []
            size = 0
    if lines.error is not None:
        raise lines.error
    yield pa.Table.from_pylist([asdict(each) for each in block], schema=LINE_SCHEMA)
