"""What the engine returns for a request."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position of a completion."""

    token_ids: list[int]  # the sampled token first, then the likeliest ones, likeliest first
    values: list[float]  # the log-probability of each of `token_ids`
