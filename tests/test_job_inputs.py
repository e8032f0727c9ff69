"""Inputs of jobs: what holds lines, and what is read of it whatever is wrong with it."""

import datetime
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.jobs.lines.line import Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.parse import parse_line
from nanovllm.jobs.lines.unreadable import MAX_LINE_BYTES
from nanovllm.jobs.sources import line_files
from nanovllm.jobs.sources.compressed import open_decompressed
from nanovllm.jobs.sources.readers import Input, open_input
from nanovllm.jobs.sources.rows import row_data

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def write(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def numbered(lines: Input) -> dict[int, bytes]:
    return {line.number: line.data for line in lines}


# --- JSON lines -----------------------------------------------------------------------------------

MESSY = b'\xef\xbb\xbf{"a": 1}\r\n\n \t\r\n{"b": "\x00"}\nno json\xff\n{"last": 2}'
READ = {1: b'{"a": 1}', 4: b'{"b": "\x00"}', 5: b"no json\xff", 6: b'{"last": 2}'}


@pytest.mark.parametrize("kind", COMPRESS)
def test_what_is_no_part_of_a_line_is_left_out(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "in", COMPRESS[kind](MESSY))
    opened = open_input(path)
    assert opened.total == (4 if kind == "plain" else None)
    assert opened.size == os.path.getsize(path)
    assert numbered(opened) == READ
    assert numbered(opened) == READ  # each loop begins anew
    assert opened.total == 4


@pytest.mark.parametrize("kind", COMPRESS)
def test_an_empty_file_has_no_lines(tmp_path: Path, kind: str) -> None:
    opened = open_input(write(tmp_path / "in", COMPRESS[kind](b"")))
    assert list(opened) == []
    assert opened.total == 0


def test_shards_share_all_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", b"".join(b"%d\n" % i for i in range(1, 12)))
    shards = [open_input(path, (index, 3)) for index in (1, 2, 3)]
    found = [numbered(shard) for shard in shards]
    assert [shard.total for shard in shards] == [len(lines) for lines in found]
    assert [set(lines) for lines in found] == [{3, 6, 9}, {1, 4, 7, 10}, {2, 5, 8, 11}]
    assert {**found[0], **found[1], **found[2]} == {i: b"%d" % i for i in range(1, 12)}
    only = [line.number for line in shards[0].source.lines(lambda number: number in (3, 9))]
    assert only == [3, 9]
    for index in range(1, 4):
        empty = open_input(write(tmp_path / "empty", b""), (index, 3))
        assert empty.total == 0
    for wrong in ((0, 2), (3, 2)):
        with pytest.raises(ValueError, match="shard must be"):
            open_input(path, wrong)


@given(st.lists(st.binary(max_size=30)), st.sampled_from(list(COMPRESS)))
def test_any_bytes_are_split_at_line_breaks_alone(lines: list[bytes], kind: str) -> None:
    # All kinds of bytes, but for a mark at the beginning that says which ones follow.
    data = b"\n".join([b"{}", *lines])
    stream = io.BufferedReader(io.BytesIO(COMPRESS[kind](data)))  # type: ignore[arg-type]
    read = list(line_files.split_lines("in", stream))
    expected = [line.rstrip(b"\r") for line in data.split(b"\n")]
    if not expected[-1]:  # behind the last line break there is no line
        expected.pop()
    assert read == expected


def test_a_line_that_is_too_long_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl.gz"
    compressor = zlib.compressobj(1, wbits=16 + zlib.MAX_WBITS)
    with path.open("wb") as file:
        file.write(compressor.compress(b'{"custom_id": "seven", "body": "'))
        for _ in range(5):
            file.write(compressor.compress(b" " * (MAX_LINE_BYTES // 2)))
        file.write(compressor.compress(b'"}\n{"custom_id": "eight"}\n'))
        file.write(compressor.flush())
    tracemalloc.start()
    try:
        first, second = list(open_input(str(path)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2.3 * MAX_LINE_BYTES
    assert len(first.data) < 1000
    assert second == Line(2, b'{"custom_id": "eight"}')
    with pytest.raises(LineError, match="167772195 bytes") as caught:
        parse_line(first, LineOptions("m"))
    assert caught.value.code == "line_too_long"


def test_the_number_of_lines_is_estimated_while_a_large_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "COUNTED_BYTES", 100)
    opened = open_input(write(tmp_path / "in.jsonl", b"x" * 99 + b"\n" + b"y\n" * 1000))
    assert opened.total is None
    lines = iter(opened)
    next(lines)
    assert opened.total == 21  # as if all were as long as the first
    totals = [opened.total for _ in lines]
    assert opened.total == 1001
    assert totals[-2] == pytest.approx(1001, abs=2)


def test_fingerprints_tell_inputs_apart(tmp_path: Path) -> None:
    first = open_input(write(tmp_path / "a", b"{}\n"))
    same = open_input(write(tmp_path / "b", b"{}\n"))
    other = open_input(write(tmp_path / "c", b"[]\n"))
    assert first.fingerprint == same.fingerprint != other.fingerprint


# --- compressed -----------------------------------------------------------------------------------


def test_zstandard_may_begin_with_a_frame_without_data(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    data = zstandard.ZstdCompressor().compress(b'{"prompt": "a"}\n')
    path = write(tmp_path / "in.zst", skippable + data + skippable + data)
    assert numbered(open_input(path)) == {1: b'{"prompt": "a"}', 2: b'{"prompt": "a"}'}


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_several_frames_are_one_file(tmp_path: Path, kind: str) -> None:
    frames = [COMPRESS[kind](b'{"a":'), COMPRESS[kind](b"1}\n"), COMPRESS[kind](b"2\n")]
    padding = b"\0" * 3000 if kind == "gzip" else b""
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd" if kind == "zstd" else b""  # a comment, as it were
    data = frames[0] + skipped + frames[1] + frames[2] + padding
    assert numbered(open_input(write(tmp_path / "in", data))) == {1: b'{"a":1}', 2: b"2"}


TEXT = b"".join(b'{"line": %d}\n' % (i * 7919) for i in range(400))


@given(st.sampled_from(["gzip", "zstd"]), st.data())
def test_a_compressed_file_that_was_cut_off_is_found_out(kind: str, data: st.DataObject) -> None:
    whole = COMPRESS[kind](TEXT)
    cut = data.draw(st.integers(5, len(whole) - 1))
    check_broken(whole[:cut], "ends in the middle")


@given(st.sampled_from(["gzip", "zstd"]), st.data())
def test_a_damaged_compressed_file_is_found_out(kind: str, data: st.DataObject) -> None:
    whole = bytearray(COMPRESS[kind](TEXT))
    place = data.draw(st.integers(20, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    check_broken(bytes(whole), "ends in the middle|damaged")


def check_broken(data: bytes, message: str) -> None:
    """Read it in small pieces: what comes before the error is what was written."""
    file = io.BufferedReader(io.BytesIO(data))  # type: ignore[arg-type]
    stream = open_decompressed("in.x", file)
    read = b""
    with pytest.raises(ValueError, match=f"in.x .*({message})"):
        while piece := stream.read1(100):
            read += piece
    assert TEXT.startswith(read) or "damaged" in message


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zst = write(tmp_path / "in.zst", COMPRESS["zstd"](b"{}\n"))
    parquet = str(tmp_path / "in.parquet")
    pq.write_table(pa.table({"prompt": ["a"]}), parquet)
    for module in ("zstandard", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for path, package in ((zst, "zstandard"), (parquet, "pyarrow")):
        with pytest.raises(ImportError, match=rf"{package}.*pip install 'nano-vllm\[jobs\]'"):
            list(open_input(path))


# --- what is no file ------------------------------------------------------------------------------


def test_a_pipe_is_read_as_it_comes(tmp_path: Path) -> None:
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    has_read_first = threading.Event()

    def feed() -> None:
        with fifo.open("wb", buffering=0) as file:
            file.write(b'{"a": 1}\n')
            assert has_read_first.wait(10)
            file.write(b'{"b": 2}')

    writer = threading.Thread(target=feed)
    writer.start()
    opened = open_input(str(fifo))
    assert (opened.size, opened.total, opened.fingerprint) == (None, None, None)
    lines = iter(opened)
    assert next(lines) == Line(1, b'{"a": 1}')
    has_read_first.set()
    assert list(lines) == [Line(2, b'{"b": 2}')]
    assert opened.total == 2
    writer.join()
    with pytest.raises(ValueError, match="only once"):
        list(opened)


def test_stdin_is_read_without_pytorch() -> None:
    program = (
        "import sys\n"
        "from nanovllm.jobs.lines.answers import answered, error_answer\n"
        "from nanovllm.jobs.sources.readers import open_input\n"
        "print([line.number for line in open_input('-', (1, 2))])\n"
        "print('torch' in sys.modules, 'pyarrow' in sys.modules, 'datasets' in sys.modules)\n"
    )
    data = gzip.compress(b"1\n2\n3\n4\n")
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True)
    assert done.stdout.decode().splitlines() == ["[2, 4]", "False False False"], done.stderr


def test_what_cannot_be_an_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_input(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="no dataset of save_to_disk"):
        open_input(str(tmp_path))
    for coding in ("utf-16", "utf-16-be"):
        mark = b"\xfe\xff" if coding == "utf-16-be" else b""
        path = write(tmp_path / "in.jsonl", mark + '{"a": 1}\n'.encode(coding))
        with pytest.raises(ValueError, match="UTF-16"):
            list(open_input(path))
    broken = write(tmp_path / "in.parquet", b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="in.parquet is no Parquet file"):
        open_input(broken)


# --- tables ---------------------------------------------------------------------------------------


def test_values_of_tables_become_json(tmp_path: Path) -> None:
    columns = {
        "prompt": ["a", "é"],
        "n": [1, None],
        "when": pa.array([1, None], pa.timestamp("us", "UTC")),
        "nanoseconds": pa.array([1, 2], pa.timestamp("ns")),
        "day": [datetime.date(2024, 2, 29), None],
        "took": [datetime.timedelta(milliseconds=1500), None],
        "price": [Decimal("1.50"), None],
        "text": pa.array([b"text", b"\xff\xfe"], pa.binary()),
        "score": [float("nan"), 0.25],
        "messages": [[{"role": "user", "content": "Hi"}], []],
        "map": pa.array([[("k", 1.5)], []], pa.map_(pa.string(), pa.float32())),
    }
    path = tmp_path / "table"  # what a file is shows in its first bytes
    pq.write_table(pa.table(columns), path)
    opened = open_input(str(path))
    assert opened.total == 2
    first, second = [json.loads(line.data) for line in opened]
    assert first == {
        "prompt": "a",
        "n": 1,
        "when": "1970-01-01T00:00:00.000001+00:00",
        "nanoseconds": "1970-01-01T00:00:00.000000001",
        "day": "2024-02-29",
        "took": 1.5,
        "price": "1.50",
        "text": "text",
        "score": None,
        "messages": [{"role": "user", "content": "Hi"}],
        "map": [["k", 1.5]],
    }
    assert second["text"] == "//4="
    assert second["score"] == 0.25


def test_other_values_of_rows() -> None:
    row = {"a": np.arange(2), "b": np.float32(0.5), 5: {1: (2,)}, "c": float("inf")}
    assert json.loads(row_data(row)) == {"a": [0, 1], "b": 0.5, "5": {"1": [2]}, "c": None}  # type: ignore[arg-type]


def test_one_bad_value_is_an_error_of_its_row_alone(tmp_path: Path) -> None:
    not_utf8 = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"prompt": not_utf8}), path)
    lines = list(open_input(str(path)))
    assert [line.number for line in lines] == [1, 2, 3]
    assert [lines[0].data, lines[2].data] == [b'{"prompt":"a"}', b'{"prompt":"c"}']
    bad = [lines[1], Line(9, row_data({"custom_id": "seven", "prompt": object()}))]
    for line in bad:
        with pytest.raises(LineError, match="column prompt") as caught:
            parse_line(line, LineOptions("m"))
        assert (caught.value.code, caught.value.param) == ("unsupported_value", "prompt")


def table_of(number: int) -> pa.Table:
    return pa.table({"id": list(range(1, number + 1))})


def write_tables(path: Path, number: int) -> dict[str, str]:
    """The same rows in all kinds of tables."""
    table = table_of(number)
    paths = {name: str(path / name) for name in ("parquet", "stream.arrow", "file.arrow", "saved")}
    pq.write_table(table, paths["parquet"], row_group_size=50)
    for name, open_writer in (
        ("stream.arrow", pa.ipc.new_stream),
        ("file.arrow", pa.ipc.new_file),
    ):
        with open_writer(paths[name], table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    backwards = datasets.Dataset.from_dict({"id": list(range(number, 0, -1))})
    # Its rows stay in the file as they were, and an index says where each is.
    backwards.select(range(number - 1, -1, -1)).save_to_disk(paths["saved"])
    return paths


def test_rows_of_tables_are_lines(tmp_path: Path) -> None:
    for name, path in write_tables(tmp_path, 150).items():
        opened = open_input(path)
        assert opened.total == 150, name
        expected = {i: b'{"id":%d}' % i for i in range(1, 151)}
        assert numbered(opened) == expected, name
        assert opened.fingerprint == open_input(path).fingerprint
        shard = open_input(path, (2, 7))
        chosen = [i for i in expected if i % 7 == 1]
        assert shard.total == len(chosen)
        assert list(numbered(shard)) == chosen, name
        some = {line.number: line.data for line in opened.source.lines(lambda number: number > 149)}
        assert some == {150: b'{"id":150}'}, name


def test_a_dataset_of_several_splits_names_them(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"id": [1]})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(ValueError, match="both/train, .*both/test"):
        open_input(str(tmp_path / "both"))


def test_the_files_of_a_directory_follow_each_other(tmp_path: Path) -> None:
    pq.write_table(table_of(3), tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", b"\n1\n")
    write(tmp_path / "c.jsonl.gz", gzip.compress(b"\n2\n"))
    write(tmp_path / "README.md", b"no line of these")
    write(tmp_path / ".hidden.jsonl", b"nor this\n")
    opened = open_input(str(tmp_path))
    before = opened.fingerprint
    assert opened.total is None  # nobody knows how many lines are in the last one
    expected = {
        2: b"1",
        3: b'{"id":1}',
        4: b'{"id":2}',
        5: b'{"id":3}',
        7: b"2",
    }
    assert numbered(opened) == expected
    assert opened.total == 5
    assert list(numbered(open_input(str(tmp_path), (2, 2)))) == [3, 5, 7]
    write(tmp_path / "c.jsonl.gz", gzip.compress(b"\n3\n"))
    assert open_input(str(tmp_path)).fingerprint != before


def test_a_large_directory_is_not_counted(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, b"y\n" * 100)
    assert open_input(str(tmp_path)).total == 200
    monkeypatch.setattr("nanovllm.jobs.sources.folders.COUNTED_BYTES", 100)
    opened = open_input(str(tmp_path))
    assert opened.total is None
    lines = iter(opened)
    for _ in range(101):
        next(lines)
    assert opened.total == 200
