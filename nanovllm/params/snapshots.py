"""What a request keeps of its parameters, whose fields may be assigned after it was queued."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

from nanovllm.sampling_params import SamplingParams

NUMBERS_OF_LOGPROBS = ("logprobs", "prompt_logprobs")  # of which -1 means all tokens
TOKEN_IDS = ("stop_token_ids", "logit_bias", "allowed_token_ids")  # each holds some, or is None


def snapshots(
    all_params: SequenceOf[SamplingParams], vocab_size: int, max_logprobs: int
) -> list[SamplingParams]:
    """Copy the parameters of each prompt of a call; one copy where prompts share an object.

    Raises:
        TypeError: for what is no SamplingParams.
        ValueError: for more log-probabilities a token than the engine's `max_logprobs`, and for a
            token id that the vocabulary does not have.
    """
    copies: dict[int, SamplingParams] = {}  # id of what was passed -> its copy
    for index, params in enumerate(all_params):
        if id(params) not in copies:
            copies[id(params)] = snapshot(index, params, vocab_size)
            check_numbers_of_logprobs(index, copies[id(params)], max_logprobs)
            check_for_model(index, copies[id(params)], vocab_size)
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


def check_for_model(index: int, params: SamplingParams, vocab_size: int) -> None:
    """Raise a ValueError for token ids that the vocabulary lacks, or a prompt cut to nothing."""
    for name in TOKEN_IDS:
        for token_id in getattr(params, name) or ():
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} of prompt {index} has the token id {token_id}; the vocabulary is 0 to "
                    f"{vocab_size - 1}"
                )
    if params.truncate_prompt_tokens == 0:
        raise ValueError(
            f"truncate_prompt_tokens of prompt {index} must be at least 1, or -1 for as many as "
            "fit, not 0"
        )
