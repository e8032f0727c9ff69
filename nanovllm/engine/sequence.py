"""The state of one request."""

from __future__ import annotations

from enum import Enum, auto
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.engine.detokenizer import Detokenizer


class SequenceStatus(Enum):
    WAITING = auto()  # queued, preempted, or part-way through a chunked prefill
    RUNNING = auto()  # its prompt is computed; each decode step adds a token
    FINISHED = auto()


class SamplerOptions(NamedTuple):
    """What the sampler has to know of a sequence, beyond temperature and seed, when it is admitted."""

    params: SamplingParams
    min_length: int = 0  # tokens that it must have before one that ends it may come
    end_ids: tuple[int, ...] = ()  # those
    prompt_ids: list[int] = []  # for penalties only
    completion_ids: list[int] = []


class Sequence:
    """A prompt, its completion so far, and where its K and V lie in the cache.

    A step is launched before the tokens of the step before it have been read back, so the counters run ahead of
    the token ids. `num_tokens` counts prompt, completion and tokens that launched steps will yield; `token_ids`
    holds those that are known. `num_computed_tokens` have their K and V in the cache once the launched steps have
    run; `num_scheduled_tokens` of them are the last step's. A step yields a token for the sequence exactly when it
    computes the last one there is: that holds for prompts, chunks, decoding and preempted sequences alike.
    """

    _ids = count()

    def __init__(self, token_ids: list[int], sampling_params: SamplingParams, seed: int = 0) -> None:
        self.seq_id = next(Sequence._ids)
        self.status = SequenceStatus.WAITING
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = self.num_tokens = len(token_ids)
        self.num_cached_tokens = 0  # found in the prefix cache at the last admission
        self.num_cached_prompt_tokens: int | None = None  # at the first one
        self.num_computed_tokens = self.num_scheduled_tokens = 0
        self.row = -1  # in the model runner's arrays of admitted sequences
        self.block_table: list[int] = []
        self.num_registered_blocks = 0  # the leading blocks that others can share
        self.block_keys: list[int] = []  # prefix-cache keys of the full blocks; BlockManager fills it on demand
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None  # the stop string, or the id of stop_token_ids, that ended it
        self.request_id = self.seq_id  # the first one's id, where a request has several
        self.params, self.max_tokens = sampling_params, sampling_params.max_tokens
        self.eos: frozenset[int] = frozenset()  # ids that end it; the scheduler fills it
        self.detokenizer: Detokenizer | None = None  # for those whose text is needed while they run
        self.logprobs: list[dict[int, float]] | None = None if sampling_params.logprobs is None else []
        self.options: SamplerOptions | None = None  # in a prefill step of one that is not plain
        self.temperature = 0.0 if sampling_params.is_greedy else sampling_params.temperature
        self.seed = seed
        self._token_offset = 0  # position of token_ids[0]; not 0 only in a worker's copy

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def is_exhausted(self) -> bool:
        """Whether the launched steps yield all the tokens it may have."""
        return self.num_tokens - self.num_prompt_tokens == self.max_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def scheduled_token_ids(self) -> list[int]:
        """The tokens that the last scheduled step computes, as far as they are known."""
        start = self.num_computed_tokens - self.num_scheduled_tokens - self._token_offset
        return self.token_ids[start : start + self.num_scheduled_tokens]

    def schedule(self, num_tokens: int, is_prefill: bool = False) -> bool:
        """Count `num_tokens` more as computed; returns whether that yields a new token."""
        self.options = self._sampler_options() if is_prefill and not self.params.is_plain else None
        self.num_scheduled_tokens = num_tokens
        self.num_computed_tokens += num_tokens
        yields = self.num_computed_tokens == self.num_tokens
        self.num_tokens += yields
        return yields

    def _sampler_options(self) -> SamplerOptions:
        min_length, end_ids = self.num_prompt_tokens + self.params.min_tokens, (*self.eos, *self.params.stop_token_ids)
        history = self.token_ids if self.params.has_penalties else []
        prompt_ids, completion_ids = history[: self.num_prompt_tokens], history[self.num_prompt_tokens :]
        return SamplerOptions(self.params, min_length, end_ids, prompt_ids, completion_ids)

    def append(self, token_id: int, logprobs: tuple[list[int], list[float]] | None = None) -> bool:
        """Add a sampled token, with ids and log-probabilities of it and the likeliest; returns whether it is the last.

        If it is, the sequence is finished.
        """
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(dict(zip(*(part[: self.params.logprobs + 1] for part in logprobs), strict=True)))
        num_tokens = len(self.token_ids) - self.num_prompt_tokens
        may_stop, is_full = num_tokens > self.params.min_tokens, num_tokens == self.max_tokens
        is_end = may_stop and (token_id in self.eos or token_id in self.params.stop_token_ids)
        stop: str | int | None = token_id if is_end and token_id not in self.eos else None
        if self.detokenizer is not None:
            shown = token_id if not is_end or self.params.include_stop_str_in_output else None
            stop = self.detokenizer.append(shown, is_end or is_full, may_stop) or stop
        if is_end or stop is not None:
            self.finish("stop", stop)
        elif is_full:
            self.finish("length")
        return self.is_finished

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        self.status = SequenceStatus.FINISHED
        self.finish_reason, self.stop_reason = reason, stop_reason
        self.num_tokens = len(self.token_ids)  # a token that is still under way will be dropped

    def __getstate__(self) -> tuple:
        # Workers get what the step computes and no more: a slice of a prompt, or a decoding sequence's last token.
        return (
            self.num_computed_tokens, self.num_scheduled_tokens, self.row, self.block_table,
            self.temperature, self.seed, self.options, self.scheduled_token_ids,
        )  # fmt: skip

    def __setstate__(self, state: tuple) -> None:
        self.num_computed_tokens, self.num_scheduled_tokens, self.row, self.block_table, *rest = state
        self.temperature, self.seed, self.options, self.token_ids = rest
        self._token_offset = self.num_computed_tokens - self.num_scheduled_tokens
