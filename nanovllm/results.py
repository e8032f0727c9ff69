"""The classes of results: dicts whose items are attributes too, under the names of vLLM's results.

So `outputs[0]["text"]`, which is the design here, and `outputs[0].outputs[0].text`, which scripts
written for vLLM read, are the same item: what is changed in one is changed in the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


class Logprob(float):
    """A log-probability: a number, which JSON and arithmetic take as such, and what it is of."""

    __slots__ = ("_decode", "rank", "token_id")
    rank: int | None  # of the token among all: 1 is the likeliest
    token_id: int | None
    _decode: Callable[[int], str] | None  # from a token id to its text

    def __new__(
        cls,
        logprob: float,
        rank: int | None = None,
        token_id: int | None = None,
        decode: Callable[[int], str] | None = None,
    ) -> Logprob:
        """Make one of the number; what is not given is None."""
        self = super().__new__(cls, logprob)
        self.rank = rank
        self.token_id = token_id
        self._decode = decode
        return self

    @property
    def logprob(self) -> float:
        """The number alone."""
        return float(self)

    @property
    def decoded_token(self) -> str | None:
        """The text of the token, decoded when it is asked for; None without a tokenizer."""
        if self._decode is None or self.token_id is None:
            return None
        return self._decode(self.token_id)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle it with the text that the tokenizer makes now, and not with that."""
        return _decoded_logprob, (self.logprob, self.rank, self.token_id, self.decoded_token)


def _decoded_logprob(
    logprob: float, rank: int | None, token_id: int | None, text: str | None
) -> Logprob:
    decode = None if text is None else lambda _: text
    return Logprob(logprob, rank, token_id, decode)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities at one position, of the token that is there and of the likeliest."""

    token_ids: list[int]  # the token that is there, then the likeliest ones, in their order
    values: list[float]  # the log-probability of each
    rank: int | None = None  # of the token that is there, among the whole vocabulary

    def first(self, number: int) -> TokenLogprobs:
        """The first ones only: another request of the step may have asked for more."""
        return TokenLogprobs(self.token_ids[:number], self.values[:number], self.rank)

    def as_dict(self, decode: Callable[[int], str] | None) -> dict[int, Logprob]:
        """What a result shows: token id -> Logprob. `decode` makes text of a token id."""
        # A token that is one of the likeliest, too, is shown once, with its place among them.
        ranks = (self.rank, *range(1, len(self.token_ids)))
        return {
            token_id: Logprob(value, rank, token_id, decode)
            for token_id, value, rank in zip(self.token_ids, self.values, ranks, strict=True)
        }


def item(key: str) -> Any:
    """Make an attribute that is an item of the dict; None where the dict has no such key."""

    def read(self: dict[str, Any]) -> Any:
        return self.get(key)

    def write(self: dict[str, Any], value: Any) -> None:
        self[key] = value

    return property(read, write)


class CompletionOutput(dict[str, Any]):
    """One completion of a prompt. Each attribute is an item of the dict, under the same name."""

    text: str = item("text")  # "" without a tokenizer
    # Of the completion only; the token that ended it is the last.
    token_ids: list[int] = item("token_ids")
    # "stop", "length" (max_tokens or max_model_len), "abort", "error"; None: a stream goes on.
    finish_reason: str | None = item("finish_reason")
    # The stop string or stop token id that ended it, if one did; after an "error" what went wrong.
    stop_reason: str | int | None = item("stop_reason")
    # If asked for: for each token a dict of token id -> log-probability, the sampled token first.
    logprobs: list[dict[int, Logprob]] | None = item("logprobs")

    index: int = 0  # which of the prompt's completions; this one is no item

    @property
    def cumulative_logprob(self) -> float | None:
        """The log-probability of all its tokens together; None unless log-probabilities are there.

        The sum of those of the sampled tokens, of which each is the first in its dict.
        """
        if self.logprobs is None:
            return None
        return float(sum(next(iter(entry.values())) for entry in self.logprobs))


class RequestOutput(CompletionOutput):
    """What a request returns: its first completion, and what belongs to all of them."""

    prompt_token_ids: list[int] = item("prompt_token_ids")
    # Tokens of the prompt that were found in the prefix cache.
    num_cached_tokens: int = item("num_cached_tokens")
    # If asked for, and the key is there only then: None for the first token of the prompt, and for
    # each other one a dict of token id -> log-probability, that token first.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = item("prompt_logprobs")

    # No items: the dict has none of these.
    prompt: str | None = None  # the text that was passed; None if it was token ids
    request_id: str = ""  # the number that `add_request` returns and `step` reports, as a string
    finished: bool = True  # nothing is returned before all completions have ended

    @property
    def outputs(self) -> list[CompletionOutput]:
        """All n completions; one alone is this result itself, so that there is no second copy.

        With n > 1 they are the items of the key "completions", which is there only then.
        """
        completions: list[CompletionOutput] = self.get("completions", [self])
        return completions


class StreamPart(CompletionOutput):
    """What `LLM.stream` yields: what is new of one completion, and whose it is."""

    index: int = item("index")  # of the prompt in the list that was passed
    completion: int = item("completion")  # which of the prompt's n completions, from 0
