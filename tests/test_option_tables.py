"""The option tables of README.md and docs/OPTIONS.md have the names and defaults of the code."""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from nanovllm import BeamSearchParams, PoolingParams, SamplingParams, StructuredOutputsParams
from nanovllm.config import Config
from nanovllm.jobs.command.cli_options import Parser, RunBatchOptions

ROOT = Path(__file__).parents[1]


def read_table(path: str, first_cell: str) -> dict[str, str]:
    """Name -> default, both as they are written, of the table below (or that begins with) this."""
    text = (ROOT / path).read_text("utf-8")
    table = text[text.index(first_cell) :]
    rows = re.search(r"\|---\|---\|---\|\n((?:\|.*\n)+)", table)
    assert rows
    found = {}
    for row in rows[1].splitlines():
        _, names, defaults, *_ = row.split("|")
        names = re.findall(r"`(\w+)`", names)
        defaults = [default.strip() for default in defaults.split(",")]
        if len(defaults) == 1:  # the same of all
            defaults *= len(names)
        found.update(zip(names, defaults, strict=True))
    return found


def defaults_of(options: Any) -> dict[str, str]:
    """The same, of a dataclass."""
    found = {}
    for field in fields(options):
        default = field.default
        if default is MISSING:
            found[field.name] = ""
        else:
            found[field.name] = f'"{default}"' if isinstance(default, str) else str(default)
    return found


@pytest.mark.parametrize(
    "heading, options",
    [
        ("## `LLM`", Config),
        ("## `SamplingParams`", SamplingParams),
        ("## `StructuredOutputsParams`", StructuredOutputsParams),
        ("## `BeamSearchParams`", BeamSearchParams),
        ("## `embed` and `score`", PoolingParams),
    ],
)
def test_the_reference_is_complete(heading: str, options: Any) -> None:
    defaults = defaults_of(options)
    if options is Config:
        del defaults["model"]  # the one that has no name in a call
    assert read_table("docs/OPTIONS.md", heading) == defaults


def test_the_options_that_only_the_command_has_are_listed() -> None:
    parser = Parser(prog="nanovllm run-batch")
    RunBatchOptions(parser)
    elsewhere = {*defaults_of(Config), *defaults_of(SamplingParams)} - {"model"}
    own = {action.dest for action in parser._actions} - elsewhere - {"help"}
    text = (ROOT / "docs/JOBS.md").read_text("utf-8")
    rows = re.findall(r"^\| `-.*", text[: text.index("| exit status |")], flags=re.M)
    flags = [flag for row in rows for flag in re.findall(r"`--([\w-]+)`", row.split("|")[1])]
    listed = {flag.replace("-", "_").replace("no_progress", "progress") for flag in flags}
    assert listed == own


@pytest.mark.parametrize(
    "first_cell, options",
    [("| `LLM(model, ...)`", Config), ("| `SamplingParams(...)`", SamplingParams)],
)
def test_what_the_readme_lists_is_right(first_cell: str, options: Any) -> None:
    listed = read_table("README.md", first_cell)
    assert listed.items() <= defaults_of(options).items()
    assert len(listed) >= 8
