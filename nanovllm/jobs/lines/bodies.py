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

from nanovllm.jobs.lines.json_text import Raw, numbers
from nanovllm.jobs.lines.line import LineError
from nanovllm.jobs.lines.line_request import LineRequest
from nanovllm.jobs.lines.logprobs import columns, logprobs_content, prompt_logprobs
from nanovllm.pooling.results import EmbeddingRequestOutput
from nanovllm.results import CompletionOutput, RequestOutput

ID_PREFIX = {"chat": "chatcmpl", "generate": "cmpl"}
OBJECT = {"chat": "chat.completion", "generate": "text_completion"}


def completion_body(request: LineRequest, results: Sequence[RequestOutput]) -> dict[str, Any]:
    """The body of an answer to a prompt, several prompts, or a chat."""
    body: dict[str, Any] = {
        "id": f"{ID_PREFIX[request.kind]}-{request.number}",
        "object": OBJECT[request.kind],
        "created": int(time.time()),
        "model": request.model,
        "choices": [],
        "usage": usage(results),
    }
    for index, result in enumerate(results):
        of_prompt = prompt_items(request, result)
        if request.kind == "chat":
            body |= of_prompt
            of_prompt = {}
        for completion in result.outputs:
            choice = {"index": len(body["choices"]), **choice_items(request, completion, index)}
            body["choices"].append({**choice, **of_prompt})
    return body


def choice_items(request: LineRequest, completion: CompletionOutput, index: int) -> dict[str, Any]:
    """What a choice says of a completion of prompt number `index`."""
    if request.kind == "chat":
        content = logprobs_content(request, completion)
        choice = {
            "message": {"role": "assistant", "content": completion["text"], "refusal": None},
            "logprobs": None if content is None else {"content": content, "refusal": None},
        }
    else:
        logprobs = completion["logprobs"]
        choice = {
            "text": echoed(request, index) + completion["text"],
            "logprobs": None if logprobs is None else columns(logprobs),
        }
    return choice | ends(request, completion)


def ends(request: LineRequest, completion: CompletionOutput) -> dict[str, Any]:
    """How a completion ended, and its token ids if they are asked for."""
    items = {"finish_reason": completion["finish_reason"]}
    if completion["stop_reason"] is not None:
        items["stop_reason"] = completion["stop_reason"]
    if request.shows_ids:
        items["token_ids"] = completion["token_ids"]
    return items


def echoed(request: LineRequest, index: int) -> str:
    """What the text begins with: prompt number `index`, or nothing."""
    if not request.echo:
        return ""
    prompt = request.prompts[index]
    assert isinstance(prompt, str)  # `check_echo` has seen to it
    return prompt


def prompt_items(request: LineRequest, result: RequestOutput) -> dict[str, Any]:
    """What is shown of a prompt, if it is asked for."""
    items: dict[str, Any] = {}
    if result.prompt_logprobs is not None:
        items["prompt_logprobs"] = prompt_logprobs(result.prompt_logprobs)
    if request.shows_ids:
        items["prompt_token_ids"] = result["prompt_token_ids"]
    return items


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


def vector(request: LineRequest, result: EmbeddingRequestOutput) -> str | Raw:
    """An embedding as numbers, or as the base64 of little-endian float32."""
    if not math.isfinite(sum(result.embedding)):
        raise LineError("the model yields NaN or infinity", "model_error", status=500)
    if not request.base64:
        return numbers(result.embedding)
    return base64.b64encode(np.asarray(result.embedding, "<f4").tobytes()).decode()


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
