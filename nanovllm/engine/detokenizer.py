"""From token ids to text, one token at a time."""

from typing import Any

from tokenizers.decoders import DecodeStream

from nanovllm.sampling_params import SamplingParams


class Detokenizer:
    """The text of one completion while it grows, for requests with stop strings or a reader.

    `text` ends with a whole character: a token with only some of its bytes adds nothing until the rest is there.
    `tokenizer` is one of `transformers`, with the tokenizers library beneath.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self.tokenizer, self.params = tokenizer, params
        self.stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self.token_ids: list[int] = []
        self.text = ""
        self.num_taken = 0  # characters that `take` has returned

    def append(self, token_id: int | None, is_last: bool, may_stop: bool) -> str | None:
        """Add a token (None: one that is not shown); returns the stop string that it completes, if it may.

        The text is then cut there. Of several, that which ends first counts; of those, the one named first.
        """
        start = len(self.text)
        if token_id is not None:
            self.token_ids.append(token_id)
            self.text += self.stream.step(self.tokenizer.backend_tokenizer, token_id) or ""
        if is_last:  # with what is left of a character
            whole = self.tokenizer.decode(
                self.token_ids, skip_special_tokens=self.params.skip_special_tokens
            )
            self.text = whole if whole.startswith(self.text) else self.text
        stops = self.params.stop if may_stop else ()
        begins = [(self.text.find(stop, max(start + 1 - len(stop), 0)), stop) for stop in stops]
        found = [(begin, begin + len(stop), stop) for begin, stop in begins if begin >= 0]
        if not found:
            return None
        begin, end, stop = min(found, key=lambda match: match[1])
        self.text = self.text[: end if self.params.include_stop_str_in_output else begin]
        return stop

    def take(self, is_finished: bool) -> str:
        """The text that is new since the last call, less an ending that could become a stop string."""
        stops = () if is_finished or self.params.include_stop_str_in_output else self.params.stop
        held = [k for stop in stops for k in range(1, len(stop)) if self.text.endswith(stop[:k])]
        start, self.num_taken = (
            self.num_taken,
            max(self.num_taken, len(self.text) - max(held, default=0)),
        )
        return self.text[start : self.num_taken]
