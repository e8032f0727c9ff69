"""`import nanovllm` imports no PyTorch, and the names that it offers are there when asked for."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import nanovllm

LISTED = set(nanovllm.__all__) - {"DEMO_MODEL"}


def test_the_three_lists_of_names_agree() -> None:
    source = ast.parse(Path(nanovllm.__file__).read_text())
    for_type_checkers = {
        alias.name: statement.module
        for block in source.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert for_type_checkers == nanovllm._MODULES
    assert set(for_type_checkers) == LISTED


def test_each_name_is_the_one_of_its_module() -> None:
    for name, module in nanovllm._MODULES.items():
        assert getattr(nanovllm, name) is getattr(import_module(module), name)
    assert set(dir(nanovllm)) >= LISTED


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        nanovllm.LLMs  # noqa: B018


def test_importing_the_package_imports_no_torch() -> None:
    code = """
import sys, nanovllm
assert "torch" not in sys.modules and "transformers" not in sys.modules
from nanovllm import LLM
assert "torch" in sys.modules and LLM.__module__ == "nanovllm.llm"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
