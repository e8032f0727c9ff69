"""The bodies of answers in the batch form, as OpenAI's API has them.

More than OpenAI's fields are there where a line asks for more: `token_ids`, `prompt_token_ids` and
`prompt_logprobs`, under the names that vLLM's server gives them, and `stop_reason`.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanovllm.jobs.line import LineError
from nanovllm.jobs.line_request import LineRequest
from nanovllm.pooling.results import EmbeddingRequestOutput
from nanovllm.results import CompletionOutput, Logprob, RequestOutput
from nanovllm.text.decoder import NO_CHARACTER

LOWEST = -9999.0  # stands for a log-probability of minus infinity, for which JSON has no form


def completion_body(request: LineRequest, results: Sequence[RequestOutput]) -> dict[str, Any]:
    """The body of an answer to a prompt, several prompts, or a chat."""
    is_chat = request.kind == "chat"
    choices: list[dict[str, Any]] = []
    for index, result in enumerate(results):
        for completion in result.outputs:
            choice: dict[str, Any] = {"index": len(choices)}
            if is_chat:
                choice |= chat_items(request, completion)
            else:
                echo = str(request.prompts[index]) if request.echo else ""
                choice |= completion_items(completion, echo)
            choice["finish_reason"] = completion["finish_reason"]
            if completion["stop_reason"] is not None:
                choice["stop_reason"] = completion["stop_reason"]
            if request.shows_ids:
                choice["token_ids"] = completion["token_ids"]
                choice["prompt_token_ids"] = result["prompt_token_ids"]
            if result.prompt_logprobs is not None:
                choice["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
            choices.append(choice)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request.number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": choices,
        "usage": usage(results),
    }


def embedding_body(
    request: LineRequest, results: Sequence[EmbeddingRequestOutput]
) -> dict[str, Any]:
    """The body of an answer to one input or several."""
    vectors = [vector(request, result) for result in results]
    num_tokens = num_prompt_tokens(results)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(vectors)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def vector(request: LineRequest, result: EmbeddingRequestOutput) -> str | list[float]:
    """An embedding as numbers, or as the base64 of little-endian float32."""
    if not math.isfinite(sum(result.embedding)):
        raise LineError("the model yields NaN or infinity", "model_error", status=500)
    if not request.base64:
        return result.embedding
    return base64.b64encode(np.asarray(result.embedding, "<f4").tobytes()).decode()


def chat_items(request: LineRequest, completion: CompletionOutput) -> dict[str, Any]:
    """What a choice of a chat has of its own."""
    content = logprobs_content(request, completion)
    logprobs = None if content is None else {"content": content, "refusal": None}
    message = {"role": "assistant", "content": completion["text"], "refusal": None}
    return {"message": message, "logprobs": logprobs}


def completion_items(completion: CompletionOutput, echo: str) -> dict[str, Any]:
    """What a choice of a completion has of its own.

    echo: the text that comes before the completion's.
    """
    logprobs = None
    if completion["logprobs"] is not None:
        logprobs = columns(completion["logprobs"])
    return {"text": echo + completion["text"], "logprobs": logprobs}


# --- log-probabilities ----------------------------------------------------------------------------


def logprobs_content(
    request: LineRequest, completion: CompletionOutput
) -> list[dict[str, Any]] | None:
    """The positions of a completion in the structure of chats; None if nobody asked for them."""
    number = getattr(request.params[0], "logprobs", None)
    if number is None or completion["logprobs"] is None:
        return None
    return [token_logprobs(entry, number) for entry in completion["logprobs"]]


def token_logprobs(entry: dict[int, Logprob], number: int) -> dict[str, Any]:
    """One position in the structure of chats: the token that was drawn, and the likeliest ones.

    entry: the drawn token first, then the likeliest ones; it is among them if its rank is.
    number: of the likeliest ones that were asked for; -1: all.
    """
    tokens = sorted(entry.values(), key=rank_of)
    if number >= 0:
        tokens = [token for token in tokens if rank_of(token) <= number]
    drawn = next(iter(entry.values()))
    return {**token_items(drawn), "top_logprobs": [token_items(token) for token in tokens]}


def rank_of(token: Logprob) -> float:
    """The rank, as something to sort by."""
    return float("inf") if token.rank is None else token.rank


def token_items(token: Logprob) -> dict[str, Any]:
    """A token and its log-probability, as chats have them."""
    text = token.decoded_token or ""
    return {"token": text, "logprob": finite(token), "bytes": token_bytes(text)}


def token_bytes(text: str) -> list[int] | None:
    """The bytes of a token's text; None of a token that is only part of a character."""
    return None if NO_CHARACTER in text else list(text.encode(errors="replace"))


def finite(logprob: float) -> float:
    """A log-probability that JSON has a form for."""
    return max(float(logprob), LOWEST)


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


# --- usage ----------------------------------------------------------------------------------------


def num_prompt_tokens(results: Sequence[Any]) -> int:
    """How many tokens all prompts of a line have together."""
    return sum(len(result["prompt_token_ids"]) for result in results)


def num_completion_tokens(results: Sequence[RequestOutput]) -> int:
    """How many tokens all completions of a line have together."""
    return sum(len(part["token_ids"]) for result in results for part in result.outputs)


def usage(results: Sequence[RequestOutput]) -> dict[str, Any]:
    """How many tokens a line was, and how many of the prompt's were in the prefix cache."""
    prompt = num_prompt_tokens(results)
    completion = num_completion_tokens(results)
    cached = sum(result["num_cached_tokens"] for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
