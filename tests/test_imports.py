"""Who imports whom in nanovllm/, read from the source: nothing is imported to find out.

The parts of the package form an order, and each imports only from itself and from the parts behind
it. So each part can be read, tested and replaced without what is built upon it.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    "__main__",
    "jobs",
    "llm",
    "training",
    "beam_search",
    "pooling",
    "engine",
    "parallel",
    "models",
    "readout",
    "layers",
    "sampling",
    "quantization",
    "kernels",
)
# All may import these; they import no part.
LEAVES = (
    "utils",
    "config",
    "sampling_params",
    "outputs",
    "collector",
    "exclusive",
    "progress",
    "results",
    "inputs",
    "params",
    "checkpoints",
    "sharing",
    "vllm_compat",
    "text",
    "trace",
    "trace_views",
    "warm_up",
)
WITHOUT_TORCH = (
    "engine.scheduler",
    "engine.block_manager",
    "engine.sequence",
    "readout.readout",
    "text.detokenizer",
)
TORCH = ("torch", "triton")

Imports = dict[str, set[str]]  # dotted name of each module -> dotted names of what it imports


# --- the checker --------------------------------------------------------------------------------


def is_type_checking(test: ast.expr) -> bool:
    """Whether this is the condition of an `if TYPE_CHECKING:`."""
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports below `node`, also inside functions, but not those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.orelse:  # an `else` is what happens at run time
                yield from import_statements(ast.Module([statement], []))
        else:
            yield from import_statements(child)


def imported_names(statement: ast.Import | ast.ImportFrom, package: str) -> Iterator[str]:
    """Dotted names, as far as the statement tells: `from a import b` gives `a.b`.

    Args:
        statement: an import.
        package: dotted name of the package that the statement's module is in, for relative imports.
    """
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            yield alias.name
        return
    source = statement.module or ""
    if statement.level > 0:
        parents = package.split(".")
        base = ".".join(parents[: len(parents) - statement.level + 1])
        source = f"{base}.{source}".rstrip(".")
    for alias in statement.names:
        yield f"{source}.{alias.name}"


def read_imports(directory: Path) -> Imports:
    """What each module of the package in `directory` imports.

    A name inside the package becomes the module that it is in: of `nanovllm.config.Config`,
    `nanovllm.config` is kept. Names outside stay as they are.
    """
    package = directory.name
    files: dict[str, Path] = {}
    for path in directory.rglob("*.py"):
        parts = path.relative_to(directory.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path

    def module_of(name: str) -> str:
        while name not in files and "." in name:
            name = name.rpartition(".")[0]
        return name

    imports: Imports = {}
    for module, path in files.items():
        parent = module if path.name == "__init__.py" else module.rpartition(".")[0]
        imports[module] = set()
        for statement in import_statements(ast.parse(path.read_text())):
            for name in imported_names(statement, parent):
                is_ours = name.split(".")[0] == package
                imports[module].add(module_of(name) if is_ours else name)
        imports[module].discard(module)  # `from nanovllm.engine import x` inside engine/__init__.py
    return imports


def part_of(module: str) -> str:
    """The part that a module belongs to; the __init__ of the whole package counts as llm."""
    _, _, rest = module.partition(".")
    return rest.split(".")[0] if rest else "llm"


def wrong_directions(imports: Imports) -> list[str]:
    """A sentence for each import that goes against the order, and for each part without a place."""
    package = next(iter(imports)).split(".")[0]
    problems = []
    for module, names in sorted(imports.items()):
        part = part_of(module)
        if part not in ORDER + LEAVES:
            problems.append(f"{module}: {part} has no place in the order")
            continue
        for name in sorted(names):
            if name.split(".")[0] != package:
                continue
            target = part_of(name)
            if part in LEAVES and target not in LEAVES:
                problems.append(f"{module} imports {name}: {part} is a leaf")
            elif target in ORDER and part in ORDER and ORDER.index(target) < ORDER.index(part):
                problems.append(f"{module} imports {name}: {target} is above {part}")
    return problems


def circle(imports: Imports) -> list[str]:
    """The modules of a circle of imports, the first again at the end; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def ways_to_torch(imports: Imports, module: str) -> list[str]:
    """Each import of PyTorch or Triton that importing `module` leads to, with the module it is in.

    Packages' __init__ files, which Python runs on the way to a module inside them, are left out:
    nanovllm's own imports everything.
    """
    reached = {module}
    to_do = [module]
    found = []
    while to_do:
        current = to_do.pop()
        for name in sorted(imports[current]):
            if name.split(".")[0] in TORCH:
                found.append(f"{module} reaches {name}, imported by {current}")
            elif name in imports and name not in reached:
                reached.add(name)
                to_do.append(name)
    return found


# --- nanovllm -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imports() -> Imports:
    return read_imports(ROOT / "nanovllm")


