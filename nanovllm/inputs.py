"""The forms of a prompt: a text, token ids, or, as in scripts for vLLM, a dict with one of them."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, TypedDict


class TextPrompt(TypedDict):
    """A text, which is encoded."""

    prompt: str


class _TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


class TokensPrompt(_TokensPrompt, total=False):
    """Token ids."""

    prompt: str  # their text, if that is known: the result shows it, and nobody encodes it


Prompt = str | list[int] | TextPrompt | TokensPrompt
Prompts = Prompt | SequenceOf[Prompt]
KEYS = ("prompt", "prompt_token_ids")
# These may hold integers, but no token ids: bytes are text, and sets and dicts have no order.
NEVER_A_PROMPT = (bytes, bytearray, dict, set, frozenset)


class PromptTooLong(ValueError):
    """A prompt has more tokens than `max_model_len` leaves room for: nothing else is wrong."""


@dataclass(frozen=True, slots=True)
class PromptParts:
    """A prompt of any form; the token ids are not checked yet."""

    text: str | None
    token_ids: Any  # None: the text is to be encoded

    @property
    def content(self) -> Any:
        """What becomes the prompt: the token ids if there are any, else the text."""
        return self.text if self.token_ids is None else self.token_ids


def split_prompt(index: int, prompt: Any) -> PromptParts:
    """Find text and token ids of a prompt, the one number `index` of a call.

    Raises:
        TypeError: for a dict that has something else beside them, an image say.
    """
    if isinstance(prompt, str):
        return PromptParts(prompt, None)
    if not isinstance(prompt, dict) or not any(prompt.get(key) is not None for key in KEYS):
        return PromptParts(None, prompt)
    for key, value in prompt.items():
        if key not in KEYS and value is not None:
            raise TypeError(
                f"prompt {index} has {key!r}, which cannot be used here: a dict may have "
                f"{' and '.join(map(repr, KEYS))}, and nothing but text is read"
            )
    text = prompt.get("prompt")
    token_ids = prompt.get("prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise TypeError(f"prompt {index} must have a string as its 'prompt', not {text!r:.60}")
    if isinstance(token_ids, str):
        raise TypeError(
            f"prompt {index} must have a list of token ids as its 'prompt_token_ids', not "
            f"{token_ids!r:.60}"
        )
    return PromptParts(text, token_ids)


def token_ids_of(index: int, content: Any, encode: Callable[[str], list[int]]) -> array[int]:
    """Encode a text, or collect token ids from a list, an array, any iterable of integers.

    Raises:
        TypeError: if it is neither.
        ValueError: for a text that the tokenizer refuses, and ids of more than 32 bits.
    """
    if isinstance(content, str):
        try:
            return array("i", encode(content))
        except Exception as error:  # the text has a lone surrogate, for example
            raise ValueError(
                f"prompt {index} cannot be tokenised: {content!r:.60}: {error}"
            ) from error
    cause: Exception | None = None
    if not isinstance(content, NEVER_A_PROMPT):
        try:
            return array("i", content)
        except OverflowError as error:
            raise ValueError(
                f"prompt {index} has a token id far outside the vocabulary: {error}"
            ) from None
        except Exception as error:  # no iterable, or not of integers
            cause = error
    raise TypeError(
        f"prompt {index} must be a string or a list of token ids (one prompt of token ids is "
        f"passed as a list of one list), not {content!r:.60}"
    ) from cause


def listed(content: Any, token_ids: array[int]) -> list[int]:
    """List the token ids of a prompt, which are all that `content` holds, or its last ones.

    The numbers of a list are taken over. To make new ones would take longer than all checks, and
    where many prompts begin with the same numbers, these are compared faster than equal ones.
    """
    if type(content) is list and set(map(type, content)) == {int}:
        return content[len(content) - len(token_ids) :]
    return token_ids.tolist()
