"""The state of one request."""

from enum import Enum, auto
from itertools import count
from time import perf_counter

from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()  # queued, preempted, or part-way through a chunked prefill
    RUNNING = auto()  # its prompt is computed; each decode step adds a token
    FINISHED = auto()


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
        self.num_computed_tokens = self.num_scheduled_tokens = 0
        self.row = -1  # in the model runner's arrays of admitted sequences
        self.block_table: list[int] = []
        self.num_registered_blocks = 0  # the leading blocks that others can share
        self.block_keys: list[int] = []  # prefix-cache keys of the full blocks; BlockManager fills it on demand
        self.finish_reason: str | None = None
        self.queued_at, self.first_token_at, self.finished_at = perf_counter(), None, None  # s; a Trace fills them in
        self.max_tokens = sampling_params.max_tokens
        self.ignore_eos = sampling_params.ignore_eos
        # Below this, dividing by it overflows, and the most likely token is as good as certain.
        self.temperature = sampling_params.temperature if sampling_params.temperature >= 1e-5 else 0.0
        self.seed = sampling_params.seed if sampling_params.seed is not None else seed
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

    def schedule(self, num_tokens: int) -> bool:
        """Count `num_tokens` more as computed; returns whether that yields a new token."""
        self.num_scheduled_tokens = num_tokens
        self.num_computed_tokens += num_tokens
        yields = self.num_computed_tokens == self.num_tokens
        self.num_tokens += yields
        return yields

    def finish(self, reason: str) -> None:
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.num_tokens = len(self.token_ids)  # a token that is still under way will be dropped

    def __getstate__(self) -> tuple:
        # Workers get what the step computes and no more: a slice of a prompt, or a decoding sequence's last token.
        return (
            self.num_computed_tokens, self.num_scheduled_tokens, self.row, self.block_table,
            self.temperature, self.seed, self.scheduled_token_ids,
        )  # fmt: skip

    def __setstate__(self, state: tuple) -> None:
        self.num_computed_tokens, self.num_scheduled_tokens, self.row, self.block_table, *rest = state
        self.temperature, self.seed, self.token_ids = rest
        self._token_offset = self.num_computed_tokens - self.num_scheduled_tokens
