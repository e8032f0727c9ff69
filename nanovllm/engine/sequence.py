"""The state of one request."""

from enum import Enum, auto
from itertools import count

from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    WAITING = auto()  # queued, preempted, or part-way through a chunked prefill
    RUNNING = auto()  # its prompt is computed; each decode step adds a token
    FINISHED = auto()


class Sequence:
    """A prompt, its completion so far, and where its K and V lie in the cache.

    Three counters say how far it is: `num_tokens` (prompt and completion), of which `num_computed_tokens`
    have their K and V in the cache, and `num_scheduled_tokens` that the current step computes. A step samples
    a token for the sequence exactly when it computes its last known token (`is_sampled`). That test holds for
    prompts, chunks, decoding and preempted sequences alike; nothing depends on "has completion tokens".
    """

    _ids = count()

    def __init__(self, token_ids: list[int], sampling_params: SamplingParams, seed: int = 0) -> None:
        self.seq_id = next(Sequence._ids)
        self.status = SequenceStatus.WAITING
        self.token_ids = list(token_ids)
        self.num_prompt_tokens = len(token_ids)
        self.num_tokens = len(token_ids)
        self.num_cached_tokens = 0  # found in the prefix cache at the last admission
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self.block_table: list[int] = []
        self.block_keys: list[int] = []  # prefix-cache keys of the full blocks; BlockManager fills it on demand
        self.finish_reason: str | None = None
        self.max_tokens = sampling_params.max_tokens
        self.ignore_eos = sampling_params.ignore_eos
        self.temperature = sampling_params.temperature
        self.seed = sampling_params.seed if sampling_params.seed is not None else seed
        self._token_offset = 0  # position of token_ids[0]; not 0 only in a worker's copy

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def is_sampled(self) -> bool:
        """Whether the scheduled step computes the last known token, and so yields the next one."""
        return self.num_computed_tokens + self.num_scheduled_tokens == self.num_tokens

    @property
    def num_completion_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def scheduled_token_ids(self) -> list[int]:
        """The tokens that the current step computes."""
        start = self.num_computed_tokens - self._token_offset
        return self.token_ids[start : start + self.num_scheduled_tokens]

    def append_token(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.num_tokens += 1

    def __getstate__(self) -> tuple:
        # Workers need only what this step computes: a slice of a prompt, or a decoding sequence's last token.
        return (
            self.seq_id,
            self.num_tokens,
            self.num_computed_tokens,
            self.num_scheduled_tokens,
            self.block_table,
            self.temperature,
            self.seed,
            self.scheduled_token_ids,
        )

    def __setstate__(self, state: tuple) -> None:
        (
            self.seq_id,
            self.num_tokens,
            self.num_computed_tokens,
            self.num_scheduled_tokens,
            self.block_table,
            self.temperature,
            self.seed,
            self.token_ids,
        ) = state
        self._token_offset = self.num_computed_tokens
