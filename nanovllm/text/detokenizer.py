"""From token ids to text, one token at a time."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from typing import TYPE_CHECKING

from nanovllm.text.decoder import NO_CHARACTER, decoder_of, num_waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.sampling_params import SamplingParams

WINDOW = 8  # the tokens that are decoded again with each new one; any number will do


class ByteRun:
    """The text of successive byte tokens while they come. All of them are decoded together, and to
    do that again with each would take a time that grows with the square of their number.
    """

    def __init__(self) -> None:
        self._utf8 = getincrementaldecoder("utf-8")()
        self._text = ""
        self._num_bytes = 0
        self._tail = b""  # the last four of them, the most that a character has
        self._is_broken = False  # whether they can be no text, whatever follows

    def append(self, byte: int) -> str:
        """Add a byte; returns the text of all. A character that lacks bytes is left out."""
        self._num_bytes += 1
        self._tail = (self._tail + bytes([byte]))[-4:]
        if not self._is_broken:
            try:
                self._text += self._utf8.decode(bytes([byte]))
            except UnicodeDecodeError:
                self._is_broken = True
        if not self._is_broken:
            return self._text
        return NO_CHARACTER * (self._num_bytes - num_waiting(self._tail))


class Detokenizer:
    """The text of one completion while it grows, for requests with stop strings or a reader.

    After each token there is the text that the completion would have if it ended there, and in that
    stop strings are searched. How much of it the next tokens cannot change any more is counted, and
    so much a reader gets.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        params: SamplingParams,
        prompt_ids: list[int] | None = None,
    ) -> None:
        self.decoder = decoder_of(tokenizer)
        self.keeps_stop = params.include_stop_str_in_output
        self.stops: tuple[str, ...] = tuple(params.stop or ())
        # With a special token in a stop string, the text that is searched has to show those
        # tokens. If the request skips them, they are taken out of what the reader gets.
        self.hidden: re.Pattern[str] | None = None
        if self.stops and params.skip_special_tokens:
            self.hidden = self.decoder.special_strings_in(self.stops)
        self.skips_special = params.skip_special_tokens and self.hidden is None
        self.context = self.decoder.context_of(prompt_ids or [])
        self.token_ids: list[int] = []
        self._searched = ""  # the text so far, with the tokens that `hidden` hides
        self._ending = ""  # the stop string that ended it, if the text keeps that
        self._num_settled = 0  # characters of `_searched` that no further token changes
        self._num_taken = 0  # characters of `_searched` that `take` has been over
        # The newest tokens, which are decoded again with each new one; `_head` is the text before
        # them and of the first of them, whose own text has so many characters.
        self._window = list(self.context)
        self._head = ""
        self._num_first = len(self.decoder.decode(self._window, self.skips_special))
        # The byte tokens at the end of the window, if they are followed without being decoded, and
        # the text before them.
        self._run: ByteRun | None = None
        self._before_run = ""

    @property
    def text(self) -> str:
        """The text as it would be if the completion ended here."""
        return self._visible(self._searched) + self._ending

    def _visible(self, text: str) -> str:
        return text if self.hidden is None else self.hidden.sub("", text)

    def append(self, token_id: int | None, is_last: bool, may_stop: bool) -> str | None:
        """Add a token (None: one that is not shown); returns the stop string that it completes.

        The text is then cut before it, or behind it if the request keeps stop strings. Without
        `may_stop` none is looked for, and the result is None.
        """
        old = self._searched
        old_settled = self._num_settled
        if token_id is not None:
            self._add(token_id)
        if is_last:  # the whole, in case that a decoder is of a kind that this one does not know
            whole = self.decoder.completion_text(self.token_ids, self.skips_special, self.context)
            if whole.startswith(self._searched[: self._num_taken]):
                self._searched = whole
        if not self.stops or not may_stop:
            return None
        is_rewritten = not self._searched.startswith(old)  # a run of bytes at its end
        return self._cut_at_stop(old_settled if is_rewritten else len(old))

    def _add(self, token_id: int) -> None:
        old_length = len(self._searched)
        self.token_ids.append(token_id)
        if self.decoder.is_silent(token_id, self.skips_special):
            return  # in the window a long run of them would be decoded again with each new token
        self._window.append(token_id)
        text = self._text_of_run(token_id)
        if text is not None:
            self._searched = text
            return
        new = self.decoder.decode(self._window, self.skips_special)
        is_whole = not new.endswith(NO_CHARACTER)
        if not is_whole:
            new = self.decoder.without_partial(new, self._window, self.skips_special)
        self._searched = self._head + new[self._num_first :]
        if not self.decoder.ends_run(token_id, self.skips_special):
            return
        self._num_settled = len(self._searched)
        # The window may begin with a token that shows: a space is dropped before the first one.
        if len(self._window) > WINDOW and is_whole and len(self._searched) > old_length:
            self._window = [token_id]
            self._head = self._searched
            self._num_first = len(self.decoder.decode(self._window, self.skips_special))

    def _text_of_run(self, token_id: int) -> str | None:
        """Return the text with this token if it is one of a run of bytes, whose text is known
        without decoding; else None.
        """
        byte = self.decoder.byte_ids.get(token_id)
        if byte is None:
            self._run = None
            return None
        if self._run is None and self._can_begin_run(byte):
            self._run = ByteRun()
            self._before_run = self._searched
        if self._run is None:
            return None
        return self._before_run + self._run.append(byte)

    def _can_begin_run(self, byte: int) -> bool:
        """Whether the byte token at the end of the window begins a run whose text is known."""
        begins = len(self._window) == 1 or self._window[-2] not in self.decoder.byte_ids
        # A space that begins the whole text may be dropped.
        is_kept = byte != ord(" ") or bool(self.context or self._searched)
        return self.decoder.has_byte_runs and begins and is_kept

    def _cut_at_stop(self, old_length: int) -> str | None:
        """Cut the text at the first stop string to end behind `old_length`; returns that string."""
        first_stop = None
        first_end = len(self._searched) + 1
        for stop in self.stops:
            # A match that begins earlier ends in the old text, which had its turn in earlier calls.
            earliest = max(old_length + 1 - len(stop), 0)
            begin = self._searched.find(stop, earliest)
            end = begin + len(stop)
            if begin != -1 and end < first_end:  # of two with one end, the one named first
                first_stop = stop
                first_end = end
        if first_stop is not None:
            self._searched = self._searched[: first_end - len(first_stop)]
            self._ending = first_stop if self.keeps_stop else ""
        return first_stop

    def take(self, is_finished: bool) -> str:
        """The text that is new since the last call, less what further tokens may change and what
        may be the start of a stop string.
        """
        start = self._num_taken
        if is_finished:
            self._num_taken = len(self._searched)
            return self._visible(self._searched[start:]) + self._ending
        end = min(self._num_settled, len(self._searched) - self._num_held_back())
        self._num_taken = max(start, end)
        return self._visible(self._searched[start : self._num_taken])

    def _num_held_back(self) -> int:
        """How many characters at the end of the text are the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(longest + 1, len(stop)):
                if self._searched.endswith(stop[:length]):
                    longest = length
        return longest
