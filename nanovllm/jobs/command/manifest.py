"""What a job is, kept beside its output: the answers of two jobs must not get into one file."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from nanovllm.jobs.command.output import OutputError, explain

if TYPE_CHECKING:
    from nanovllm.config import Config

ENDING = ".manifest.json"
# Options that say where and how fast answers are computed, and not which they are: a job may go on
# with others. (A new option counts as one that changes answers until it is named here.)
WITHOUT_EFFECT = {
    "model",  # what its files hold counts, not where they are
    "tokenizer",
    "revision",
    "tokenizer_revision",
    "hf_config",
    "download_dir",
    "device",
    "attention_backend",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "enforce_eager",
    "max_num_batched_tokens",
    "max_num_seqs",
    "kvcache_block_size",
    "num_kvcache_blocks",
    "kv_cache_memory_bytes",
    "enable_prefix_caching",
    "max_logprobs",  # only decides whether a line is refused
}
SAMPLED_BYTES = 1 << 16  # of a weight file: so many at its beginning, in its middle and at its end
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "1_Pooling/config.json")


def describe_engine(config: Config) -> dict[str, Any]:
    """What decides the answers of an engine: its options, as they are in the end, and the files of
    its model.
    """
    options = {field.name: getattr(config, field.name) for field in fields(config)}
    described: dict[str, Any] = {"weights and configuration": digest_files(config.model)}
    if config.tokenizer != config.model and not config.skip_tokenizer_init:
        described["tokenizer"] = digest_files(config.tokenizer)
    for name, value in options.items():
        if name not in WITHOUT_EFFECT:
            described[name] = value
    return described


def check_manifest(output: str, job: dict[str, Any], may_replace: bool) -> None:
    """Write down what a job is, or check that it is the one that was written down.

    Args:
        output: path of the output.
        job: nested dicts; those under "note" are only for people.
        may_replace: whether the output is empty, so that any job may begin.

    Raises:
        OutputError: if it is another job, with what differs; if the manifest cannot be written.
    """
    path = output + ENDING
    job = json.loads(json.dumps(job, default=str))  # as it will be read back: no torch.bfloat16
    if not may_replace:
        differences = list(compare(read_manifest(path), job))
        if differences:
            raise OutputError(
                f"{output!r} holds the answers of another job:\n  "
                + "\n  ".join(differences)
                + "\nPass --overwrite to begin anew, or write to another file (-o)."
            )
        return
    try:
        write_atomically(path, json.dumps(job, indent=2).encode() + b"\n")
    except OSError as error:
        raise OutputError(explain(path, error)) from error


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of an output that holds something, or an OutputError."""
    try:
        with open(path, "rb") as file:
            return dict(json.load(file))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(
            f"{path.removesuffix(ENDING)!r} is not empty, and which job wrote it cannot be read "
            f"from {path!r} ({error}); pass --overwrite to begin anew, or write to another file "
            "(-o)"
        ) from error


def compare(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """A line for each entry that differs, with both values; notes do not count."""
    differences = []
    for name in [*before, *(name for name in now if name not in before)]:
        if name == "note":
            continue
        old = before.get(name)
        new = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += compare(old, new, f"{prefix}{name}: ")
        elif old != new:
            differences.append(f"{prefix}{name} was {json.dumps(old)}, and is {json.dumps(new)}")
    return differences


def write_atomically(path: str, data: bytes) -> None:
    """Have a file hold `data`, or what it held before, whatever happens meanwhile."""
    beside = f"{path}.{os.getpid()}"
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        Path(beside).unlink(missing_ok=True)
        raise


def digest_files(directory: str) -> str:
    """A hash of a checkpoint's files: of small ones all, of weights some places and the size."""
    digest = xxhash.xxh3_128()
    for pattern in FILES:
        for path in sorted(Path(directory).glob(pattern)):
            if path.name.endswith(ENDING):
                continue  # of a job whose output is there: it is none of the model's files
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                if not path.match("*.safetensors"):
                    digest.update(file.read())
                    continue
                for start in (0, size // 2, max(size - SAMPLED_BYTES, 0)):
                    file.seek(start)
                    digest.update(file.read(SAMPLED_BYTES))
    return digest.hexdigest()
