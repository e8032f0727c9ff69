"""What a checkpoint is, in a directory: its configuration, files and tensors.

A directory may hold more: shards of an older version, an adapter, the same weights in another
format. None of it may be taken for the model's weights. Where `transformers` has a rule it is
followed here; where files contradict each other, that is an error which names them.
"""

import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from nanovllm.checkpoints.headless import (
    has_bare_names,
    may_lack_head,
    settle_missing_head,
    whole_architectures,
    whole_name,
)
from nanovllm.checkpoints.wrappers import TEXT_MODELS, WRAPPERS, is_wrapper, text_name

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # which shard holds which tensor
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")
PROCESSOR_TEMPLATE = "chat_template.json"
OTHER_FORMATS = ("*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx")
NO_LAYER = "adapter_"  # beginning of names of files with changes to weights (LoRA)
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"  # may be one tensor with EMBEDDING (tied)
Stored = tuple[Path, str]  # a file and the name of a tensor in it
GIT_LFS = b"version https://git-lfs"  # beginning of the text that stands for a file not yet fetched


# --- what its configuration says -----------------------------------------------------------------


def read_hf_config(path: Path, architectures: Collection[str] = ()) -> PretrainedConfig:
    """Read config.json; a ValueError if there is none, or none that this engine can run."""
    file = path / "config.json"
    if not file.is_file():
        advice = "pass the directory of a checkpoint in Hugging Face format"
        raise ValueError(f"{path} has no config.json; {other_formats(path) or advice}")
    # Before transformers reads the file, whose error for an unknown architecture would say less.
    supported = [*architectures, *WRAPPERS] if architectures else []
    names = whole_architectures(read_json(file).get("architectures"))
    check_architecture(names, str(file), supported)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a malformed file makes transformers raise
        raise ValueError(f"transformers cannot read {file}: {reason_of(error)}") from error


def unwrap(hf_config: PretrainedConfig, path: Path | None) -> PretrainedConfig:
    """The configuration of the text model of a checkpoint: its own, or one inside it. Raises a
    ValueError if that is of a type unknown here. Nothing is read from `path` if it is None.
    """
    names = hf_config.architectures
    if not names or not is_wrapper(names):
        if path is not None and may_lack_head(hf_config, path) and HEAD not in find_tensors(path):
            settle_missing_head(hf_config)
        hf_config.architectures = whole_architectures(names)
        return hf_config
    text: Any = getattr(hf_config, "text_config", None)  # a PretrainedConfig, if there is one
    text_type = getattr(text, "model_type", None)
    if text_type not in TEXT_MODELS:
        raise ValueError(
            f"{names[0]} with a text model of type {text_type!r} is not "
            f"supported; supported: {', '.join(TEXT_MODELS)}"
        )
    text.architectures = [TEXT_MODELS[text_type]]
    # What is said of the whole counts before what is said of the part.
    text.dtype = stored_dtype(hf_config, stored_dtype(text))
    for name in ("eos_token_id", "quantization_config"):
        if getattr(hf_config, name, None) is not None:
            setattr(text, name, getattr(hf_config, name))
    # transformers 4 asks the part whether the LM head is the embedding, and 5 the whole, unless
    # the files hold a head of its own. Where the two disagree, the files tell which is meant.
    if not hf_config.tie_word_embeddings:
        text.tie_word_embeddings = False
    elif not text.tie_word_embeddings and path is not None:
        text.tie_word_embeddings = HEAD not in find_tensors(path)
    return text


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file, a ValueError if it holds something else."""
    if not file.is_file():
        return {}
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{file} holds {str(contents)[:40]!r} and not a configuration")
    return contents


def check_architecture(names: object, source: str, supported: Collection[str]) -> None:
    """Raise a ValueError unless the first of `names`, which is what `source` has under
    "architectures" (in a file that may be anything), is in `supported`, or that is empty.
    """
    if supported and isinstance(names, str):
        raise ValueError(f"{source} must have a list of names as architectures, not {names!r}")
    name = names[0] if isinstance(names, list) and names else names
    if supported and name not in list(supported):  # a list, because `name` may not be hashable
        raise ValueError(
            f"{source} names the architecture {name!r}; supported: {', '.join(supported)}"
        )


def stored_dtype(hf_config: PretrainedConfig, default: str = "bfloat16") -> str:
    """Name of the dtype of a checkpoint, or `default` if its configuration does not say."""
    # transformers 5 calls it dtype and 4 torch_dtype; either may hold a string.
    stored = getattr(hf_config, "dtype", None) or getattr(hf_config, "torch_dtype", None)
    return str(stored or default).removeprefix("torch.")


def load_tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint; None when it has none (prompts are then token ids)."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if not any((Path(path) / file).is_file() for file in files):
        return None
    try:
        # Otherwise transformers may ask on stdin whether to run code of the checkpoint's own.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever a malformed file makes transformers raise
        reason = reason_of(error)
        if not (Path(path) / "tokenizer.json").is_file() and "tokenizer.model" in os.listdir(path):
            reason += " (tokenizer.model alone takes `pip install sentencepiece protobuf`)"
        raise ValueError(f"transformers cannot read the tokenizer in {path}: {reason}") from error
    if tokenizer.chat_template is None:
        # Models that also see images may have it as a file of their image processor.
        tokenizer.chat_template = read_json(Path(path) / PROCESSOR_TEMPLATE).get("chat_template")
    return tokenizer


def reason_of(error: Exception) -> str:
    """Say why transformers cannot read a file, without its advice to trust remote code."""
    if "trust_remote_code" in str(error):
        return "it takes code of the checkpoint's own (auto_map), which is never run here"
    return str(error)


# --- which of them hold the weights -------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a checkpoint, in order.

    `model.safetensors` counts alone, as in transformers, unless the index names it among others;
    without it the index counts, and without an index the shards that are there. Raises a ValueError
    if there are none, one is absent, shards of two checkpoints are there, or the index is invalid.
    """
    index = path / INDEX
    names = read_index(index) if index.is_file() else []
    if (path / WEIGHTS).is_file() and WEIGHTS not in names:
        names = [WEIGHTS]  # an index beside it is one of older shards
    elif not index.is_file():
        names = find_shards(path)
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise ValueError(
            f"{path} lacks weight files ({', '.join(absent[:5])}); fetch the whole checkpoint, or "
            "pass load_format='dummy' for random weights"
        )
    if not names:
        raise ValueError(
            f"{path} lacks weight files (*.safetensors); "
            f"{other_formats(path) or 'fetch the whole checkpoint'}, or pass load_format='dummy' "
            "for random weights"
        )
    return [path / name for name in names]


