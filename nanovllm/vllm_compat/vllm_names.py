"""Names that scripts for vLLM look for on its `LLM`, and on the engine that it has inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.llm import LLM

E = TypeVar("E")

# vLLM's names of counters -> those of `stats`.
COUNTERS = {
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "completion_tokens",
    "vllm:prefix_cache_hits": "prefix_hit_tokens",
    "vllm:num_preemptions": "preemptions",
}

# Methods of vLLM's LLM that are not here -> what to do instead.
ABSENT_METHODS = {
    "apply_model": "use load_weights to change weights",
    "classify": "use embed or score",
    "collective_rpc": "use load_weights, sleep and wake_up, which are for all ranks",
    "encode": "use embed or score",
    "model_executor": "use load_weights, which is for all ranks",
    "reward": "use embed or score",
    "set_tokenizer": "pass tokenizer=... to LLM",
    "start_profile": "use `with llm.trace() as trace:`",
    "stop_profile": "use `with llm.trace() as trace:`",
}


@dataclass(frozen=True, slots=True)
class Counter:
    """One number of `get_metrics`."""

    name: str
    value: int  # since the engine was made


class VllmNames:
    """Base of `LLM`: each of these is another name for something that it has."""

    @property
    def llm_engine(self: E) -> E:
        """The engine: this object itself, as there is no other one inside."""
        return self

    @property
    def model_config(self) -> Config:
        """The engine's options (`max_model_len`, `dtype`, `hf_config`, ...)."""
        return cast("LLM", self).config

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return not cast("LLM", self).is_finished()

    def get_metrics(self) -> list[Counter]:
        """The counters of `stats` under vLLM's names."""
        stats = cast("LLM", self).stats()
        return [Counter(name, stats[ours]) for name, ours in COUNTERS.items()]

    if not TYPE_CHECKING:  # type checkers would believe that there is every name

        def __getattr__(self, name: str) -> Any:
            """Raise the AttributeError of a name that is not there, with what to use instead."""
            remedy = f"; {ABSENT_METHODS[name]}" if name in ABSENT_METHODS else ""
            message = f"{type(self).__name__!r} object has no attribute {name!r}{remedy}"
            raise AttributeError(message, name=name, obj=self)
