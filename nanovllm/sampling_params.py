"""What a request asks for, validated in one place."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Annotated

from nanovllm.utils.checks import ABOVE_0, check_fields, check_value


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Options of one request; ValueError or TypeError when one is out of range or of the wrong type."""

    temperature: Annotated[float, 0, 10**6] = (
        1.0  # divisor of the logits; 0: greedy, the most likely token
    )
    max_tokens: Annotated[int | None, 1] = (
        64  # most tokens to generate; None: as many as max_model_len allows
    )
    ignore_eos: bool = False  # keep generating after the end-of-sequence token (for benchmarks)
    seed: Annotated[int | None, 0, 2**63 - 1] = (
        None  # same seed, same tokens; None: drawn from the engine's
    )
    n: Annotated[int, 1] = 1  # completions of the prompt, each with a seed of its own
    top_k: Annotated[int, -1, 2**24] = (
        0  # sample among so many of the likeliest tokens; 0 or -1: all
    )
    top_p: Annotated[float, ABOVE_0, 1] = (
        1.0  # sample among the likeliest that together have this probability
    )
    min_p: Annotated[float, 0, 1] = (
        0.0  # leave out what is less likely than this share of the likeliest
    )
    repetition_penalty: Annotated[float, ABOVE_0, 10**6] = (
        1.0  # above 1: less of what prompt and completion hold
    )
    presence_penalty: Annotated[float, -2, 2] = (
        0.0  # taken off the logits of tokens in the completion
    )
    frequency_penalty: Annotated[float, -2, 2] = 0.0  # the same, for each time that they occur
    logit_bias: dict[int, float] | None = (
        None  # token id -> what is added to its logit, -100 to 100
    )
    min_tokens: Annotated[int, 0] = (
        0  # before it has so many tokens, nothing but max_tokens ends the completion
    )
    stop: str | SequenceOf[str] | None = None  # strings that end the text, which is cut before them
    stop_token_ids: SequenceOf[int] | None = None  # token ids that end the completion
    include_stop_str_in_output: bool = (
        False  # cut the text after the stop string (or token), not before it
    )
    logprobs: Annotated[int | None, 0, 20] = (
        None  # return those of the sampled and of so many likeliest tokens
    )
    skip_special_tokens: bool = True  # leave special tokens out of the text

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens {self.max_tokens}, not {self.min_tokens}"
            )
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 when temperature is 0 (all completions would be the same), not {self.n}"
            )
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        for name, values, kind in (
            ("stop", stop, str),
            ("stop_token_ids", self.stop_token_ids or [], int),
        ):
            if not isinstance(values, (list, tuple)) or not all(
                type(value) is kind for value in values
            ):
                raise TypeError(
                    f"{name} must be a list of {kind.__name__}, not {getattr(self, name)!r}"
                )
            object.__setattr__(self, name, tuple(values))
        if "" in self.stop:
            raise ValueError(f"stop must hold strings of at least one character, not {stop!r}")
        if not isinstance(self.logit_bias, (dict, type(None))):
            raise TypeError(
                f"logit_bias must be a dict of token ids and numbers, not {self.logit_bias!r}"
            )
        for token_id, bias in (self.logit_bias or {}).items():
            check_value("a token id in logit_bias", token_id, int, 0)
            check_value(f"logit_bias of token {token_id}", bias, float, -100, 100)

    @property
    def is_greedy(self) -> bool:
        return (
            self.temperature < 1e-5
        )  # dividing by less overflows, and the likeliest token is as good as certain

    @property
    def sampler_row(self) -> tuple[float, ...]:
        """top_k (0: off), top_p, min_p; repetition, presence and frequency penalty."""
        filters = (0, 1, 0) if self.is_greedy else (max(self.top_k, 0), self.top_p, self.min_p)
        return *filters, self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    @property
    def has_penalties(self) -> bool:
        return self.sampler_row[3:] != NEUTRAL_ROW[3:]

    @property
    def is_plain(self) -> bool:
        """Whether temperature and seed are all that the sampler has to know."""
        return (
            self.sampler_row == NEUTRAL_ROW
            and not (self.logit_bias or self.min_tokens)
            and self.logprobs is None
        )


NEUTRAL_ROW = (0, 1, 0, 1, 0, 0)  # a sampler_row that changes nothing
