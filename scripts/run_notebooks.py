"""Execute notebooks from a clean kernel and store their outputs, always in the same form.

    python scripts/run_notebooks.py                           # all of notebooks/
    python scripts/run_notebooks.py notebooks/1_one_request.ipynb

It needs the extra `notebook`. The kernel is this interpreter, whatever kernels are registered.
Cells get fixed ids; execution times, the kernel's version and anything with a path of this machine
in it are not kept. The figure of a cell whose first line is a path, "# docs/work_list.png", is
written there too: README shows it.
"""

import argparse
import base64
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
# In reading order: by the number that a name begins with.
NOTEBOOKS = sorted(
    (ROOT / "notebooks").glob("*.ipynb"), key=lambda path: int(path.name.partition("_")[0])
)
SOLUTION = re.compile(r"<details>.*?</details>", re.DOTALL)
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PICTURE_PATH = re.compile(r"# (docs/\w+\.png)\n")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(notebook: NotebookNode, timeout: int = 60) -> None:
    """Run all cells, in this interpreter and in notebooks/.

    Args:
        notebook: gets the outputs.
        timeout: most seconds for a cell.

    Raises:
        CellExecutionError: a cell failed.
    """
    manager = AsyncKernelManager()
    # This interpreter, whatever is registered as python3.
    manager._kernel_spec = KernelSpec(**get_kernel_dict())
    # One thread: the model is so small that a second one only waits. No GPU: so that a reader
    # without one gets the same outputs.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    resources = {"metadata": {"path": ROOT / "notebooks"}}
    client = NotebookClient(
        notebook, km=manager, timeout=timeout, resources=resources, coalesce_streams=True
    )
    client.execute(env=env, cleanup_kc=True)  # ends the kernel too


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """A copy whose folded solutions follow as cells, so that they are run too."""
    copy = nbformat.from_dict(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for solution in SOLUTION.findall(cell.source):
                copy.cells += [nbformat.v4.new_code_cell(code) for code in CODE.findall(solution)]
    return copy


def clean(notebook: NotebookNode) -> None:
    """Leave out what differs from run to run or tells of the machine."""
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5
    for index, cell in enumerate(notebook.cells, start=1):
        cell.id = f"cell-{index:02}"
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            for output in cell.outputs:
                output.get("metadata", {}).clear()
    text = re.sub(r'"image/png": "[^"]*"', "", nbformat.writes(notebook))
    for path in {str(ROOT), str(Path.home()), sys.prefix}:
        if len(path) > 3 and f"{path}/" in text:
            raise ValueError(f"the output of a cell contains {path}")


def pictures(notebook: NotebookNode) -> dict[str, bytes]:
    """The figures that have a file of their own: its path, and the PNG."""
    found = {}
    for cell in notebook.cells:
        if path := PICTURE_PATH.match(cell.source):
            (figure,) = (output for output in cell.outputs if "image/png" in output.get("data", {}))
            found[path[1]] = base64.b64decode(figure.data["image/png"])
    return found


def main() -> None:
    """Execute the notebooks that the command line names, or all."""
    parser = argparse.ArgumentParser(description="Execute notebooks and store their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path, default=NOTEBOOKS)
    for path in parser.parse_args().notebooks:
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        execute(notebook)
        clean(notebook)
        nbformat.write(notebook, path)
        for picture_path, png in pictures(notebook).items():
            (ROOT / picture_path).write_bytes(png)
        seconds = time.perf_counter() - start
        print(f"{path.name}: {seconds:.1f} s, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
