"""Tables as the input of a job: Parquet, Arrow, and what `datasets` has saved. A row is a line."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanovllm.jobs.lines.line import Line, LineError
from nanovllm.jobs.lines.unreadable import unreadable
from nanovllm.jobs.sources.rows import row_data
from nanovllm.jobs.sources.source import Source, Wanted, hash_of, hash_of_head

BATCH_ROWS = 64  # that are in memory at once
HEADS = ("state.json", "dataset_info.json")  # files that say what a saved dataset is


class TableSource(Source):
    """A table, read a few rows at a time. Whoever makes it sets `last_number`."""

    knows_total = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    @property
    def fingerprint(self) -> str:
        """A hash of the first bytes."""
        return hash_of_head(self.path)

    def total(self) -> int:
        """The number of rows."""
        return self.last_number

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """All rows, some at a time, as tables or record batches of pyarrow."""

    def lines(self, is_wanted: Wanted) -> Iterator[Line]:
        """Read it from the beginning."""
        before = 0  # rows
        for batch in self.named_batches():
            for start in range(0, len(batch), BATCH_ROWS):
                part = batch.slice(start, BATCH_ROWS)
                numbers = range(before + 1, before + 1 + len(part))
                wanted = [number for number in numbers if is_wanted(number)]
                if 0 < len(wanted) < len(part):
                    part = part.take([number - before - 1 for number in wanted])
                if wanted:
                    yield from map(Line, wanted, rows_of(part))
                before += len(numbers)

    def named_batches(self) -> Iterator[Any]:
        """`batches`, whose errors name the file."""
        try:
            yield from self.batches()
        except (ValueError, OSError) as error:  # pyarrow's own are among them
            raise ValueError(f"{self.path} cannot be read: {error}") from error


def rows_of(batch: Any) -> Iterator[bytes]:
    """The data of the rows of a table."""
    try:
        rows = batch.to_pylist()
    except Exception:  # some value cannot be Python's: text that is not UTF-8, a time with too
        rows = None  # many digits. Only its own row is to be an error.
    if rows is not None:
        yield from map(row_data, rows)
        return
    for index in range(len(batch)):
        yield single_row(batch.slice(index, 1))


def single_row(row: Any) -> bytes:
    """The data of a table of one row, column by column."""
    values = {}
    for name in row.schema.names:
        try:
            values[name] = row.column(name).to_pylist()[0]
        except Exception as error:
            wrong = LineError(f"column {name}: {error}", "unsupported_value", name)
            return unreadable(wrong)
    return row_data(values)


class ParquetSource(TableSource):
    """A Parquet file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        parquet = imported("pyarrow.parquet", path)
        try:
            self.file = parquet.ParquetFile(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error
        self.last_number = self.file.metadata.num_rows

    def batches(self) -> Iterator[Any]:
        """Its rows."""
        return self.file.iter_batches(batch_size=BATCH_ROWS)


class ArrowSource(TableSource):
    """A file of Arrow's stream or file format, which is mapped and not read into memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.pyarrow = imported("pyarrow", path)
        self.last_number = sum(len(batch) for batch in self.named_batches())

    def batches(self) -> Iterator[Any]:
        """Its rows."""
        ipc = self.pyarrow.ipc
        with self.pyarrow.memory_map(str(self.path)) as file:
            if file.read(6) == b"ARROW1":
                reader = ipc.open_file(file)
                for index in range(reader.num_record_batches):
                    yield reader.get_batch(index)
                return
            file.seek(0)
            yield from ipc.open_stream(file)


class DatasetSource(TableSource):
    """A directory that `Dataset.save_to_disk` has written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        datasets = imported("datasets", path)
        try:
            dataset = datasets.load_from_disk(str(path))
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} is no dataset that can be read: {error}") from error
        self.dataset = dataset.with_format("arrow")
        self.last_number = len(dataset)

    @property
    def fingerprint(self) -> str:
        """A hash of the files that say what it is."""
        return hash_of(b"".join((self.path / name).read_bytes() for name in HEADS))

    def batches(self) -> Iterator[Any]:
        """Its rows."""
        return self.dataset.iter(batch_size=BATCH_ROWS)


def imported(module: str, path: Path) -> Any:
    """A module of an extra; an ImportError that names the extra if it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"to read {path} the package {package} is needed: pip install 'nano-vllm[jobs]'"
        ) from error
