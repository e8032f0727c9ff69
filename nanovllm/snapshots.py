"""What a request keeps of its parameters, whose fields may be assigned after it was queued."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

from nanovllm.sampling_params import SamplingParams

NUMBERS_OF_LOGPROBS = ("logprobs", "prompt_logprobs")  # of which -1 means all tokens


def snapshots(
    all_params: SequenceOf[SamplingParams], vocab_size: int, max_logprobs: int
) -> list[SamplingParams]:
    """Copy the parameters of each prompt of a call; one copy where prompts share an object.

    Raises:
        TypeError: for what is no SamplingParams.
        ValueError: for more log-probabilities a token than the engine's `max_logprobs`.
    """
    copies: dict[int, SamplingParams] = {}  # id of what was passed -> its copy
    for index, params in enumerate(all_params):
        if id(params) not in copies:
            copies[id(params)] = snapshot(index, params, vocab_size)
            check_numbers_of_logprobs(index, copies[id(params)], max_logprobs)
    return [copies[id(params)] for params in all_params]


def snapshot(index: int, params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Copy the parameters of prompt number `index`, with the vocabulary's size for "all tokens"."""
    if not isinstance(params, SamplingParams):
        raise TypeError(
            f"sampling_params of prompt {index} must be a SamplingParams, not {params!r}"
        )
    all_tokens: dict[str, Any] = {
        name: vocab_size for name in NUMBERS_OF_LOGPROBS if getattr(params, name) == -1
    }
    return replace(params, **all_tokens) if all_tokens else params.clone()


def check_numbers_of_logprobs(index: int, params: SamplingParams, limit: int) -> None:
    """Raise a ValueError if more log-probabilities a token are asked for than may be; -1: all."""
    for name in NUMBERS_OF_LOGPROBS:
        number = getattr(params, name)
        if number is not None and limit != -1 and number > limit:
            raise ValueError(
                f"{name} of prompt {index} must be at most max_logprobs {limit}, not {number}; "
                f"raise it by LLM(..., max_logprobs={number}), where -1 is no limit"
            )
