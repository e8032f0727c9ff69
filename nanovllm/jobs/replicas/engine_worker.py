"""What runs lines in a replica: an engine, and a `LineWorker` on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.lines.line_options import LineOptions


class EngineWorker:
    """The `Worker` of a replica: makes an engine, which raises what it cannot start for."""

    def __init__(
        self, model: str, engine_options: dict[str, Any], line_options: LineOptions
    ) -> None:
        # Here, because the main process imports this file, and needs no PyTorch.
        from nanovllm.jobs.async_llm import AsyncLLM
        from nanovllm.jobs.lines.line_worker import LineWorker

        self.llm = AsyncLLM(model, **engine_options)
        self.line_worker = LineWorker(self.llm, line_options)
        self.max_num_seqs = self.llm.config.max_num_seqs

    @property
    def failure(self) -> BaseException | None:
        """Why the engine has ended, if it has."""
        return self.llm.failure

    def submit(self, line: Line, done: Callable[[Answer], None]) -> None:
        """Have a line answered."""
        self.line_worker.submit(line, done)

    def close(self) -> None:
        """Free what would outlive the process. Nothing would if it has no ranks beside it."""
        if self.llm.config.tensor_parallel_size > 1:
            self.llm.close()
