"""Checkpoints of language models without their LM head, as libraries for embeddings save them.

They name the architecture inside (Qwen3Model), or their tensors lack its prefix ("layers.0..." for
"model.layers.0..."), or both. With tied embeddings nothing is missing: the embedding is the head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

PREFIX = "model."
EMBEDDING = "embed_tokens.weight"  # without the prefix
HEAD = "lm_head.weight"
IS_MISSING = "lm_head_is_missing"  # an attribute of the configuration


def whole_architectures(names: Any) -> Any:
    """What config.json has under "architectures", with the name of the model with its head."""
    if not isinstance(names, list) or not names or not str(names[0]).endswith("Model"):
        return names
    family = names[0].removesuffix("Model").removesuffix("Text")  # Gemma3TextModel
    return [f"{family}ForCausalLM", *names[1:]]


def has_bare_names(names: Any) -> bool:
    """Whether a checkpoint's tensors, by these names, lack the prefix."""
    return EMBEDDING in names


def whole_name(name: str) -> str:
    """The name that a tensor without the prefix has in the model with its head."""
    return name if name == HEAD else PREFIX + name


def may_lack_head(config: PretrainedConfig, path: Path) -> bool:
    """Whether the files in `path` should be asked: embeddings are not tied, and may be the aim."""
    is_for_embeddings = (path / "modules.json").is_file()  # of the sentence-transformers library
    is_inner_model = whole_architectures(config.architectures) != config.architectures
    return not config.tie_word_embeddings and (is_for_embeddings or is_inner_model)


def settle_missing_head(config: PretrainedConfig) -> None:
    """Note in the configuration that there is no head, and have the embedding in its place."""
    config.tie_word_embeddings = True
    setattr(config, IS_MISSING, True)


def check_head(config: PretrainedConfig) -> None:
    """Raise a ValueError if there is no LM head."""
    if getattr(config, IS_MISSING, False):
        raise ValueError(
            "the checkpoint has no LM head (lm_head.weight), which tokens and scores take; it can "
            "only embed"
        )