def read_index(index: Path) -> list[str]:
    """Read the names of the files that an index names, in order."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        return [os.fspath(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of weight files: {error!r}") from error


def find_shards(path: Path) -> list[str]:
    """List weight files that no index names: the shards of one checkpoint, else all there are."""
    names = sorted(file.name for file in path.glob("*.safetensors"))
    # Names with a dot in front are made by file systems: "._model.safetensors" is no copy of it.
    names = [name for name in names if not name.startswith((".", NO_LAYER))]
    shards: dict[tuple[str, str], list[str]] = {}  # what they are shards of, and how many -> names
    for name in names:
        if match := SHARD.fullmatch(name):
            shards.setdefault((match[1], match[3]), []).append(name)
    if len(shards) > 1:
        examples = ", ".join(some[0] for some in shards.values())
        raise ValueError(
            f"{path} has shards of several checkpoints ({examples}) and no {INDEX}; remove those "
            "that are not of this model"
        )
    for (prefix, total), found in shards.items():
        if len(found) == int(total):
            return found
        numbers = (str(number + 1).zfill(len(total)) for number in range(int(total)))
        return [f"{prefix}-{number}-of-{total}.safetensors" for number in numbers]
    return names


def other_formats(path: Path) -> str:
    """Say which files of a directory hold weights that are not read; "" if there are none."""
    patterns = (*OTHER_FORMATS, f"{NO_LAYER}*.safetensors")
    found = sorted(file.name for pattern in patterns for file in path.glob(pattern))
    if not found:
        return ""
    listed = ", ".join(found[:3])
    return (
        f"{listed} cannot be read here: fetch the model's *.safetensors, or load it with "
        "transformers and write them with save_pretrained"
    )


# --- which tensors are in them ------------------------------------------------------------------


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file; a ValueError if it, or later a tensor in it, cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        reason = str(error)
        with suppress(OSError), file.open("rb") as contents:
            if contents.read(len(GIT_LFS)) == GIT_LFS:
                reason = "only a pointer of Git LFS is there; run `git lfs pull`"
        raise ValueError(f"cannot read the weights in {file}: {reason}") from error


def find_tensors(path: Path) -> dict[str, Stored]:
    """Find the tensors of a checkpoint's text model, by the names that they have in one that is not
    wrapped; a ValueError if two are of the same name.
    """
    unwraps = is_wrapper(read_json(path / "config.json").get("architectures"))
    found: dict[str, Stored] = {}
    for file in weight_files(path):
        with open_weights(file) as tensors:
            stored_names = list(tensors.keys())
        for stored_name in stored_names:
            name = text_name(stored_name) if unwraps else stored_name
            if name is None:
                continue
            if name in found:
                raise ValueError(
                    f"{found[name][0]} and {file.name} both hold the tensor {name!r}; remove the "
                    "file that is not of this checkpoint"
                )
            found[name] = file, stored_name
    if has_bare_names(found):
        return {whole_name(name): stored for name, stored in found.items()}
    return found


def are_equal(first: Stored, second: Stored, dtype: torch.dtype) -> bool:
    """Whether two tensors of a checkpoint hold the same values once they are read as `dtype`."""
    with open_weights(first[0]) as first_file, open_weights(second[0]) as second_file:
        ours = first_file.get_tensor(first[1])  # mapped from the file, not copied
        theirs = second_file.get_tensor(second[1])
        if ours.shape != theirs.shape:
            return False
        if ours.dtype == theirs.dtype and ours.nbytes % 8 == 0:
            # Eight bytes at a time: a third of what it takes as bfloat16, and mostly it is enough.
            pair = [tensor.flatten().view(torch.int64) for tensor in (ours, theirs)]
            if torch.equal(*pair):
                return True
        return torch.equal(ours.to(dtype), theirs.to(dtype))


def settle_tied_head(
    expected: dict[str, Any], files: dict[str, Stored], dtype: torch.dtype
) -> None:
    """Decide what an `lm_head.weight` is for a model that has the embedding in its place.

    A file may hold the shared tensor under either name, or under both. If these differ, then
    transformers 5 uses both, and older versions, and vLLM, drop the head: a ValueError.

    expected: by the names of the model's tensors, something of each. Of it and of `files` the name
        that does not count is taken.
    """
    if EMBEDDING not in files:
        expected[HEAD] = expected.pop(EMBEDDING)
    elif are_equal(files[EMBEDDING], files[HEAD], dtype):
        del files[HEAD]
    else:
        raise ValueError(
            f"{files[HEAD][0]} holds an {HEAD} that differs from {EMBEDDING}, and config.json "
            "has tie_word_embeddings; set that to false to use the head, or remove the tensor"
        )
