"""Nano-vLLM: a small, readable and fast library for offline LLM inference."""

from pathlib import Path

from nanovllm.inputs import TextPrompt, TokensPrompt
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
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]
