"""The user's entry to the library."""

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    """An offline inference engine for one model.

    >>> llm = LLM("/path/to/Qwen3-0.6B")
    >>> llm.generate("Hello, Nano-vLLM.", SamplingParams(max_tokens=32))[0]["text"]
    """
