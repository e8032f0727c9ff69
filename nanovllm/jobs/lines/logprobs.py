"""Log-probabilities in the structures of OpenAI's API: chats have one, completions another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.jobs.lines.line import LineError
from nanovllm.jobs.lines.line_request import LineRequest
from nanovllm.results import CompletionOutput, Logprob
from nanovllm.text.decoder import NO_CHARACTER

LOWEST = -9999.0  # stands for a log-probability of minus infinity, for which JSON has no form


def logprobs_content(
    request: LineRequest, completion: CompletionOutput
) -> list[dict[str, Any]] | None:
    """The positions of a completion in the structure of chats; None if nobody asked for them."""
    number = getattr(request.params[0], "logprobs", None)
    if number is None or completion["logprobs"] is None:
        return None
    return [token_logprobs(request, entry, number) for entry in completion["logprobs"]]


def token_logprobs(request: LineRequest, entry: dict[int, Logprob], number: int) -> dict[str, Any]:
    """One position in the structure of chats: the token that was drawn, and the likeliest ones.

    entry: the drawn token first, then the likeliest ones; it is among them if its rank is.
    number: of the likeliest ones that were asked for; -1: all.
    """
    tokens = sorted(entry.values(), key=rank_of)
    if number >= 0:
        tokens = [token for token in tokens if rank_of(token) <= number]
    drawn = next(iter(entry.values()))
    top_logprobs = [token_items(request, token) for token in tokens]
    return {**token_items(request, drawn), "top_logprobs": top_logprobs}


def rank_of(token: Logprob) -> float:
    """The rank, as something to sort by."""
    return float("inf") if token.rank is None else token.rank


def token_items(request: LineRequest, token: Logprob) -> dict[str, Any]:
    """A token and its log-probability, as chats have them."""
    text = token.decoded_token or ""
    return {"token": text, "logprob": finite(token), "bytes": bytes_of(request, token, text)}


def bytes_of(request: LineRequest, token: Logprob, text: str) -> list[int] | None:
    """The bytes of a token's text; None if it is part of a character and nobody knows which."""
    if NO_CHARACTER not in text:
        return list(text.encode(errors="replace"))
    if request.token_bytes is None or token.token_id is None:
        return None
    return list(request.token_bytes(token.token_id))


def finite(logprob: float) -> float:
    """A log-probability that JSON has a form for. Raises a LineError for NaN."""
    value = float(logprob)
    if value != value:
        raise LineError("the model yields NaN", "model_error", status=500)
    return max(value, LOWEST)


def columns(entries: Sequence[dict[int, Logprob]]) -> dict[str, Any]:
    """All positions in the structure of completions: a list for each kind of thing."""
    texts = []
    values = []
    offsets = []
    tops = []
    offset = 0
    for entry in entries:
        drawn = next(iter(entry.values()))
        text = drawn.decoded_token or ""
        texts.append(text)
        values.append(finite(drawn))
        offsets.append(offset)
        offset += len(text)
        top: dict[str, float] = {}
        for token in sorted(entry.values(), key=rank_of):
            # Several tokens may have one text, U+FFFD say: the likeliest is shown.
            top.setdefault(token.decoded_token or "", finite(token))
        tops.append(top)
    return {
        "tokens": texts,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(entries: Sequence[dict[int, Logprob] | None]) -> list[Any]:
    """Those of a prompt, by token ids, as vLLM's server has them; None for its first token."""
    shown: list[Any] = []
    for entry in entries:
        if entry is None:
            shown.append(None)
            continue
        shown.append(
            {
                str(token_id): {
                    "logprob": finite(token),
                    "rank": token.rank,
                    "decoded_token": token.decoded_token,
                }
                for token_id, token in entry.items()
            }
        )
    return shown
