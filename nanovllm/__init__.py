"""Nano-vLLM: a small, readable and fast library for offline LLM inference."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.inputs import TextPrompt, TokensPrompt
    from nanovllm.jobs.async_llm import AsyncLLM
    from nanovllm.jobs.owner import EngineError
    from nanovllm.llm import LLM
    from nanovllm.params.beam_params import BeamSearchParams
    from nanovllm.params.structured import StructuredOutputsParams
    from nanovllm.pooling.params import PoolingParams
    from nanovllm.pooling.results import EmbeddingRequestOutput, ScoringRequestOutput
    from nanovllm.results import CompletionOutput, RequestOutput
    from nanovllm.sampling_params import SamplingParams

#: Directory of the built-in demonstration checkpoint; the card inside says what it is and is not.
DEMO_MODEL: str = str(Path(__file__).parent / "assets" / "demo")

__all__ = [
    "DEMO_MODEL",
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineError",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]

# The module of each public name, which is imported when somebody first asks for the name. PyTorch
# takes seconds to import, and a process that runs no model (of `nanovllm run-batch`, the one that
# reads and writes the files) would wait for them even to say that an option is misspelled.
_MODULES = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.jobs.async_llm",
    "BeamSearchParams": "nanovllm.params.beam_params",
    "CompletionOutput": "nanovllm.results",
    "EmbeddingRequestOutput": "nanovllm.pooling.results",
    "EngineError": "nanovllm.jobs.owner",
    "PoolingParams": "nanovllm.pooling.params",
    "RequestOutput": "nanovllm.results",
    "SamplingParams": "nanovllm.sampling_params",
    "ScoringRequestOutput": "nanovllm.pooling.results",
    "StructuredOutputsParams": "nanovllm.params.structured",
    "TextPrompt": "nanovllm.inputs",
    "TokensPrompt": "nanovllm.inputs",
}


def __getattr__(name: str) -> Any:
    """Import a public name. Python calls this when the module has no such name yet."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value  # so that this is called once for each name
    return value


def __dir__() -> list[str]:
    """What tab completion offers, imported or not."""
    return sorted({*globals(), *__all__})
