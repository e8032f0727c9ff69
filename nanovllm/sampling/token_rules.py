"""Rules that say which tokens may come next in one completion: on the host, as bits.

A mask has a bit for each token id, 32 in each of its words `[ceil(vocab / 32)]` uint32: bit i % 32
of word i // 32 is set if token i may be drawn. Each rule clears the bits of what it forbids. One
that depends on the tokens so far is asked again for each token, when all before it are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ALL_BITS = 0xFFFFFFFF  # a word that allows all of its 32 tokens


class TokenRule(Protocol):
    """Something that forbids tokens. One that has state belongs to one completion."""

    reads_tokens: bool  # whether the mask depends on the completion so far

    def narrow(self, mask: np.ndarray, token_ids: list[int], start: int) -> None:
        """Clear bits of `mask` `[words]` uint32.

        token_ids: prompt and completion so far; the completion begins at index `start`.
        """


def mask_of(token_ids: Iterable[int], num_words: int) -> np.ndarray:
    """Return the mask `[num_words]` uint32 that allows these tokens only."""
    ids = np.fromiter(token_ids, np.int64)
    words = np.zeros(num_words, np.uint32)
    np.bitwise_or.at(words, ids // 32, np.uint32(1) << (ids % 32).astype(np.uint32))
    return words


class AllowedTokens:
    """Some tokens may be drawn at any time, no others."""

    reads_tokens = False

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def narrow(self, mask: np.ndarray, token_ids: list[int], start: int) -> None:
        """Clear the bits of all others."""
        mask &= self.mask


class BadWords:
    """Sequences of tokens that may not occur: their last token is forbidden where it would end one.

    Those of a single token are a matter for `AllowedTokens`.
    """

    reads_tokens = True

    def __init__(self, words: list[tuple[int, ...]], num_words: int) -> None:
        self.words = words
        self.masks = [~mask_of(word[-1:], num_words) for word in words]

    def narrow(self, mask: np.ndarray, token_ids: list[int], start: int) -> None:
        """Clear the bit of each word's last token if the others stand at the end."""
        for word, others in zip(self.words, self.masks, strict=True):
            begun = word[:-1]
            is_in_completion = len(token_ids) - start >= len(begun)
            if is_in_completion and tuple(token_ids[-len(begun) :]) == begun:
                mask &= others


class ThinkingBudget:
    """So many tokens may stand between the start and the end of thinking; then it has to end.

    All tokens of a completion that are inside count together, those of the prompt do not. Thinking
    that the prompt has started goes on in the completion.
    """

    reads_tokens = True

    def __init__(self, budget: int, start_id: int, end_id: int, num_words: int) -> None:
        self.left = budget
        self.start_id = start_id
        self.end_id = end_id
        self.only_end = mask_of([end_id], num_words)
        self.is_thinking = False
        self.num_read = 0  # tokens of prompt and completion

    def narrow(self, mask: np.ndarray, token_ids: list[int], start: int) -> None:
        """Clear all bits but the one of the end, if nothing is left."""
        for index in range(self.num_read, len(token_ids)):
            token_id = token_ids[index]
            if token_id in (self.start_id, self.end_id):
                self.is_thinking = token_id == self.start_id
            elif self.is_thinking and index >= start:
                self.left -= 1
        self.num_read = len(token_ids)
        if self.is_thinking and self.left <= 0:
            mask &= self.only_end


@dataclass(slots=True)
class CompletionRules:
    """All rules of one completion, and how far they have followed it."""

    num_words: int  # of a mask
    rules: list[TokenRule]
    # Makes a matcher of llguidance, where the text must have a form. Only when the first token is
    # about to be drawn: of many thousand queued completions, few are running.
    make_matcher: Callable[[], Any] | None = None
    matcher: Any = None
    num_read: int = 0  # tokens of prompt and completion that the matcher has read
    problem: str = ""  # why no token at all may come next

    @property
    def reads_tokens(self) -> bool:
        """Whether the next mask depends on the tokens before it."""
        return self.make_matcher is not None or any(rule.reads_tokens for rule in self.rules)

    @property
    def may_contradict(self) -> bool:
        """Whether one rule may forbid all that another allows."""
        return len(self.rules) + (self.make_matcher is not None) > 1
