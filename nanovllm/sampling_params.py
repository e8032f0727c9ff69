"""What a request asks for, validated in one place."""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Annotated, NamedTuple

from nanovllm.params.assignable import Assignable, checked_assignment
from nanovllm.params.beam_params import BeamSearchParams as BeamSearchParams  # as in vLLM
from nanovllm.params.param_checks import (
    TOKEN_RULES,
    check_token_rules,
    checked_logit_bias,
    checked_stop,
    checked_stop_token_ids,
)
from nanovllm.params.structured import StructuredOutputsParams
from nanovllm.utils.checks import ABOVE_0, Range, check_fields
from nanovllm.vllm_compat.absent import ABSENT_PARAMS

GREEDY_BELOW = 1e-5  # temperatures below count as 0: dividing logits by them overflows


class SamplerNumbers(NamedTuple):
    """What the sampler needs besides temperature and seed; the defaults change nothing."""

    top_k: float = 0  # 0: off
    top_p: float = 1
    min_p: float = 0
    repetition_penalty: float = 1
    presence_penalty: float = 0
    frequency_penalty: float = 0


@checked_assignment(ABSENT_PARAMS)
@dataclass(frozen=True, slots=True)
class SamplingParams(Assignable):
    """Options of one request; a wrong one is a TypeError or ValueError that names the value.

    Fields can be assigned, which checks them the same way. A request keeps the values that it was
    queued with. Of lists and dicts copies are kept that cannot be changed.
    None for an option whose default is a number means that number, except for `max_tokens`.
    """

    # Divisor of the logits. 1: the model's own probabilities. Below 1 likely tokens become likelier
    # still; 0 is greedy, which takes the likeliest.
    temperature: Annotated[float, Range(0, 10**6)] = 1.0
    max_tokens: Annotated[int | None, Range(1)] = 64  # None: up to the engine's `max_model_len`
    ignore_eos: bool = False  # whether to go on after an end-of-sequence token, as benchmarks do
    # Of the random draws: with the same seed a request gets the same tokens, wherever it is in a
    # list of prompts; so several prompts with one seed get the same noise. None: one that follows
    # from the engine's seed and the order of the requests.
    seed: Annotated[int | None, Range(0, 2**63 - 1)] = None
    n: Annotated[int, Range(1)] = 1  # completions of the prompt, each with a seed of its own
    # Draw among so many likeliest tokens; 0 or -1: among all; 1: greedy.
    top_k: Annotated[int, Range(-1, 2**24)] = 0
    # Draw among the fewest likeliest tokens that together have this probability. 1: among all.
    top_p: Annotated[float, Range(ABOVE_0, 1)] = 1.0
    # Leave out tokens whose probability is less than this share of the likeliest one's. 0: none.
    min_p: Annotated[float, Range(0, 1)] = 0.0
    # Divides the positive logits, and multiplies the negative ones, of tokens that are in the
    # prompt or the completion: above 1 they become less likely. 1: off.
    repetition_penalty: Annotated[float, Range(ABOVE_0, 10**6)] = 1.0
    # Subtracted from the logits of tokens that are in the completion. 0: off.
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0  # the same for each time they occur
    logit_bias: dict[int, float] | None = None  # token id -> addend of its logit, -100 to 100
    allowed_token_ids: SequenceOf[int] | None = None  # only these may be drawn; None: all
    bad_words: SequenceOf[str] | None = None  # strings that are not to occur in the completion
    # How many tokens may stand between "<think>" and "</think>", which then follows; None: any.
    thinking_token_budget: Annotated[int | None, Range(0)] = None
    # What the text must be: JSON of a schema, say. None: anything.
    structured_outputs: StructuredOutputsParams | None = None
    # Until the completion has this many tokens, only `max_tokens` or `max_model_len` ends it, and
    # tokens that would end it, but for `ignore_eos`, are not drawn. 0: it may end at once.
    min_tokens: Annotated[int, Range(0)] = 0
    # Strings, or one, that end the text, which is cut before them; they may hold special tokens.
    # None: none. Kept as a FrozenList, which equals a list of the same strings.
    stop: str | SequenceOf[str] | None = None
    # Token ids that end the completion, besides the model's end-of-sequence ids. Kept the same way.
    stop_token_ids: SequenceOf[int] | None = None
    include_stop_str_in_output: bool = False  # whether the text keeps the stop string (or token)
    # Return log-probabilities: of each sampled token and of this many likeliest ones, -1: of all;
    # at most the engine's `max_logprobs`. None: none. True and False count as 1 and None.
    logprobs: Annotated[int | None, Range(-1)] = None
    # The same of each token of the prompt but the first: 0 asks for that token's own only.
    prompt_logprobs: Annotated[int | None, Range(-1)] = None
    skip_special_tokens: bool = True  # whether special tokens are left out of the text
    detokenize: bool = True  # whether there is a text; without, token ids are all that is returned
    # Take only so many tokens at the end of the prompt. -1: as many as fit into `max_model_len`
    # beside one new one. None: all.
    truncate_prompt_tokens: Annotated[int | None, Range(-1)] = None

    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(getattr(self, name), bool):
                self._set(name, 1 if getattr(self, name) else None)
        check_fields(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens {self.max_tokens}, not {self.min_tokens}"
            )
        if self.n > 1 and self.temperature < GREEDY_BELOW:
            raise ValueError(
                "n must be 1 when temperature is 0 (all completions would be the same), "
                f"not {self.n}"
            )
        self._set("stop", checked_stop(self.stop))
        if self.stop and not self.detokenize:
            raise ValueError(
                f"stop must be None where detokenize is False, as it is searched in the text, not "
                f"{self.stop!r}"
            )
        self._set("stop_token_ids", checked_stop_token_ids(self.stop_token_ids))
        if self.logit_bias is not None:
            self._set("logit_bias", checked_logit_bias(self.logit_bias))
        if self.has_token_rules:
            check_token_rules(self)

    def _set(self, name: str, value: object) -> None:
        """Set a field to what the checks have made of it."""
        object.__setattr__(self, name, value)

    @property
    def is_greedy(self) -> bool:
        """Whether each token is the likeliest (of exactly tied ones the lowest id), not drawn."""
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def sampler_numbers(self) -> SamplerNumbers:
        """The sampler's numbers, with those filters off that would change nothing."""
        numbers = SamplerNumbers(
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        if self.is_greedy:  # no filter ever leaves out the likeliest token
            return numbers._replace(top_k=0, top_p=1, min_p=0)
        return numbers

    @property
    def has_penalties(self) -> bool:
        """Whether the sampler has to know which tokens the sequence holds already."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def has_token_rules(self) -> bool:
        """Whether some tokens are forbidden, always or depending on those before."""
        return any(getattr(self, name) is not None for name in TOKEN_RULES)

    @property
    def is_plain(self) -> bool:
        """Whether temperature and seed are all that the sampler has to know."""
        has_numbers = self.sampler_numbers != SamplerNumbers()
        has_rules = self.has_token_rules or self.min_tokens > 0
        return not (has_numbers or self.logit_bias or has_rules or self.logprobs is not None)
