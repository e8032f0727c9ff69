"""From token ids to text, one token at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.sampling_params import SamplingParams


class Detokenizer:
    """The text of one completion while it grows, for requests with stop strings or a reader.

    `text` ends with a whole character: a token with only some of its bytes adds nothing until the
    rest is there. `tokenizer` must be a fast one, with the tokenizers library beneath.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, params: SamplingParams) -> None:
        self.tokenizer = tokenizer
        self.skips_special = params.skip_special_tokens
        self.keeps_stop = params.include_stop_str_in_output
        self.stops: tuple[str, ...] = tuple(params.stop or ())
        self.stream = DecodeStream(skip_special_tokens=params.skip_special_tokens)
        self.token_ids: list[int] = []
        self.text = ""
        self.num_taken = 0  # characters that `take` has returned

    def append(self, token_id: int | None, is_last: bool, may_stop: bool) -> str | None:
        """Add a token (None: one that is not shown); returns the stop string that it completes.

        The text is then cut before it, or behind it if the request keeps stop strings. Without
        `may_stop` none is looked for, and the result is None.
        """
        old_length = len(self.text)
        if token_id is not None:
            self.token_ids.append(token_id)
            new = self.stream.step(self.tokenizer.backend_tokenizer, token_id)
            self.text += new or ""  # None: the token ends within a character
        if is_last:  # the stream may hold back bytes that begin a character and never end it
            whole = self.tokenizer.decode(self.token_ids, skip_special_tokens=self.skips_special)
            assert isinstance(whole, str)  # a list only for a batch of sequences
            if whole.startswith(self.text):
                self.text = whole
        return self._cut_at_stop(old_length) if may_stop else None

    def _cut_at_stop(self, old_length: int) -> str | None:
        """Cut the text at the first stop string to end behind `old_length`; returns that string."""
        first_stop = None
        first_end = len(self.text) + 1
        for stop in self.stops:
            # A match that begins earlier ends in the old text, which had its turn in earlier calls.
            earliest = max(old_length + 1 - len(stop), 0)
            begin = self.text.find(stop, earliest)
            end = begin + len(stop)
            if begin != -1 and end < first_end:  # of two with one end, the one named first
                first_stop = stop
                first_end = end
        if first_stop is not None:
            self.text = self.text[: first_end if self.keeps_stop else first_end - len(first_stop)]
        return first_stop

    def take(self, is_finished: bool) -> str:
        """The text that is new since the last call, less what may be the start of a stop string."""
        end = len(self.text)
        if not is_finished and not self.keeps_stop:
            end -= self._num_held_back()  # until it is clear whether it is cut off
        start = self.num_taken
        self.num_taken = max(start, end)
        return self.text[start : self.num_taken]

    def _num_held_back(self) -> int:
        """How many characters at the end of the text are the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(longest + 1, len(stop)):
                if self.text.endswith(stop[:length]):
                    longest = length
        return longest
