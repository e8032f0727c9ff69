"""From text to token ids, with BOS once, whoever has put it there."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, bos_ids: list[int]) -> list[int]:
    """Encode a text; raises what the tokenizer does. `bos_ids` is what `find_bos` has found."""
    token_ids = tokenizer.encode(text)
    num_bos = len(bos_ids)
    if token_ids[: 2 * num_bos] == bos_ids * 2:  # a chat template has put it into the text, too
        return token_ids[num_bos:]
    return token_ids


def find_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find out which tokens, such as BOS, a tokenizer puts before every text."""
    with suppress(Exception):  # a tokenizer of a text that it cannot encode
        plain = tokenizer.encode("a", add_special_tokens=False)
        token_ids = tokenizer.encode("a")
        for start in range(len(token_ids)):
            if plain and token_ids[start : start + len(plain)] == plain:
                return token_ids[:start]
    return []
