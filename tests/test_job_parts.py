"""The small parts of a job: sets of numbers, ids, manifests, and options read from the source."""

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.config import Config
from nanovllm.jobs.command import custom_ids as custom_ids_module
from nanovllm.jobs.command.custom_ids import CustomIds, find_custom_id
from nanovllm.jobs.command.declared_options import DeclaredOption, declared_options
from nanovllm.jobs.command.manifest import (
    ENDING,
    WITHOUT_EFFECT,
    check_manifest,
    describe_engine,
    digest_files,
)
from nanovllm.jobs.command.numbers import NumberSet
from nanovllm.jobs.command.output import OutputError
from nanovllm.sampling_params import SamplingParams


@given(st.sets(st.integers(0, 300_000) | st.integers(0, 10**18), max_size=50))
def test_a_set_of_numbers(numbers: set[int]) -> None:
    found = NumberSet()
    for number in [*numbers, *numbers]:
        found.add(number)
    near = {each for number in numbers for each in (number - 1, number, number + 1) if each >= 0}
    assert {number for number in near if number in found} == numbers
    assert len(found) == len(numbers)


# --- ids ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, custom_id",
    [
        (b'{"custom_id": "a", "body": {}}', b"a"),
        (b' { "custom_id" :"a b"}', b"a b"),
        (b'{"url": "x", "custom_id": "late"}', b"late"),
        (b'{"custom_id": "\\u0061\\"", "x": 1}', b'a"'),
        ('{"custom_id": "é"}'.encode(), "é".encode()),
        (b'{"x": 1, "custom_id": "\\u00e9"}', "é".encode()),
        (b'{"body": {"custom_id": "inner"}, "custom_id": "outer"}', b"outer"),
        (b'{"body": {"custom_id": "inner"}}', None),
        (b'{"prompt": "say \\"custom_id\\": \\"b\\""}', None),
        (b'{"custom_id": 5}', None),
        (b'["custom_id"]', None),
        (b'{"x": "custom_id", "custom_id": ', None),
        (b"\xff\xfe", None),
        (b'{"x": ' + b"[" * 100_000 + b', "custom_id": "a"', None),
    ],
)
def test_the_id_of_a_line(line: bytes, custom_id: bytes | None) -> None:
    assert find_custom_id(line) == custom_id


def test_the_first_line_of_each_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_ids_module, "FIRST_TABLE", 4)  # so that there are many tables
    ids = CustomIds()
    for number in range(1, 1001):
        assert ids.first_line(b"id %d" % number, number) == number
    for number in range(1, 1001):
        assert ids.first_line(b"id %d" % number, 1000 + number) == number
    assert len(ids._tables) == 9
    assert all(table.num_used <= 0.75 * table.num_slots for table in ids._tables)


def test_ids_whose_hashes_agree_in_64_bits_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {b"a": 7 << 64 | 1, b"b": 7 << 64 | 2, b"c": 8 << 64 | 1}
    fake = SimpleNamespace(xxh3_128_intdigest=hashes.__getitem__)
    monkeypatch.setattr(custom_ids_module, "xxhash", fake)
    ids = CustomIds()
    for number, custom_id in enumerate(hashes, start=1):
        assert ids.first_line(custom_id, number) == number
    for number, custom_id in enumerate(hashes, start=1):
        assert ids.first_line(custom_id, 9) == number


# --- manifests ------------------------------------------------------------------------------------


