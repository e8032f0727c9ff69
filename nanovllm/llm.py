"""The user's entry to the library."""

from collections.abc import Iterator
from typing import Any

from nanovllm.engine.llm_engine import LLMEngine, Params, Prompts, Request, Result
from nanovllm.engine.sequence import Sequence
from nanovllm.utils.interrupts import uninterrupted

Conversation = list[dict[str, Any]]


def is_conversations(value: Any) -> bool:
    lists = (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(item, (list, tuple)) for item in value)
    )
    return bool(lists) and all(
        isinstance(message, dict) for conversation in value for message in conversation
    )


class LLM(LLMEngine):
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
    ) -> list[Result]:
        """Answer one conversation or a list of them, each a list of {"role": ..., "content": ...}.

        Options (`enable_thinking=False`, say, or in `chat_template_kwargs`) go to the tokenizer's chat template.
        Returns and raises what `generate` does; a ValueError also when there is no template.
        """
        options = {
            "add_generation_prompt": True,
            **(chat_template_kwargs or {}),
            **template_options,
        }
        template = options.get("chat_template") or getattr(self.tokenizer, "chat_template", None)
        if self.tokenizer is None or not template:
            raise ValueError(
                f"{self.config.model} has no chat template; pass chat_template=..., or use generate"
            )
        is_one = isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], dict)
        conversations = [messages] if is_one else messages
        if not is_conversations(conversations):
            raise TypeError(
                f"messages must be a conversation (a list of dicts) or a list of them, not {messages!r}"
            )
        prompts = self.tokenizer.apply_chat_template(
            conversations, **{**options, "return_dict": False}
        )
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer, of `transformers`; None if it has none."""
        return self.tokenizer

    def stream(self, prompts: Prompts, sampling_params: Params = None) -> Iterator[Result]:
        """Complete prompts as `generate` does, and yield what is new of each completion as it comes.

        Yields dicts: `index` of the prompt, `completion` (0 to n - 1), new `text` (it can lag behind, by part of a
        character or of a stop string), `token_ids` and `logprobs`; with the last, `finish_reason` and `stop_reason`.
        Requests are queued when the first dict is asked for; leaving the loop, or closing the generator, ends them.
        """
        return self._stream(self._checked(prompts, sampling_params))

    def _stream(self, requests: list[Request]) -> Iterator[Result]:
        scheduler = self.scheduler
        live: dict[
            Sequence, tuple[int, int, int]
        ] = {}  # prompt, completion, number of tokens that were yielded
        try:
            with uninterrupted():  # all that is queued is in `live`
                for index, request in enumerate(requests):
                    live |= {
                        seq: (index, i, 0)
                        for i, seq in enumerate(self._queue(*request, is_streamed=True))
                    }
            while live and self.scheduler is scheduler:  # not after a reset
                self._ended, _ = (
                    self.step()
                )  # what it reports is kept for whoever calls `step` next
                for seq, (index, i, start) in list(live.items()):
                    if start < (end := len(seq.token_ids) - seq.num_prompt_tokens):
                        text = (
                            "" if seq.detokenizer is None else seq.detokenizer.take(seq.is_finished)
                        )
                        live[seq] = index, i, end
                        if (
                            seq.is_finished
                        ):  # asked before the yield: others may step the engine meanwhile
                            del live[seq]
                        yield {
                            "index": index,
                            "completion": i,
                            **self._completion(seq, text, start),
                        }
        finally:
            with uninterrupted():
                if self.scheduler is scheduler and self.model_runner is not None:
                    scheduler.abort(list(live))
                    while self._pending and scheduler.is_finished():  # steps launched ahead
                        self._ended, _ = self.step()
