"""What a request returns, built from its sequences; the keys are described in results.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nanovllm.results import CompletionOutput, RequestOutput, TokenLogprobs
from nanovllm.text.decoder import TextDecoder, decoder_of

__all__ = ["CompletionOutput", "RequestOutput", "TokenLogprobs"]  # where others look for them

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.sequence import Sequence


def build_result(seqs: list[Sequence], tokenizer: PreTrainedTokenizerBase | None) -> RequestOutput:
    """Build the result of a request from the sequences of its n completions."""
    decoder = None if tokenizer is None else decoder_of(tokenizer)
    completions = [
        CompletionOutput(completion_items(seq, completion_text(seq, decoder), decoder))
        for seq in seqs
    ]
    first = seqs[0]
    result = RequestOutput(
        completions[0],
        prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
        num_cached_tokens=first.num_cached_prompt_tokens or 0,  # None: it was never admitted
    )
    if first.readout is not None:
        result.update(first.readout.result_items(None if decoder is None else decoder.token_text))
    result.prompt = first.prompt
    result.request_id = str(first.request_id)
    if len(seqs) > 1:
        result["completions"] = completions
        for index, completion in enumerate(completions):
            completion.index = index
    return result


def has_failed(result: RequestOutput) -> bool:
    """Whether all completions of a request ended with an error."""
    return all(completion["finish_reason"] == "error" for completion in result.outputs)


def completion_items(
    seq: Sequence, text: str, decoder: TextDecoder | None, start: int = 0
) -> dict[str, Any]:
    """The items of a completion, or of what there is of it from token number `start` on."""
    logprobs = None
    if seq.logprobs is not None:
        decode = None if decoder is None else decoder.token_text
        logprobs = [entry.as_dict(decode) for entry in seq.logprobs[start:]]
    return {
        "text": text,
        "token_ids": seq.token_ids[seq.num_prompt_tokens + start :],
        "finish_reason": seq.finish_reason,
        "stop_reason": seq.stop_reason,
        "logprobs": logprobs,
    }


def completion_text(seq: Sequence, decoder: TextDecoder | None) -> str:
    """Return the text of a completion that has ended; "" where none is wanted or none can be made.

    If the tokenizer fails, the completion ends with an "error", and the others go on.
    """
    if decoder is None or not seq.params.detokenize:
        return ""
    if seq.detokenizer is not None:  # it has followed the completion, and cut it at a stop string
        return seq.detokenizer.text
    token_ids = seq.completion_token_ids
    if seq.finish_reason == "stop" and not seq.params.include_stop_str_in_output:
        token_ids = token_ids[:-1]  # the token that ended it is not part of the text
    try:
        context = decoder.context_of(seq.token_ids[: seq.num_prompt_tokens])
        return decoder.completion_text(token_ids, seq.params.skip_special_tokens, context)
    except Exception as error:  # whatever a tokenizer written in Python may raise
        seq.fail(f"the tokenizer cannot decode the completion: {error!r}")
        return ""
