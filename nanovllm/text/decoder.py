"""From token ids to text, whole completions at a time.

To decode a completion in pieces is not to decode it at once. A character can be spread over several
tokens; SentencePiece drops the space at the beginning of what it decodes; and byte-fallback
tokenizers (Llama 2, Gemma) decode a run of byte tokens as a whole, which turns every byte of it
into U+FFFD, the sign for "no character", if one of them is wrong.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_CHARACTER = "\ufffd"  # what decoders put for bytes that are not UTF-8
PROMPT_TAIL = 64  # how far back from its end a prompt is searched for a token with text

# Byte-level tokenizers (GPT-2, Qwen, Llama 3) write each byte as one printable character: those
# that are printable in Latin-1 as themselves, the others as characters from U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_OF_CHARACTER = {chr(byte): byte for byte in PRINTABLE}
BYTE_OF_CHARACTER |= {chr(0x100 + index): byte for index, byte in enumerate(OTHERS)}


class TextDecoder:
    """Decodes completions with one tokenizer, be it a fast one or one written in Python."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.special_ids = set(tokenizer.all_special_ids)
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token.special:
                self.special_ids.add(token_id)
        tokens = tokenizer.convert_ids_to_tokens(sorted(self.special_ids))
        # The longest ones first: one may begin with another.
        self.special_strings = sorted(filter(None, tokens), key=len, reverse=True)
        self.byte_ids: dict[int, int] = {}  # the byte tokens of a byte-fallback tokenizer
        vocabulary = tokenizer.get_vocab()
        for byte in range(256):
            name = f"<0x{byte:02X}>"
            if name in vocabulary:
                self.byte_ids[vocabulary[name]] = byte
        # Straight to the library beneath: transformers' own way takes several times as long.
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        for method in (type(tokenizer).decode, type(tokenizer)._decode):
            if not method.__module__.startswith("transformers.tokenization_utils"):
                self._backend = None  # this class does more than the library

        self.has_byte_runs = self._decodes_byte_runs_whole()

    def _decodes_byte_runs_whole(self) -> bool:
        """Whether successive byte tokens become characters if all of them are UTF-8, and otherwise
        none of them does. Then `ByteRun` knows their text without decoding it.
        """
        if self._backend is None or len(self.byte_ids) < 256:
            return False
        id_of = {byte: token_id for token_id, byte in self.byte_ids.items()}
        valid = [id_of[byte] for byte in "é".encode()]
        if self.decode(valid, skips_special=False) != "é":
            return False
        return self.decode([*valid, id_of[0xFF]], skips_special=False) == 3 * NO_CHARACTER

    def decode(self, token_ids: list[int], skips_special: bool) -> str:
        """Decode, without the `clean_up_tokenization_spaces` of some configurations, which would
        rewrite text that a stream has given out.
        """
        if self._backend is not None:
            return self._backend.decode(token_ids, skip_special_tokens=skips_special)
        text = self.tokenizer.decode(
            token_ids, skip_special_tokens=skips_special, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list only for a batch of sequences
        return text

    def token_text(self, token_id: int) -> str:
        """The text of a token alone, be it special or not."""
        return self.decode([token_id], skips_special=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token alone, which can be only part of a character."""
        text = self.token_text(token_id)
        may_be_part = token_id in self.byte_ids if self.byte_ids else True
        if NO_CHARACTER in text and may_be_part:
            return self._bytes_of(token_id)
        return text.encode(errors="replace")

    def completion_text(self, token_ids: list[int], skips_special: bool, context: list[int]) -> str:
        """The text of a whole completion behind `context`, see `context_of`. A character at its end
        of which only some bytes are there is left out.
        """
        window = context + token_ids
        text = self.without_partial(self.decode(window, skips_special), window, skips_special)
        return text[len(self.decode(context, skips_special)) :]

    def context_of(self, prompt_ids: list[int]) -> list[int]:
        """A list of the last token of a prompt that stands for text; an empty one if none does.

        A completion is decoded behind it. Decoded alone, it would lose its first space.
        """
        tail = prompt_ids[-PROMPT_TAIL:]
        for token_id in reversed(tail):
            if self.is_context(token_id):
                return [token_id]
        # Tokens can be text together that alone are none: bytes of a character, several spaces.
        return self.stand_in if self.decode(tail, skips_special=True) else []

    def is_context(self, token_id: int) -> bool:
        """Whether a token alone stands for text."""
        if not self.ends_run(token_id, skips_special=True):
            return False
        text = self.decode([token_id], skips_special=True)
        return bool(text) and NO_CHARACTER not in text

    @cached_property
    def stand_in(self) -> list[int]:
        """A list of some token that stands for text; an empty one if none is found."""
        with suppress(Exception):  # a tokenizer of a text that it cannot encode
            token_ids = self.tokenizer.encode("a", add_special_tokens=False)
            return [token_id for token_id in token_ids if self.is_context(token_id)][-1:]
        return []

    def is_silent(self, token_id: int, skips_special: bool) -> bool:
        """Whether a token is nothing in any text: a special one that is left out, or an id that the
        tokenizer does not have (models pad their vocabulary).
        """
        if token_id in self.special_ids:
            return skips_special
        return self._backend is not None and self._backend.id_to_token(token_id) is None

    def ends_run(self, token_id: int, skips_special: bool) -> bool:
        """Whether no token before this one is decoded together with those behind it."""
        return token_id not in self.byte_ids and not self.is_silent(token_id, skips_special)

    def without_partial(self, text: str, token_ids: list[int], skips_special: bool) -> str:
        """Leave a character at the end of the text out if it lacks bytes; `token_ids` are the
        text's. Bytes that no others could make a character of stay, as U+FFFD.
        """
        if not text.endswith(NO_CHARACTER):
            return text
        token_ids = [i for i in token_ids if not self.is_silent(i, skips_special)]
        tail = b""
        for token_id in reversed(token_ids[-4:]):  # a character has at most 4 bytes
            tail = self._bytes_of(token_id) + tail
        num_bytes = num_waiting(tail)
        if num_bytes == 0:
            return text
        if self.byte_ids:  # each of them is a token, and could spoil the run that it ends
            return self.decode(token_ids[:-num_bytes], skips_special)
        return text[:-1]

    def _bytes_of(self, token_id: int) -> bytes:
        if self.byte_ids:
            byte = self.byte_ids.get(token_id)
            return b" " if byte is None else bytes([byte])
        token = str(self.tokenizer.convert_ids_to_tokens(token_id) or "")
        if any(character not in BYTE_OF_CHARACTER for character in token):
            return token.encode(errors="replace")
        return bytes(BYTE_OF_CHARACTER[character] for character in token)

    def special_strings_in(self, stops: Iterable[str]) -> re.Pattern[str] | None:
        """A pattern of all special tokens' strings if any of `stops` holds one of them."""
        if not any(string in stop for string in self.special_strings for stop in stops):
            return None
        return re.compile("|".join(map(re.escape, self.special_strings)))


def num_waiting(tail: bytes) -> int:
    """How many bytes at the end of a text are the beginning of a character, and wait for others."""
    utf8 = getincrementaldecoder("utf-8")(errors="replace")
    utf8.decode(tail)
    return len(utf8.getstate()[0])


@lru_cache(maxsize=4)
def decoder_of(tokenizer: PreTrainedTokenizerBase) -> TextDecoder:
    """The decoder of a tokenizer, which is made once."""
    return TextDecoder(tokenizer)
