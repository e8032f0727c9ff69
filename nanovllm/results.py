"""The classes of results: dicts whose items are attributes too, under the names of vLLM's results.

So `outputs[0]["text"]`, which is the design here, and `outputs[0].outputs[0].text`, which scripts
written for vLLM read, are the same item: what is changed in one is changed in the other.
With n above 1 the first completion is a dict of its own, of which the result begins as a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, NamedTuple


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


def showing(method: Callable[..., Any]) -> Any:
    """Make a method of `LogprobDict` of one of dicts: the same, after the numbers were replaced."""

    @wraps(method)
    def show_first(self: LogprobDict, *args: Any) -> Any:
        self._show()
        return method(self, *args)

    return show_first


class LogprobDict(dict[int, Logprob]):
    """The log-probabilities of one position: of the token that is there, then of the likeliest.

    It is filled with plain numbers, which become `Logprob`s when somebody looks at it. An object
    for each would take the host longer than a GPU takes for the token.
    """

    __slots__ = ("_decode", "_is_shown", "_is_top", "_rank")

    def __init__(
        self,
        token_ids: Sequence[int],
        values: Sequence[float],
        rank: int | None,
        decode: Callable[[int], str] | None,
    ) -> None:
        """Take what a step has found.

        token_ids: the token that is there, then the likeliest ones, in their order.
        values: the log-probability of each.
        rank: of the token that is there, among the whole vocabulary.
        decode: from a token id to its text.
        """
        super().__init__(zip(token_ids, values, strict=True))  # type: ignore[arg-type]
        self._is_shown = False
        self._decode = decode
        # A token that is one of the likeliest, too, is there once, with its place among them.
        self._is_top = len(self) < len(token_ids)
        self._rank = token_ids.index(token_ids[0], 1) if self._is_top else rank

    def _show(self) -> None:
        """Put a `Logprob` in the place of each number."""
        if self._is_shown:
            return
        self._is_shown = True
        rank = self._rank
        place = 0
        for token_id, value in list(dict.items(self)):
            self[token_id] = Logprob(value, rank, token_id, self._decode)
            place += 1
            if self._is_top and place == self._rank:
                place += 1  # its token was the first one
            rank = place

    __getitem__ = showing(dict.__getitem__)
    copy = showing(dict.copy)
    get = showing(dict.get)
    items = showing(dict.items)
    pop = showing(dict.pop)
    popitem = showing(dict.popitem)
    setdefault = showing(dict.setdefault)
    values = showing(dict.values)

    def __iter__(self) -> Iterator[int]:
        """As of any dict; but without this method `dict(self)` would copy the numbers as they are,
        and not come to the other methods.
        """
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies, and what is unpickled, are plain dicts."""
        return dict, (dict(self),)


class TokenLogprobs(NamedTuple):
    """The log-probabilities that a step reports for one sequence; see `LogprobDict`."""

    token_ids: list[int]
    values: list[float]
    rank: int | None = None

    def first(self, number: int) -> TokenLogprobs:
        """The first ones only: another request of the step may have asked for more."""
        return TokenLogprobs(self.token_ids[:number], self.values[:number], self.rank)

    def as_dict(self, decode: Callable[[int], str] | None) -> LogprobDict:
        """What a result shows of it; `decode` makes text of a token id."""
        return LogprobDict(self.token_ids, self.values, self.rank, decode)


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
    # Tokens of the prompt that were not computed for it: they were in the prefix cache, or an equal
    # prompt in the same step computed them.
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
