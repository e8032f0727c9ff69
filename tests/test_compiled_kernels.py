"""Every kernel compiles for Hopper, which the interpreter does not show, and CI has no GPU to."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm import kernels
from nanovllm.kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
KERNELS = Path(kernels.__path__[0])


def compile_kernels(part: str, cache: Path) -> set[str]:
    """The names of the kernels that a part of tests/compile_kernels.py compiles.

    In a process of its own: this one runs them in the interpreter.
    """
    script = Path(__file__).with_name("compile_kernels.py")
    env = {**os.environ, "PYTHONPATH": str(KERNELS.parents[1]), "TRITON_CACHE_DIR": str(cache)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script), part]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


@pytest.mark.parametrize("part", ["attention", "formats", "rest"])
def test_a_part_of_them_compiles(part: str, tmp_path: Path) -> None:
    assert len(compile_kernels(part, tmp_path)) > 3


def test_the_parts_are_all_kernels(tmp_path: Path) -> None:
    written = {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())
    }
    assert len(written) > 10 and compile_kernels("names", tmp_path) == written
