"""What a request returns: plain dicts. Here are their keys, and the functions that build them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from nanovllm.text.decoder import decoder_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities that one step reports for one sequence, the sampled token first."""

    token_ids: list[int]  # the sampled token, then the likeliest ones
    values: list[float]  # the log-probability of each


class Completion(TypedDict):
    """One completion of a prompt."""

    text: str  # "" without a tokenizer
    token_ids: list[int]  # of the completion only; the token that ended it is the last
    # "stop", "length" (max_tokens or max_model_len), "abort", "error"; None: a stream goes on.
    finish_reason: str | None
    # The stop string or stop token id that ended it, if one did; after an "error" what went wrong.
    stop_reason: str | int | None
    # If asked for: for each token a dict of token id -> log-probability, the sampled token first.
    logprobs: list[dict[int, float]] | None


class Result(Completion, total=False):
    """What a request returns: its first completion, and what belongs to all of them."""

    prompt_token_ids: list[int]
    num_cached_tokens: int  # tokens of the prompt that were found in the prefix cache
    # If asked for: None for the prompt's first token, for each other one a dict as in `logprobs`.
    prompt_logprobs: list[dict[int, float] | None]
    completions: list[Completion]  # all n, the first one too; this key is there for n > 1 only


class StreamPart(Completion):
    """What `LLM.stream` yields: what is new of one completion, in the fields of Completion."""

    index: int  # of the prompt in the list that was passed
    completion: int  # which of the prompt's n completions, from 0


def build_result(seqs: list[Sequence], tokenizer: PreTrainedTokenizerBase | None) -> Result:
    """Build the result of a request from the sequences of its n completions."""
    completions = [build_completion(seq, completion_text(seq, tokenizer)) for seq in seqs]
    first = seqs[0]
    result: Result = {
        **completions[0],  # type: ignore[typeddict-item]  # it has no key "completions"
        "prompt_token_ids": first.token_ids[: first.num_prompt_tokens],
        "num_cached_tokens": first.num_cached_prompt_tokens or 0,  # None: it was never admitted
    }
    if first.readout is not None:
        result.update(first.readout.result_items())  # type: ignore[typeddict-item]
    if len(seqs) > 1:
        result["completions"] = completions
    return result


def has_failed(result: Result) -> bool:
    """Whether all completions of a request ended with an error."""
    completions = result.get("completions", [result])
    return all(completion["finish_reason"] == "error" for completion in completions)


def build_completion(seq: Sequence, text: str, start: int = 0) -> Completion:
    """Build a completion, or what there is of it from token number `start` on; `text` is given."""
    return {
        "text": text,
        "token_ids": seq.token_ids[seq.num_prompt_tokens + start :],
        "finish_reason": seq.finish_reason,
        "stop_reason": seq.stop_reason,
        "logprobs": None if seq.logprobs is None else seq.logprobs[start:],
    }


def completion_text(seq: Sequence, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Return the text of a completion that has ended; "" without a tokenizer.

    If the tokenizer fails, the completion ends with an "error", and the others go on.
    """
    if tokenizer is None:
        return ""
    if seq.detokenizer is not None:  # it has followed the completion, and cut it at a stop string
        return seq.detokenizer.text
    token_ids = seq.completion_token_ids
    if seq.finish_reason == "stop" and not seq.params.include_stop_str_in_output:
        token_ids = token_ids[:-1]  # the token that ended it is not part of the text
    try:
        decoder = decoder_of(tokenizer)
        context = decoder.context_of(seq.token_ids[: seq.num_prompt_tokens])
        return decoder.completion_text(token_ids, seq.params.skip_special_tokens, context)
    except Exception as error:  # whatever a tokenizer written in Python may raise
        seq.fail(f"the tokenizer cannot decode the completion: {error!r}")
        return ""