def test_the_package_is_read(imports: Imports) -> None:
    assert "nanovllm.engine.scheduler" in imports["nanovllm.engine.llm_engine"]
    assert any(name.startswith("torch") for name in imports["nanovllm.engine.model_runner"])


def test_imports_go_one_way(imports: Imports) -> None:
    assert wrong_directions(imports) == []


def test_no_circle_of_imports(imports: Imports) -> None:
    assert circle(imports) == []


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_the_scheduler_and_what_it_works_with_need_no_torch(imports: Imports, name: str) -> None:
    assert ways_to_torch(imports, f"nanovllm.{name}") == []


# --- the checker finds what it is meant to find -------------------------------------------------


def write_package(directory: Path, files: dict[str, str]) -> Imports:
    """Write a small package named `made` and read its imports."""
    for name, source in {"__init__.py": "", **files}.items():
        path = directory / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_imports(directory / "made")


@pytest.mark.parametrize(
    "file, source, problem",
    [
        (
            "layers/linear.py",
            "from made.engine.trace import Trace",
            "made.layers.linear imports made.engine.trace: engine is above layers",
        ),
        (
            "layers/linear.py",
            "from made.engine import trace",
            "made.layers.linear imports made.engine.trace: engine is above layers",
        ),
        (
            "layers/linear.py",
            "import made.engine.trace as t",
            "made.layers.linear imports made.engine.trace: engine is above layers",
        ),
        (
            "layers/linear.py",
            "from ..engine.trace import Trace",
            "made.layers.linear imports made.engine.trace: engine is above layers",
        ),
        (
            "layers/__init__.py",
            "from ..engine import trace",
            "made.layers imports made.engine.trace: engine is above layers",
        ),
        (
            "kernels/gemv.py",
            "def run():\n    try:\n        from made import LLM\n    finally:\n        pass",
            "made.kernels.gemv imports made: llm is above kernels",
        ),
        (
            "config.py",
            "from made.kernels import gemv",
            "made.config imports made.kernels: config is a leaf",
        ),
        (
            "utils/checks.py",
            "from made.engine.trace import Trace",
            "made.utils.checks imports made.engine.trace: utils is a leaf",
        ),
        ("helpers.py", "", "made.helpers: helpers has no place in the order"),
    ],
)
def test_a_wrong_direction_is_found(tmp_path: Path, file: str, source: str, problem: str) -> None:
    packages = {"engine/__init__.py": "", "engine/trace.py": "", "kernels/__init__.py": ""}
    assert wrong_directions(write_package(tmp_path, {**packages, file: source})) == [problem]


def test_a_circle_is_found(tmp_path: Path) -> None:
    files = {
        "engine/a.py": "from made.engine.b import B",
        "engine/b.py": "def late():\n    from made.engine import c",
        "engine/c.py": "import made.engine.a",
        "engine/d.py": "from made.engine import a",
    }
    found = circle(write_package(tmp_path, files))
    assert found[0] == found[-1]
    assert set(found) == {"made.engine.a", "made.engine.b", "made.engine.c"}


def test_a_way_to_torch_is_found(tmp_path: Path) -> None:
    files = {
        "engine/scheduler.py": "from made.engine.sequence import Sequence",
        "engine/sequence.py": "def late():\n    from made import config",
        "config.py": "from torch.nn import functional",
    }
    expected = ["made.engine.scheduler reaches torch.nn.functional, imported by made.config"]
    assert ways_to_torch(write_package(tmp_path, files), "made.engine.scheduler") == expected


def test_what_is_right_is_left_alone(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from made.llm import LLM",
        "jobs/batch.py": "from made import LLM",
        "llm.py": "from made.engine.scheduler import Scheduler\nfrom made.config import Config",
        "engine/scheduler.py": (
            "from typing import TYPE_CHECKING\n"
            "from made.engine.sequence import Sequence\n"
            "if TYPE_CHECKING:\n"
            "    import torch\n"
            "    from made.llm import LLM\n"
            "else:\n"
            "    from made.outputs import Output\n"
        ),
        "engine/sequence.py": "import xxhash",
        "engine/runner.py": "import torch\nfrom made.layers.linear import Linear",
        "layers/linear.py": (
            "import typing\nif typing.TYPE_CHECKING:\n    from made.engine.runner import Runner"
        ),
        "config.py": "from made.utils.checks import check",
        "utils/checks.py": "from made.sampling_params import SamplingParams",
        "sampling_params.py": "",
        "outputs.py": "",
    }
    imports = write_package(tmp_path, files)
    assert imports["made.engine.scheduler"] == {
        "typing.TYPE_CHECKING",
        "made.engine.sequence",
        "made.outputs",
    }
    assert wrong_directions(imports) == []
    assert circle(imports) == []
    assert ways_to_torch(imports, "made.engine.scheduler") == []
