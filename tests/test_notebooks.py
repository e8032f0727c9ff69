"""Every notebook runs from a clean kernel, its folded solutions too, and together they meet every
class by name.
"""

import ast
import re
import sys
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from run_notebooks import CODE, NOTEBOOKS, SOLUTION, clean, execute, pictures, with_solutions  # noqa: E402

SECONDS = 60  # each, its solutions included; on an idle machine a tenth of that, or half (10)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def test_they_are_in_reading_order() -> None:
    numbers = [int(path.name.partition("_")[0]) for path in NOTEBOOKS]
    assert numbers == [*range(1, 11)]
    readme = (ROOT / "README.md").read_text()
    links = [readme.index(f"(notebooks/{path.name})") for path in NOTEBOOKS]
    assert links == sorted(links)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    notebook = with_solutions(read(path))
    start = time.perf_counter()
    execute(notebook, timeout=SECONDS)
    assert time.perf_counter() - start < SECONDS
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error" and output.get("name") != "stderr", output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_with_outputs_and_nothing_of_the_machine(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    stored = nbformat.writes(notebook)
    clean(notebook)
    assert nbformat.writes(notebook) == stored, "run scripts/run_notebooks.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert all(
        output.output_type != "error" and output.get("name") != "stderr" for output in outputs
    )
    text = re.sub(r'"image/png": "[^"]*"', "", stored)
    assert not re.search(
        r"/(?:root|home|work|tmp|Users)/|0x[0-9a-f]{6,}", text
    )  # paths, addresses of objects
    # Two or three exercises, each with its solution folded.
    last = notebook.cells[-1].source
    exercises = re.findall(
        r"^\d\. ", last[last.index("## Exercises") : last.index("<details>")], re.MULTILINE
    )
    solutions = SOLUTION.findall(last)
    assert 2 <= len(exercises) == len(solutions) <= 3
    assert all(CODE.search(solution) and "<summary>" in solution for solution in solutions)


def test_readme_shows_pictures_of_the_stored_notebooks() -> None:
    readme = (ROOT / "README.md").read_text()
    stored = {path: png for notebook in NOTEBOOKS for path, png in pictures(read(notebook)).items()}
    assert len(stored) >= 2
    for path, png in stored.items():
        assert (ROOT / path).read_bytes() == png, "run scripts/run_notebooks.py"
        assert len(png) < 200_000 and f"]({path})" in readme, path


def test_every_class_is_met_by_name() -> None:
    text = "".join(
        cell.source + str(cell.get("outputs", ""))
        for path in NOTEBOOKS
        for cell in read(path).cells
    )
    # Not those of kernels, which say how large tiles are, of all models but one, of all formats of
    # weights but one, and of what a job does to its files.
    others = {
        "kernels": (),
        "models": ("__init__.py", "causal_lm.py", "qwen3.py"),
        "quantization": ("weight_format.py", "unquantized.py"),
        "jobs": (),
    }
    package = ROOT / "nanovllm"
    files = {file: file.relative_to(package).parts[0] for file in package.rglob("*.py")}
    classes = [
        node.name
        for file, folder in files.items()
        if folder not in others or file.name in others[folder]
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        # Nor exceptions, whose place is where they are raised.
        and not any(ast.unparse(base).endswith("Error") for base in node.bases)
    ]
    assert len(classes) > 30
    assert [name for name in classes if not re.search(rf"\b{name}s?\b", text)] == []
