"""Embed the texts of a file, on all GPUs of the machine, and write the vectors as Parquet.

    pip install -e '.[jobs]'
    python examples/embed_to_parquet.py texts.jsonl vectors.parquet Qwen/Qwen3-Embedding-0.6B

Texts are the field (or column) `text` of whatever `nanovllm run-batch` reads: JSON lines, perhaps
compressed, Parquet, a saved dataset; of any size. A row that fails has an `error`.
"""

import json
import sys
from collections.abc import Iterator

import pyarrow as pa
from pyarrow.parquet import ParquetWriter
from tqdm import tqdm

from nanovllm.jobs.lines.line import Line
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.replicas.pool import ReplicaPool
from nanovllm.jobs.sources.readers import Input, open_input

ROWS = 1000  # that are written at once
VECTOR = pa.list_(pa.float32())
TYPES = {"line": pa.int64(), "text": pa.string(), "embedding": VECTOR, "error": pa.string()}


def requests(source: Input) -> Iterator[Line]:
    """Make of each line a request for the embedding of its text."""
    for line in source:
        try:
            request = {"input": json.loads(line.data)["text"]}
        except (ValueError, TypeError, KeyError):
            request = {"input": None}  # is answered with an error
        yield Line(line.number, json.dumps(request).encode())


def main(source: str, target: str, model: str, replicas: int | str = "auto") -> None:
    """Embed the texts of a file. Rows are written in the order in which they are ready."""
    lines = open_input(source)
    options = LineOptions(model, keep_prompt=True)  # so that the text comes back
    with (
        ReplicaPool(model, {}, options, replicas) as pool,
        ParquetWriter(target, pa.schema(TYPES)) as writer,
    ):
        rows = []
        for answer in tqdm(pool.run(requests(lines)), total=lines.total, unit=" rows"):
            fields = json.loads(answer.data)
            row = {"text": fields["input"], "embedding": fields.get("embedding")}
            rows.append({"line": answer.number, "error": answer.error, **row})
            if len(rows) == ROWS:
                writer.write_table(pa.Table.from_pylist(rows, writer.schema))
                rows.clear()
        writer.write_table(pa.Table.from_pylist(rows, writer.schema))


if __name__ == "__main__":
    main(*sys.argv[1:])
