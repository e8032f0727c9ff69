"""Scripts as people write them for vLLM, of which only the import and the model are others."""

import ast
import json
import re
import runpy
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "vllm_scripts"
# What vLLM exports under these names, and its modules of these names; and our model.
EXPORTS = {
    "BeamSearchParams",
    "CompletionOutput",
    "LLM",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "DEMO_MODEL",
}
MODULES = {"nanovllm", "nanovllm.inputs", "nanovllm.outputs", "nanovllm.sampling_params"}
# Options, and keys of results, that only we have.
OURS = {
    "attention_backend",
    "completions",
    "device",
    "eos",
    "kvcache_block_size",
    "num_kvcache_blocks",
    "text",
    "token_ids",
}


def check_basic(text: str) -> None:
    assert text.count("Prompt:    '") == text.count("Output:    '") == 4
    assert "Prompt:    'introduce yourself'" in text


def check_generate(text: str) -> None:
    assert text.count("finished: True") == 5 and text.count("  [0] '") == 5
    assert "  [2] '" in text and "      token " in text and "(rank 1)" in text
    assert "'Write a haiku.'" in text and "None, finished" in text
    assert "  [0] ''\n      5 tokens, ended by length" in text


def check_chat(text: str) -> None:
    assert text.count("Generated text: '") == 5
    assert "user: introduce yourself\\nassistant:'" in text
    assert "I am the demo" in text


def check_prefix_caching(text: str) -> None:
    assert "All hit: True" in text and "Generated answers are the same: True" in text
    assert text.count("Cached: 0 of") == 3


def check_reproducibility(text: str) -> None:
    assert "Runs with one engine seed agree: True" in text
    assert "Requests with one seed agree: True" in text


def check_weight_update(text: str) -> None:
    assert "Tokens have changed: True" in text
    assert "Tokens are kept by a sleep: True" in text
    assert "Tokens are back: True" in text


def check_structured_outputs(text: str) -> None:
    lines = re.findall(r"^(\w+): (.*) \(stop\)$", text, re.MULTILINE)
    answers = {name: literal_eval(answer) for name, answer in lines}
    assert answers["choice"] in ("positive", "negative")
    assert re.fullmatch(r"[a-z]{2,8}@[a-z]{2,8}\.com", answers["regex"])
    review = json.loads(answers["json"])
    assert list(review) == ["title", "stars", "mood"] and 1 <= review["stars"] <= 5
    assert re.fullmatch(r"[0-9()+-]+", answers["grammar"])
    assert isinstance(eval(answers["grammar"]), int)  # the brackets match


def check_embed(text: str) -> None:
    assert text.count("Prompt: '") == text.count("Embedding: [") == 4
    assert "Nearest to 'introduce yourself': 'introduce yourself' (1.000)" in text
    assert "Nearest to 'The sky is blue': '" in text
    assert "Cut to 32, length 1.000" in text


def check_beam_search(text: str) -> None:
    assert text.count("Prompt: '") == 2 and text.count(" tokens: '") == 6
    assert text.count(" tokens: 'introduce yourself") == 3


# What each of them must print. A new script takes a new function here.
CHECKS: dict[str, Callable[[str], None]] = {
    "basic": check_basic,
    "generate": check_generate,
    "chat": check_chat,
    "prefix_caching": check_prefix_caching,
    "beam_search": check_beam_search,
    "reproducibility": check_reproducibility,
    "weight_update": check_weight_update,
    "structured_outputs": check_structured_outputs,
    "embed": check_embed,
}


def test_all_scripts_are_run() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} == set(CHECKS)


@pytest.mark.parametrize("name", CHECKS)
def test_a_script_runs(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = SCRIPTS / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
    CHECKS[name](capsys.readouterr().out)


@pytest.mark.parametrize("name", CHECKS)
def test_a_script_would_run_with_vllm_but_for_import_and_model(name: str) -> None:
    tree = ast.parse((SCRIPTS / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("nanovllm") for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nanovllm"):
            assert node.module in MODULES
            assert {alias.name for alias in node.names} <= EXPORTS
        if isinstance(node, ast.keyword):
            assert node.arg not in OURS
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            assert node.slice.value not in OURS  # results as dicts