def test_another_job_is_refused_with_both_values(tmp_path: Path) -> None:
    output = str(tmp_path / "out.jsonl")
    job = {"input": {"size": 3}, "engine": {"seed": 0, "dtype": "a"}, "shard": (1, 2), "note": "x"}
    check_manifest(output, job, may_replace=True)
    check_manifest(output, {**job, "note": "elsewhere"}, may_replace=False)
    other = {**job, "engine": {"seed": 1, "dtype": "a"}, "shard": None, "new": [1]}
    with pytest.raises(OutputError) as error:
        check_manifest(output, other, may_replace=False)
    assert str(error.value).splitlines()[1:] == [
        "  engine: seed was 0, and is 1",
        "  shard was [1, 2], and is null",
        "  new was null, and is [1]",
        "Pass --overwrite to begin anew, or write to another file (-o).",
    ]
    check_manifest(output, other, may_replace=True)
    check_manifest(output, other, may_replace=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl" + ENDING]


def test_an_output_without_a_readable_manifest_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    for content in (None, "", "[1]", "{"):
        if content is not None:
            (tmp_path / ("out.jsonl" + ENDING)).write_text(content)
        with pytest.raises(OutputError, match="which job wrote it cannot be read"):
            check_manifest(str(output), {}, may_replace=False)


def test_other_weights_are_another_model(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    data = bytearray(300_000)
    weights.write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    digests = {digest_files(str(tmp_path))}
    for place in (0, 150_001, 299_999):
        data[place] = 1
        weights.write_bytes(data)
        digests.add(digest_files(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"x": 1}')
    digests.add(digest_files(str(tmp_path)))
    (tmp_path / "README.md").write_text("is not read")
    digests.add(digest_files(str(tmp_path)))
    assert len(digests) == 5


def test_a_manifest_has_the_options_that_change_answers(
    demo_config: Config, tmp_path: Path
) -> None:
    output = str(tmp_path / "out.jsonl")
    check_manifest(output, describe_engine(demo_config), may_replace=True)
    check_manifest(output, describe_engine(demo_config), may_replace=False)
    described = json.loads(Path(output + ENDING).read_text())
    assert described["dtype"] == "torch.float32" and described["seed"] == 0
    names = {field.name for field in fields(Config)}
    assert names >= WITHOUT_EFFECT
    assert described.keys() >= names - WITHOUT_EFFECT
    assert not described.keys() & WITHOUT_EFFECT


@pytest.fixture(scope="module")
def demo_config() -> Config:
    from nanovllm import DEMO_MODEL

    return Config.from_options(DEMO_MODEL, {"device": "cpu"})


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [Config, SamplingParams],
)
def test_all_fields_are_found_in_the_source(options: type) -> None:
    declared = {each.name: each for each in declared_options(options.__module__, options.__name__)}
    expected = [field for field in fields(options) if field.default is not MISSING]
    assert list(declared) == [field.name for field in expected]
    for field in expected:
        option = declared[field.name]
        assert option.default == repr(field.default)
        assert option.comment, f"{field.name} has no comment to be its help"
        assert "type: ignore" not in option.comment and "#" not in option.comment


def read(option: DeclaredOption, text: str) -> Any:
    try:
        return option.read_value(text)
    except argparse.ArgumentTypeError as error:
        return str(error)


def test_values_are_read_by_the_types_of_the_fields() -> None:
    options = {
        option.name: option
        for module, name in [
            ("nanovllm.config", "Config"),
            ("nanovllm.sampling_params", "SamplingParams"),
        ]
        for option in declared_options(module, name)
    }
    for name, text, value in [
        ("max_num_seqs", "8", 8),
        ("max_num_seqs", "many", "must be an integer, not 'many'"),
        ("gpu_memory_utilization", "0.5", 0.5),
        ("gpu_memory_utilization", "half", "must be a number, not 'half'"),
        ("max_tokens", "none", None),
        ("max_num_seqs", "none", "must be an integer, not 'none'"),
        ("dtype", "half", "half"),
        ("device", "cpu", "cpu"),
        ("tokenizer", "[a]", "[a]"),
        ("eos", "[1, 2]", [1, 2]),
        ("eos", "-1", -1),
        ("hf_overrides", '{"a": {"b": 1}}', {"a": {"b": 1}}),
        ("hf_overrides", "{a}", "must be JSON, not '{a}'"),
        ("stop", "###", "###"),
        ("stop", '["a", "b"]', ["a", "b"]),
        ("stop_token_ids", "[5]", [5]),
    ]:
        assert read(options[name], text) == value, name
    assert options["attention_backend"].choices[-1] == "torch"
