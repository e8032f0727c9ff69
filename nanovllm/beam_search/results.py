"""What a beam search returns, under the names of vLLM's results."""

from __future__ import annotations

from typing import Any

from nanovllm.results import Logprob, item


class BeamSearchSequence(dict[str, Any]):
    """One beam. Each attribute is an item of the dict, under the same name."""

    text: str = item("text")  # of prompt and completion; "" without a tokenizer
    tokens: list[int] = item("tokens")  # prompt and completion; a token that ended it is the last
    token_ids: list[int] = item("token_ids")  # of the completion only
    cum_logprob: float = item("cum_logprob")  # the log-probability of the whole completion
    # That over (number of completion tokens) ** length_penalty, by which beams are compared.
    score: float = item("score")
    # For each token a dict of token id -> log-probability: the token, and those that it was chosen
    # from.
    logprobs: list[dict[int, Logprob]] = item("logprobs")
    finish_reason: str = item("finish_reason")  # "stop", "length" or "error"
    stop_reason: str | None = item("stop_reason")  # what went wrong, after an "error"


class BeamSearchOutput(dict[str, Any]):
    """What a prompt returns."""

    sequences: list[BeamSearchSequence] = item("sequences")  # the best beams, the best one first
    prompt_token_ids: list[int] = item("prompt_token_ids")
    prompt: str | None = None  # the text that was passed; None if it was token ids; no item
