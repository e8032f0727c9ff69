"""Jobs: files of a million prompts, all GPUs of a machine, many machines, and nothing lost."""

from nanovllm.jobs.async_llm import AsyncLLM
from nanovllm.jobs.owner import EngineError

__all__ = ["AsyncLLM", "EngineError"]
