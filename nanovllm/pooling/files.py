"""How a checkpoint makes embeddings or scores, as its files for the sentence-transformers library
say.

`modules.json` lists what a text goes through: the model, a pooling of its hidden states with a
configuration of its own, perhaps a normalisation; or, for scores, the logits of two tokens.
`config_sentence_transformers.json` has named prompts, texts that are put before what is embedded,
such as an instruction before queries.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.checkpoints.checkpoint import read_json

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
KNOWN = ("Transformer", "Pooling", "Normalize", "LogitScore")  # classes of modules
# What the library calls the ways of pooling: in a file of today, and as a key of older ones.
POOLINGS = {
    "lasttoken": "last",
    "mean": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
}


@dataclass(frozen=True, slots=True)
class EmbeddingFiles:
    """What they say; the defaults are for a checkpoint that has none of them."""

    are_there: bool = False  # whether the checkpoint is one for embeddings
    pooling: str = "last"  # "last": the last token's hidden state; "mean": that of all tokens'
    normalizes: bool = True
    prompts: dict[str, str] = field(default_factory=dict)  # by name, what is put before a text
    default_prompt: str | None = None  # the name of the one that counts if none is asked for
    # For scores: the tokens that say yes and no. None: those of the words.
    answer_ids: tuple[int, int] | None = None

    @classmethod
    def read(cls, path: Path) -> "EmbeddingFiles":
        """Read them; a ValueError that names what the checkpoint does and this code does not."""
        modules = read_modules(path / MODULES)
        folders = {str(entry["type"]).rpartition(".")[2]: entry.get("path") for entry in modules}
        unknown = sorted(folders.keys() - KNOWN)
        if unknown:
            raise ValueError(
                f"{path / MODULES} names {unknown[0]}, which is not supported; supported: "
                f"{', '.join(KNOWN)}"
            )
        texts = read_json(path / PROMPTS)
        prompts = texts.get("prompts") or {}
        default_prompt = texts.get("default_prompt_name")
        if "LogitScore" in folders:
            return cls(answer_ids=read_answers(path / str(folders["LogitScore"]) / "config.json"))
        if "Pooling" not in folders:
            return cls(prompts=prompts, default_prompt=default_prompt)
        return cls(
            are_there=True,
            pooling=read_pooling(path / str(folders["Pooling"]) / "config.json"),
            normalizes="Normalize" in folders,
            prompts=prompts,
            default_prompt=default_prompt,
        )

    def prompt(self, name: str | None) -> str:
        """The text to put before others; "" if there is none.

        name: None for the default one. Raises a ValueError for one that is not there.
        """
        if name is None:
            name = self.default_prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(map(repr, self.prompts)) or "none"
            raise ValueError(f"the checkpoint has no prompt {name!r}; it has {known}")
        return self.prompts[name]


def read_modules(file: Path) -> list[dict[str, Any]]:
    """Read the list of modules; [] if there is no such file."""
    if not file.is_file():
        return []
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(modules, list) or not all(
        isinstance(entry, dict) and "type" in entry for entry in modules
    ):
        raise ValueError(f"{file} holds {str(modules)[:40]!r} and not a list of modules")
    return modules


def read_pooling(file: Path) -> str:
    """Read how hidden states are pooled, "last" or "mean"; a ValueError names any other way."""
    config = read_json(file)
    if config.get("include_prompt") is False:
        raise ValueError(f"{file}: include_prompt false is not supported, only true")
    mode = config.get("pooling_mode")
    named = [mode] if isinstance(mode, str) else mode
    if not named:
        named = [
            key for key, on in config.items() if key.startswith("pooling_mode_") and on is True
        ]
    if len(named) != 1 or named[0] not in POOLINGS:
        raise ValueError(
            f"{file} asks for the pooling {', '.join(map(str, named)) or 'none'}, which is not "
            "supported; supported: lasttoken, mean"
        )
    return POOLINGS[named[0]]


def read_answers(file: Path) -> tuple[int, int]:
    """Read the token ids of yes and no; a ValueError if there are not both."""
    config = read_json(file)
    yes = config.get("true_token_id")
    no = config.get("false_token_id")
    if type(yes) is not int or type(no) is not int:
        raise ValueError(
            f"{file} must name a true_token_id and a false_token_id, which are {yes!r} and {no!r}"
        )
    return yes, no
