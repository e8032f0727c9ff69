"""What one prefill step reads for one sequence; it travels to all ranks, and needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LogprobReading:
    """Log-probabilities of the prompt's tokens behind the first ones that the step computes."""

    next_token_ids: list[int]  # the token behind each of the first `len(next_token_ids)` tokens
    num_top: int  # how many of the likeliest tokens, beside that one


@dataclass(frozen=True, slots=True)
class LastHiddenReading:
    """The hidden state of the last token that the step computes."""


@dataclass(frozen=True, slots=True)
class HiddenSumReading:
    """The sum of the hidden states of all tokens that the step computes."""


@dataclass(frozen=True, slots=True)
class LogitReading:
    """The logits of a few tokens, behind the last token that the step computes."""

    token_ids: tuple[int, ...]


Reading = LogprobReading | LastHiddenReading | HiddenSumReading | LogitReading
