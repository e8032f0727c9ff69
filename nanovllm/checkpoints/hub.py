"""Where the files of a model are: in a directory, or on the hub and then in its cache."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanovllm.checkpoints.checkpoint import PROCESSOR_TEMPLATE, weight_files

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)
# Files of the hub that are read, if a model has them, besides its weights.
SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]
SECOND_COPIES = ["consolidated*"]  # of a hub model's weights, in Mistral's own format
# Any of these makes a tokenizer.
TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))


@dataclass(frozen=True, slots=True)
class HubSource:
    """Which state of the hub's files is meant, and where copies of them are kept."""

    revision: str | None = None  # a branch, a tag or a commit; None: the main branch
    download_dir: str | None = None  # None: the cache of huggingface_hub

    def options(self) -> dict[str, Any]:
        """What `snapshot_download` is told about it."""
        options = {"revision": self.revision, "cache_dir": self.download_dir}
        return {name: value for name, value in options.items() if value is not None}


def resolve_model(model: str | Path, needs_weights: bool, source: HubSource = HubSource()) -> str:
    """The local directory of `model`: itself, or that of a hub id, downloaded if need be. Raises a
    TypeError if it is neither a path nor an id, a ValueError if it cannot be found.
    """
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a path or a hub id, not {model!r}")
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return str(path)
    if os.path.exists(path):
        raise ValueError(
            f"model {str(model)!r} is a file; pass the path of a checkpoint in Hugging Face "
            "format, which is a directory with config.json and *.safetensors"
        )
    if HUB_ID.fullmatch(str(model)):
        return fetch(str(model), needs_weights, source)
    missing = Path(path)
    while not os.path.isdir(missing.parent):
        missing = missing.parent
    raise ValueError(
        f"model {str(model)!r} is neither a directory here nor a hub id: there is no directory "
        f"{missing.name!r} in {missing.parent.absolute()}; pass the path of a checkpoint in "
        "Hugging Face format"
    )


def resolve_tokenizer(tokenizer: str | Path, source: HubSource) -> str:
    """The local directory of a tokenizer that is not the model's: `resolve_model` for those."""
    if not isinstance(tokenizer, (str, Path)):
        raise TypeError(f"tokenizer must be a path or a hub id, not {tokenizer!r}")
    path = os.path.expanduser(tokenizer)
    if os.path.isdir(path):
        if has_tokenizer(Path(path)):
            return str(path)
        raise ValueError(f"tokenizer {path!r} is a directory without a tokenizer's files")
    if not HUB_ID.fullmatch(str(tokenizer)):
        raise ValueError(f"tokenizer {str(tokenizer)!r} is neither a directory here nor a hub id")
    download = partial(
        downloader(), repo_id=str(tokenizer), allow_patterns=SMALL_FILES, **source.options()
    )
    return find_or_fetch(f"tokenizer {str(tokenizer)!r}", download, has_tokenizer, has_tokenizer)


def fetch(hub_id: str, needs_weights: bool, source: HubSource) -> str:
    """The directory of a model of the hub, in the hub's cache; what the cache lacks is fetched."""
    patterns = [*SMALL_FILES, *(["*.safetensors"] if needs_weights else [])]
    download = partial(
        downloader(),
        repo_id=hub_id,
        allow_patterns=patterns,
        ignore_patterns=SECOND_COPIES,
        **source.options(),
    )
    path = find_or_fetch(
        what=f"model {hub_id!r}",
        download=download,
        is_whole=partial(is_whole, needs_weights=needs_weights),
        can_run=partial(can_run, needs_weights=needs_weights),
    )
    if needs_weights and not any(Path(path).glob("*.safetensors")):
        raise ValueError(
            f"{hub_id!r} has no *.safetensors files, on the hub or in its cache; weights in other "
            "formats (pytorch_model.bin, GGUF) are not read"
        )
    return path


def downloader() -> Callable[..., str]:
    """What fetches from the hub."""
    import huggingface_hub  # here, because most runs never need it

    return huggingface_hub.snapshot_download


def find_or_fetch(
    what: str,
    download: Callable[..., str],
    is_whole: Callable[[Path], bool],
    can_run: Callable[[Path], bool],
) -> str:
    """A directory of the hub's cache, if all is there, or one into which the rest is fetched.

    what: its name, for an error.
    download: fetches the files, or finds the directory of the cache with `local_files_only`.
    is_whole: whether nothing needs to be fetched.
    can_run: whether it will do if nothing can be fetched.
    """
    cached: Path | None = None
    with suppress(OSError, ValueError):  # the cache holds nothing of this id, or not all of it
        cached = Path(download(local_files_only=True))
        if is_whole(cached):
            return str(cached)
    try:
        return str(Path(download()))
    except (OSError, ValueError) as error:  # the hub's own exceptions are of these
        if cached is not None and can_run(cached):
            return str(cached)
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{what} is neither a directory here nor a hub id that could be fetched ({reason}); "
            "pass the path of a checkpoint in Hugging Face format"
        ) from error


def is_whole(path: Path, needs_weights: bool) -> bool:
    """Whether a directory of the hub's cache holds all that a model usually has.

    An interrupted download leaves a part, and so do programs that need only a part. A model that
    has less is looked up on the hub each time, which does no harm.
    """
    tokenizer_config = path / "tokenizer_config.json"
    if not (path / "generation_config.json").is_file() or not tokenizer_config.is_file():
        return False
    has_template = "chat_template" in tokenizer_config.read_text(encoding="utf-8")
    others = (path / "chat_template.jinja", path / PROCESSOR_TEMPLATE)
    if not has_template and not any(file.is_file() for file in others):
        return False
    return has_tokenizer(path) and can_run(path, needs_weights)


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds what a tokenizer is made of."""
    return any(all((path / name).is_file() for name in names) for names in TOKENIZERS)


def can_run(path: Path, needs_weights: bool) -> bool:
    """Whether a directory holds what is needed at least, with prompts of token ids."""
    if not (path / "config.json").is_file():
        return False
    try:
        return not needs_weights or bool(weight_files(path))
    except ValueError:
        return False
