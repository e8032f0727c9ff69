"""The user's entry to the library: the engine, and what is built on its loop (chat, streams)."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from nanovllm.beam_search.engine import BeamSearchEngine
from nanovllm.engine.requests import Params, Request
from nanovllm.engine.scheduler import Scheduler
from nanovllm.exclusive import exclusive
from nanovllm.inputs import Prompts
from nanovllm.pooling.engine import PoolingEngine
from nanovllm.results import RequestOutput, StreamPart
from nanovllm.text.chat import Conversation, prompts_of_chats
from nanovllm.text.stream import StreamedCompletion
from nanovllm.training.trainable import Trainable
from nanovllm.utils.interrupts import uninterrupted
from nanovllm.vllm_compat.vllm_names import VllmNames


class LLM(Trainable, BeamSearchEngine, PoolingEngine, VllmNames):
    """An offline inference engine for one model.

    >>> llm = LLM("/path/to/Qwen3-0.6B")
    >>> llm.generate("Hello, Nano-vLLM.", SamplingParams(max_tokens=32))[0]["text"]
    """

    def chat(
        self,
        messages: Conversation | list[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, each a list of {"role": ..., "content": ...}.

        Other options go to the tokenizer's chat template: `chat_template`, `tools`,
        `add_generation_prompt`, `continue_final_message`, and the template's own, such as
        `enable_thinking`, also in `chat_template_kwargs`. One that it does not know is a TypeError.
        Content is a string or a list of text parts. Returns and raises what `generate` does, and a
        ValueError without a template, or for messages that it refuses.
        """
        options = {**(chat_template_kwargs or {}), **template_options}
        prompts = prompts_of_chats(self._inputs, messages, options)
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer, of `transformers`, a copy of the engine's; None if there is none."""
        return self.tokenizer

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[StreamPart]:
        """Complete prompts as `generate` does, and yield the new tokens as they come.

        Yields dicts: `index` of the prompt, `completion` (0 to n - 1), new `text` (it can lag
        behind, by part of a character or of a stop string), `token_ids` and `logprobs`; with the
        last, `finish_reason` and `stop_reason`. Requests are queued when the first dict is asked
        for; leaving the loop, or closing the generator, ends them.
        """
        # This method is no generator itself: a wrong prompt raises now, not at the first `next`.
        return self._stream(self._check_requests(prompts, sampling_params))

    def _stream(self, requests: list[Request]) -> Iterator[StreamPart]:
        scheduler = self.scheduler  # another one after a reset, which has dropped our requests
        live: list[StreamedCompletion] = []
        try:
            scheduler = self._start_stream(requests, live)
            while live and self.scheduler is scheduler:
                yield from self._take_parts(live)
                live = [completion for completion in live if not completion.is_done]
        finally:
            self._abort_soon(scheduler, [completion.seq for completion in live])

    @exclusive
    def _start_stream(self, requests: list[Request], live: list[StreamedCompletion]) -> Scheduler:
        """Queue requests and collect their completions in `live`; returns who schedules them."""
        # A sequence that was queued and did not get into `live` would never be ended.
        with uninterrupted():
            for index, request in enumerate(requests):
                for number, seq in enumerate(self._queue(request, is_streamed=True)):
                    live.append(StreamedCompletion(seq, index, number))
        return self.scheduler

    @exclusive
    def _take_parts(self, live: list[StreamedCompletion]) -> list[StreamPart]:
        """Run a step; returns what is new of each completion. Others' results wait for `step`."""
        self._advance()
        parts = [completion.take() for completion in live]
        return [part for part in parts if part is not None]
