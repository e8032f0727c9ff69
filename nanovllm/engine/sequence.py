"""The state of one request."""

from enum import Enum, auto
from itertools import count
from time import perf_counter

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()  # queued, preempted, or part-way through a chunked prefill
    RUNNING = auto()  # its prompt is computed; each decode step adds a token
    FINISHED = auto()


class Sequence:
    """A prompt, its completion so far, and where its K and V lie in the cache.

    A step is launched before the tokens of the step before it have been read back, so the counters run ahead of
    `token_ids`, which holds the known ones. `num_tokens` counts those that launched steps will yield too;
    `num_computed_tokens` have their K and V in the cache once these steps have run, `num_scheduled_tokens` of them by
    the last one. A step yields a token for the sequence exactly when it computes the last one there is: that holds
    for prompts, chunks, decoding and preempted sequences alike.
    """

    _ids = count()

    def __init__(
        self, token_ids: list[int], sampling_params: SamplingParams, seed: int = 0
    ) -> None:
        self.seq_id = next(Sequence._ids)
        self.status = SequenceStatus.WAITING
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = self.num_tokens = len(token_ids)
        self.num_computed_tokens = self.num_scheduled_tokens = 0
        self.num_cached_tokens = 0  # found in the prefix cache at the last admission
        self.num_cached_prompt_tokens: int | None = None  # at the first one
        self.row = -1  # in the model runner's arrays of admitted sequences
        self.block_table: list[int] = []
        self.block_keys: list[
            int
        ] = []  # prefix-cache keys of the full blocks; BlockManager fills it on demand
        self.num_registered_blocks = 0  # the leading blocks that others can share
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = (
            None  # the stop string, or the id of stop_token_ids, that ended it
        )
        self.request_id = self.seq_id  # the first one's id, where a request has several
        self.params, self.max_tokens = sampling_params, sampling_params.max_tokens
        self.end_ids: dict[
            int, int | None
        ] = {}  # ids that end it -> the stop_reason then; the scheduler fills it
        self.detokenizer: Detokenizer | None = None  # for those whose text is needed while they run
        self.logprobs: list[dict[int, float]] | None = (
            None if sampling_params.logprobs is None else []
        )
        self.options: tuple | None = (
            None  # see `_sampler_options`; in prefill steps, where the request is not plain
        )
        self.temperature, self.seed = (
            0.0 if sampling_params.is_greedy else sampling_params.temperature,
            seed,
        )
        self.queued_at, self.first_token_at, self.finished_at = (
            perf_counter(),
            None,
            None,
        )  # s; a Trace fills them in
        self._offset = 0  # position of token_ids[0]; not 0 only in a worker's copy

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
        start = self.num_computed_tokens - self.num_scheduled_tokens - self._offset
        return self.token_ids[start : start + self.num_scheduled_tokens]

    def schedule(self, num_tokens: int, is_prefill: bool = False) -> bool:
        """Count `num_tokens` more as computed; returns whether that yields a new token."""
        self.options = self._sampler_options() if is_prefill and not self.params.is_plain else None
        self.num_scheduled_tokens = num_tokens
        self.num_computed_tokens += num_tokens
        yields = self.num_computed_tokens == self.num_tokens
        self.num_tokens += yields
        return yields

    def _sampler_options(self) -> tuple[SamplingParams, int, tuple[int, ...], list[int], list[int]]:
        """Parameters; below which length which ids are forbidden; for penalties, prompt and completion."""
        num_prompt, history = (
            self.num_prompt_tokens,
            self.token_ids if self.params.has_penalties else [],
        )
        forbidden = num_prompt + self.params.min_tokens, tuple(self.end_ids)
        return self.params, *forbidden, history[:num_prompt], history[num_prompt:]

    def append(self, token_id: int, logprobs: tuple[list[int], list[float]] | None = None) -> bool:
        """Add a sampled token (and log-probabilities of it and the likeliest); returns whether that ends it."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(
                dict(zip(*(part[: self.params.logprobs + 1] for part in logprobs), strict=True))
            )
        num_tokens = len(self.token_ids) - self.num_prompt_tokens
        is_end, is_full = token_id in self.end_ids, num_tokens == self.max_tokens
        if not is_end and not is_full and self.detokenizer is None:
            return False  # nearly always
        may_stop = num_tokens > self.params.min_tokens
        is_end = is_end and may_stop
        stop = self.end_ids[token_id] if is_end else None
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

    # Other ranks get the tokens that a prefill step computes, and no more of them: a slice of a prompt, say.
    _SENT = (
        "num_computed_tokens",
        "num_scheduled_tokens",
        "row",
        "block_table",
        "temperature",
        "seed",
        "options",
    )

    def __getstate__(self) -> tuple:
        return *(getattr(self, name) for name in self._SENT), self.scheduled_token_ids

    def __setstate__(self, state: tuple) -> None:
        self.__dict__.update(zip((*self._SENT, "token_ids"), state, strict=True))
        self._offset = self.num_computed_tokens - self.num_scheduled_tokens
