"""An engine for many callers: requests of any thread or coroutine run in one batch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from typing import Any, cast
from weakref import finalize

import numpy as np

from nanovllm.config import Config
from nanovllm.engine.scheduler import NO_NUMBERS
from nanovllm.engine.sequence import Sequence
from nanovllm.inputs import Prompt
from nanovllm.jobs.owner import EngineOwner
from nanovllm.jobs.tickets import Awaited, Finish, RequestFuture, Streamed
from nanovllm.llm import LLM
from nanovllm.pooling.engine import EmbeddingTask
from nanovllm.pooling.params import PoolingParams
from nanovllm.pooling.results import EmbeddingRequestOutput
from nanovllm.results import RequestOutput, StreamPart
from nanovllm.sampling_params import SamplingParams
from nanovllm.text.chat import Conversation, prompts_of_chats


class AsyncLLM:
    """An `LLM` and the thread that runs it. Any thread and any coroutine may call all methods, and
    their requests join the batch that is running, completions and embeddings alike.

    >>> with AsyncLLM("/path/to/Qwen3-0.6B") as llm:
    ...     futures = [llm.submit(prompt, SamplingParams(max_tokens=32)) for prompt in prompts]
    ...     texts = [future.result()["text"] for future in futures]

    What is wrong with a request raises a TypeError or ValueError in the caller, as `LLM.generate`
    does, and nothing is queued. A request of which the model's logits are no numbers has the
    `finish_reason` "error". If a step fails, each request in flight gets an EngineError, whose
    `__cause__` says why; the engine goes on if it can, and otherwise every call is a RuntimeError.

    `close`, or the end of a `with` or `async with`, ends all at once: what is in flight gets an
    EngineError. A program that forgets it ends nevertheless.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Make the engine, in this thread. `model` and `options` are those of `LLM`."""
        self.llm = LLM(model, **options)
        self._owner = EngineOwner(self.llm)
        finalize(self, self._owner.orphan).atexit = False

    @property
    def config(self) -> Config:
        """The engine's options."""
        return self.llm.config

    @property
    def failure(self) -> BaseException | None:
        """What has ended the engine for good, a dead rank or a fault of the device; None: nothing.

        It is set before the requests in flight get their errors.
        """
        return self._owner.failure

    # --- for threads ------------------------------------------------------------------------------

    def submit(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Future[RequestOutput]:
        """Queue one prompt, and return the future of what `LLM.generate` returns for it.

        `cancel` of the future ends the request also while it runs. Callbacks of the future run in
        the engine's thread, and hold it up: pass on to others what takes time.
        """
        return self._future(self._check(prompt, sampling_params), as_it_is)

    def submit_chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **template_options: Any,
    ) -> Future[RequestOutput]:
        """Queue one conversation. The options are those of `LLM.chat`."""
        options = {**(chat_template_kwargs or {}), **template_options}
        return self._future(self._check_chat(messages, sampling_params, options), as_it_is)

    def submit_embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        *,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> Future[EmbeddingRequestOutput]:
        """Queue one prompt to be embedded. The options are those of `LLM.embed`.

        The future raises a RuntimeError if the model's hidden states are no numbers.
        """
        task = self._check_embed(prompt, pooling_params, prompt_name, truncate_prompt_tokens)
        seq = self.llm._start_embedding(task)
        return self._future([seq], partial(finish_embedding, self.llm, task, seq))

    # --- for coroutines ---------------------------------------------------------------------------

    # A prompt is checked and encoded in a thread of the event loop's, since to encode a long text
    # or to compile a grammar takes so long that the loop would stand still.

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> RequestOutput:
        """Complete one prompt; returns and raises what `LLM.generate` does for it.

        If the coroutine is cancelled, the request ends.
        """
        seqs = await asyncio.to_thread(self._check, prompt, sampling_params)
        return cast(RequestOutput, await self._result(seqs, as_it_is))

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **template_options: Any,
    ) -> RequestOutput:
        """Answer one conversation. The options are those of `LLM.chat`."""
        options = {**(chat_template_kwargs or {}), **template_options}
        seqs = await asyncio.to_thread(self._check_chat, messages, sampling_params, options)
        return cast(RequestOutput, await self._result(seqs, as_it_is))

    async def embed(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        *,
        prompt_name: str | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> EmbeddingRequestOutput:
        """Embed one prompt. The options are those of `LLM.embed`."""
        task = await asyncio.to_thread(
            self._check_embed, prompt, pooling_params, prompt_name, truncate_prompt_tokens
        )
        seq = self.llm._start_embedding(task)
        finish = partial(finish_embedding, self.llm, task, seq)
        return cast(EmbeddingRequestOutput, await self._result([seq], finish))

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[StreamPart, None]:
        """Complete one prompt, and yield the new tokens as they come, as `LLM.stream` does.

        A part may have several tokens, if they came while the caller was busy. Leaving the loop
        ends the request.
        """
        seqs = await asyncio.to_thread(self._check, prompt, sampling_params, is_streamed=True)
        async with aclosing(self._parts(seqs)) as parts:
            async for part in parts:
                yield part

    async def stream_chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **template_options: Any,
    ) -> AsyncGenerator[StreamPart, None]:
        """Answer one conversation, and yield the new tokens as `stream` does."""
        options = {**(chat_template_kwargs or {}), **template_options}
        seqs = await asyncio.to_thread(
            self._check_chat, messages, sampling_params, options, is_streamed=True
        )
        async with aclosing(self._parts(seqs)) as parts:
            async for part in parts:
                yield part

    # --- the end ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the engine and its thread, after the step that runs, and free its memory.

        From a callback of a future, that is done when the callback has returned.
        """
        self._owner.close()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    # --- one request ------------------------------------------------------------------------------

    def _check_open(self) -> None:
        self.llm._check_process()
        self._owner.check_open()
        self.llm._check_alive()
        self.llm._sleep.check_awake()

    def _check(
        self, prompt: Prompt, params: SamplingParams | None, is_streamed: bool = False
    ) -> list[Sequence]:
        """Check and encode a prompt, and make its sequences, all in the caller's thread."""
        self._check_open()
        (request,) = self.llm._check_requests([prompt], params)
        return self.llm._inputs.make_sequences(request, is_streamed)

    def _check_chat(
        self,
        messages: Conversation,
        params: SamplingParams | None,
        options: dict[str, Any],
        is_streamed: bool = False,
    ) -> list[Sequence]:
        """Do the same for a conversation."""
        self._check_open()
        prompts = prompts_of_chats(self.llm._inputs, messages, options)
        if len(prompts) != 1:
            raise ValueError(f"messages must be one conversation, not {len(prompts)}")
        return self._check(prompts[0], params, is_streamed)

    def _check_embed(
        self,
        prompt: Prompt,
        params: PoolingParams | None,
        prompt_name: str | None,
        truncate_prompt_tokens: int | None,
    ) -> EmbeddingTask:
        """Do the same for a prompt that is to be embedded, except for its sequence."""
        self._check_open()
        (task,) = self.llm._check_embeddings([prompt], params, prompt_name, truncate_prompt_tokens)
        return task

    def _future(self, seqs: list[Sequence], finish: Finish) -> Future[Any]:
        future = RequestFuture(seqs, self._owner.send, finish)
        self._owner.send(future)
        return future

    async def _result(self, seqs: list[Sequence], finish: Finish) -> Any:
        return await Awaited(seqs, self._owner.send, self._owner.outbox, finish).result()

    def _parts(self, seqs: list[Sequence]) -> AsyncGenerator[StreamPart, None]:
        return Streamed(seqs, self._owner.send, self._owner.outbox).parts()


def as_it_is(result: RequestOutput) -> RequestOutput:
    """Return the engine's result of a completion, which is the caller's, too."""
    return result


def finish_embedding(
    llm: LLM, task: EmbeddingTask, seq: Sequence, result: RequestOutput
) -> EmbeddingRequestOutput:
    """Make the result of an embedding.

    result: the engine's, which knows only of completions.
    """
    output = llm._finish_embedding(seq, task)
    problem = result.stop_reason if result.finish_reason == "error" else None
    # In a step that also completes prompts, only the tokens were looked at.
    if problem is None and not np.isfinite(output.embedding).all():
        problem = NO_NUMBERS
    if problem is not None:
        raise RuntimeError(f"the prompt could not be embedded: {problem}")
    output.request_id = result.request_id
    return output
