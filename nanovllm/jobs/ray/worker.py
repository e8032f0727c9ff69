"""What Ray Data's actors run: an engine each, rows in, answers out.

The engine has a process of its own, on the GPUs that Ray gave the actor; if it dies it is started
anew, and the lines that it had are run again. Ray calls a worker for several batches at a time, all
in one event loop: while one waits for its answers, the others add theirs to the engine's running
batch. When Ray forgets the worker, the pool ends its process.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import pyarrow as pa
from ray.data.block import BlockAccessor

from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.ray.rows import (
    BATCH_FORM_COLUMNS,
    PLAIN_COLUMNS,
    request_rows,
    row_answer,
    row_line,
    with_answers,
)
from nanovllm.jobs.replicas.pool import ReplicaPool

FORMS = ("plain", "batch")


class RowWorker:
    """For `Dataset.map_batches`: rows in, the same rows with their answers out.

    A row is a request in OpenAI's batch form (columns "url" and "body", a struct or its JSON) or
    has a "prompt" (text or token ids) or "messages" (a list of structs or its JSON), and beside
    them, in columns named like the fields of `SamplingParams`, what differs by row. All columns
    are carried through. Columns of the answers, null where they do not apply: `generated_text`,
    `generated_texts` (where n > 1), `finish_reason`, `embedding`, `prompt_tokens`,
    `completion_tokens`; with form="batch" instead `answer`, a line of OpenAI's batch output; and
    `error` (a sentence) and `error_code` of a row that failed. A bad row ends nothing.

    Rows that are sampled get random seeds: put a "seed" column into the dataset for the same
    answers at each run.

    Args:
        model: directory or hub id; every machine of the cluster must find it.
        sampling_params: fields of `SamplingParams` for rows that do not bring them.
        embed: whether prompts are embedded, not continued.
        form: of the answers: "plain" or "batch".
        engine_options: options of `LLM`.

    Raises:
        ValueError: a wrong option.
        RuntimeError: the engine cannot be started.
    """

    def __init__(
        self,
        *,
        model: str,
        sampling_params: dict[str, Any] | None = None,
        embed: bool = False,
        form: str = "plain",
        **engine_options: Any,
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")
        self.columns = PLAIN_COLUMNS if form == "plain" else BATCH_FORM_COLUMNS
        self.embedding_format: str | None = None
        if embed:  # base64 is several times faster, but a line of output has numbers
            self.embedding_format = "base64" if form == "plain" else "float"
        # A line's seed follows from its number, and rows have none: two actors that count from 1
        # would give equal prompts equal answers.
        self.numbers = itertools.count(random.randrange(1, 2**62))
        options = LineOptions(model=model, form="batch", defaults=sampling_params or {}, seed=0)
        self.pool = ReplicaPool(model, engine_options, options)

    async def __call__(self, batch: Any) -> AsyncIterator[pa.Table]:
        """Answer a batch, in any of Ray's formats; yields one table.

        Ray keeps the results of a batch together: parts of them, yielded as they come, would bring
        nothing.
        """
        table = BlockAccessor.for_block(BlockAccessor.batch_to_block(batch)).to_arrow()
        answers = await results(self.pool.submit(line) for line in self.lines(table))
        yield with_answers(table, [row_answer(answer) for answer in answers], self.columns)

    def lines(self, table: pa.Table) -> Iterator[Line]:
        """A line for each row."""
        for row in request_rows(table):
            number = next(self.numbers)
            yield Line(number, row_line(number, row, self.embedding_format))


async def results(futures: Iterable[Future[Answer]]) -> list[Answer]:
    """What the futures come to, in their order. Raises what one of them raises."""
    return await asyncio.gather(*map(asyncio.wrap_future, futures))
