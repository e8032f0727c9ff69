"""The output of `run-batch --ray`: a directory of parts, and beside it Ray Data's checkpoint.

For each part NAME.jsonl the checkpoint has a list of the numbers of its lines. Before Ray writes a
part it writes the list, as NAME.pending.parquet; when the part is complete it renames the list to
NAME.parquet. A job that goes on deletes the parts of pending lists, with the lists, and leaves out
the lines of the others. So each line is in the output once, wherever a job was killed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink, WriteResult

from nanovllm.jobs.command.counts import Counts
from nanovllm.jobs.command.output import Finished
from nanovllm.jobs.lines.answers import answered

ENDING = ".jsonl"
PENDING = ".pending.parquet"
COMMITTED = ".parquet"
ID_COLUMN = "number"
ANSWER_SCHEMA = pa.schema(  # the fields of Answer
    {
        ID_COLUMN: pa.int64(),
        "data": pa.binary(),
        "error": pa.string(),
        "prompt_tokens": pa.int64(),
        "completion_tokens": pa.int64(),
    }
)


def checkpoint_of(output: str) -> str:
    """The directory of the checkpoint. (Inside the output, Ray would take its lists for parts.)"""
    return output + ".checkpoint"


class PartSink(BlockBasedFileDatasink):
    """Writes tables of ANSWER_SCHEMA as the lines that they hold, and counts them.

    (`Dataset.write_json` would write each line as a string in an object.)
    """

    def __init__(self, output: str, counts: Counts, rows_per_part: int) -> None:
        ending = ENDING.removeprefix(".")
        super().__init__(output, min_rows_per_file=rows_per_part, file_format=ending)
        self.counts = counts  # is filled when the job ends, in the process that began it

    def write_block_to_file(self, block: BlockAccessor, file: pa.NativeFile) -> None:
        """Write a part."""
        for answer in block.to_arrow()["data"]:
            file.write(answer.as_buffer())
            file.write(b"\n")

    def write(self, blocks: Iterable[Block], ctx: Any) -> dict[str, Any]:
        """Write a part, in a task, and count its answers."""
        table = pa.concat_tables(BlockAccessor.for_block(block).to_arrow() for block in blocks)
        super().write([table], ctx)
        return {
            "num_lines": table.num_rows,
            "errors": Counter(error for error in table["error"].to_pylist() if error is not None),
            "prompt_tokens": sum(table["prompt_tokens"].to_pylist()),
            "completion_tokens": sum(table["completion_tokens"].to_pylist()),
        }

    def on_write_complete(self, write_result: WriteResult[dict[str, Any]]) -> None:
        """Add up the counts of all tasks."""
        for part in write_result.write_returns:
            self.counts.num_lines += part["num_lines"]
            self.counts.errors.update(part["errors"])
            self.counts.prompt_tokens += part["prompt_tokens"]
            self.counts.completion_tokens += part["completion_tokens"]
        super().on_write_complete(write_result)


def read_parts(output: str) -> Finished:
    """Find the lines of all finished parts.

    Raises:
        ValueError: if a part holds what no job has written.
    """
    finished = Finished()
    for part in finished_parts(output):
        with part.open("rb") as file:
            for line in file:
                number, is_error = number_and_error(part, line)
                finished.numbers.add(number)
                finished.num_errors += is_error
    return finished


def finished_parts(output: str) -> Iterator[Path]:
    """The parts with a list that is not pending."""
    lists = Path(checkpoint_of(output))
    for part in sorted(Path(output).glob("*" + ENDING)):
        if (lists / (part.stem + COMMITTED)).exists():
            yield part


def number_and_error(part: Path, line: bytes) -> tuple[int, bool]:
    """The number of the line that a line of a part answers, and whether it failed."""
    found = answered(line.rstrip(b"\n"))
    if found is None:
        raise ValueError(
            f"{part} holds a line that no job has written: {line[:60]!r}; restore the part, or "
            "delete it, and its lines are run again"
        )
    return found


def forget_lost_parts(output: str) -> None:
    """Delete the lists of parts that are not there any more, so that their lines are run again."""
    for path in Path(checkpoint_of(output)).glob("*" + COMMITTED):
        name = path.name.removesuffix(PENDING).removesuffix(COMMITTED)
        if not Path(output, name + ENDING).exists():
            path.unlink()


def drop_errors(output: str) -> None:
    """Take the lines with errors out of all parts and lists, so that they are run again."""
    for part in finished_parts(output):
        kept: list[bytes] = []
        numbers: list[int] = []
        dropped = False
        with part.open("rb") as file:
            for line in file:
                number, is_error = number_and_error(part, line)
                if is_error:
                    dropped = True
                else:
                    kept.append(line)
                    numbers.append(number)
        if dropped:
            replace_part(part, Path(checkpoint_of(output)), kept, numbers)


def replace_part(part: Path, lists: Path, kept: list[bytes], numbers: list[int]) -> None:
    """Replace a part and its list. If this is killed midway, all of the part is run again.

    The list is pending meanwhile. A new file gets its name when it is complete, and names that Ray
    does not look at until then.
    """
    committed = lists / (part.stem + COMMITTED)
    pending = lists / (part.stem + PENDING)
    os.replace(committed, pending)
    if not kept:
        part.unlink()
        pending.unlink()
        return
    new_part = part.with_name("_" + part.stem)
    new_part.write_bytes(b"".join(kept))
    os.replace(new_part, part)
    new_list = lists / ("_" + part.stem)
    pq.write_table(pa.table({ID_COLUMN: pa.array(numbers, pa.int64())}), new_list)
    os.replace(new_list, pending)
    os.replace(pending, committed)
