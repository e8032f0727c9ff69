"""The state of one request (or of one completion, where a request has several)."""

from __future__ import annotations

from array import array
from enum import Enum, auto
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nanovllm.sampling.options import SamplingOptions
from nanovllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from nanovllm.readout.reading import Reading
    from nanovllm.readout.readout import Readout
    from nanovllm.results import TokenLogprobs
    from nanovllm.sampling.token_rules import CompletionRules
    from nanovllm.text.detokenizer import Detokenizer


class SequenceStatus(Enum):
    """Where a sequence stands in the scheduler."""

    WAITING = auto()  # queued, preempted, or part-way through a chunked prefill
    RUNNING = auto()  # its prompt is computed; each decode step adds a token
    FINISHED = auto()


class Sequence:
    """A prompt, its completion so far, and where its K and V lie in the cache.

    A step is launched before the tokens of the step before it have been read back, so the counters
    run ahead of `token_ids`, which holds the known ones. `num_tokens` counts those that launched
    steps will yield too; `num_computed_tokens` have their K and V in the cache once these steps
    have run, `num_scheduled_tokens` of them by the last one. For prompts, chunks, decoding and
    preempted sequences alike, a step yields a token exactly when it computes the last one there is.
    """

    _ids = count()

    def __init__(self, token_ids: list[int], params: SamplingParams, seed: int = 0) -> None:
        self.seq_id = next(Sequence._ids)
        self.request_id = self.seq_id  # the first one's seq_id, where a request has several
        self.status = SequenceStatus.WAITING
        self.prompt: str | None = None  # the text that was passed; None if it was token ids

        # Tokens, and how far they are computed: see the class's docstring.
        self.token_ids = list(token_ids)
        self.packed_prompt = array("i")  # the prompt again, faster to hash; empty if not given
        self.num_prompt_tokens = len(token_ids)
        self.num_tokens = len(token_ids)
        self.num_computed_tokens = 0
        self.num_scheduled_tokens = 0
        self._offset = 0  # position of token_ids[0]; not 0 only in a worker's copy

        # Its place in the cache and in the model runner: set by scheduler and block manager.
        self.row = -1  # its row in the model runner's arrays, which it has while it holds blocks
        self.block_table: list[int] = []  # ids of its blocks, in the order of its tokens
        self.block_hashes: list[int] = []  # of its full blocks, as far as they were asked for
        self.keeps_blocks = False  # whether its end leaves them to sequences that continue it
        self.num_registered_blocks = 0  # the leading blocks that others can share
        self.num_cached_tokens = 0  # that it need not compute, as found at the last admission
        self.num_cached_prompt_tokens: int | None = None  # the same, at the first admission

        # What the request asks for; the ids and `sampling_options` are set by the scheduler.
        self.params = params
        self.max_tokens = params.max_tokens  # the engine makes it fit max_model_len
        self.end_ids: dict[int, int | None] = {}  # id that ends it -> its stop_reason
        # All ids that end it, or would without ignore_eos: not drawn before there are `min_tokens`.
        self.early_ids: tuple[int, ...] = ()
        self.temperature = 0.0 if params.is_greedy else params.temperature
        self.seed = seed
        self.sampling_options: SamplingOptions | None = None  # in prefill steps, if it has any
        self.rules: CompletionRules | None = None  # which tokens may be drawn, if not all

        # What it wants of the model besides next tokens, such as an embedding: see readout/.
        self.readout: Readout | None = None
        self.reading: Reading | None = None  # the part of it that the last scheduled prefill reads

        # What it returns.
        self.detokenizer: Detokenizer | None = None  # if its text is needed while it runs
        self.logprobs: list[TokenLogprobs] | None = None  # one for each token, if asked for
        if params.logprobs is not None:
            self.logprobs = []
        self.finish_reason: str | None = None  # "stop", "length", "abort" or "error"
        # The stop string or stop token id that ended it; or what went wrong.
        self.stop_reason: str | int | None = None

        # Seconds on the clock of perf_counter; a Trace fills in the others.
        self.queued_at = perf_counter()
        self.first_token_at: float | None = None
        self.finished_at: float | None = None

    @property
    def is_finished(self) -> bool:
        """Whether it has all the tokens it will get."""
        return self.status is SequenceStatus.FINISHED

    @property
    def is_exhausted(self) -> bool:
        """Whether the launched steps yield all the tokens it may have."""
        return self.num_tokens - self.num_prompt_tokens == self.max_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The known tokens after the prompt."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def scheduled_token_ids(self) -> list[int]:
        """The tokens that the last scheduled step computes, as far as they are known."""
        start = self.num_computed_tokens - self.num_scheduled_tokens - self._offset
        return self.token_ids[start : start + self.num_scheduled_tokens]

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether it has to compute its prompt itself, all of it, because it reads on the way."""
        return self.readout is not None and self.readout.needs_whole_prompt

    def schedule(self, num_tokens: int) -> bool:
        """Count `num_tokens` more as computed; returns whether that yields a new token."""
        self.num_scheduled_tokens = num_tokens
        self.num_computed_tokens += num_tokens
        yields = self.num_computed_tokens == self.num_tokens
        if yields:
            self.num_tokens += 1
        return yields

    def make_sampling_options(self) -> SamplingOptions | None:
        """The options as they are before a prefill step; None where the sampler needs none."""
        if self.params.is_plain:
            return None
        # After a preemption the prefill computes tokens of the completion again.
        history = self.token_ids if self.params.has_penalties else []
        return SamplingOptions(
            params=self.params,
            min_length=self.num_prompt_tokens + self.params.min_tokens,
            early_ids=self.early_ids,
            penalized_prompt_ids=history[: self.num_prompt_tokens],
            penalized_completion_ids=history[self.num_prompt_tokens :],
        )

    def append(self, token_id: int, logprobs: TokenLogprobs | None = None) -> bool:
        """Add a sampled token, with logprobs if asked for; returns whether it is the last."""
        self.token_ids.append(token_id)
        if logprobs is not None:
            assert self.logprobs is not None and self.params.logprobs is not None
            # The sampled token, then the likeliest ones. Another request may have asked for more.
            num_kept = 1 + self.params.logprobs
            self.logprobs.append(logprobs.first(num_kept))
        num_tokens = len(self.token_ids) - self.num_prompt_tokens
        is_end = token_id in self.end_ids and num_tokens > self.params.min_tokens
        is_full = num_tokens == self.max_tokens
        if not is_end and not is_full and self.detokenizer is None:
            return False  # nearly always
        stop = None  # the stop string that ends it
        if self.detokenizer is not None:
            is_hidden = is_end and not self.params.include_stop_str_in_output
            try:
                stop = self.detokenizer.append(
                    token_id=None if is_hidden else token_id,
                    is_last=is_end or is_full,
                    may_stop=num_tokens > self.params.min_tokens,
                )
            except Exception as error:  # a tokenizer in Python: its failure is not the neighbours'
                self.fail(f"the tokenizer cannot decode the completion: {error!r}")
                return True
        if stop is not None:
            self.finish("stop", stop)
        elif is_end:
            self.finish("stop", self.end_ids[token_id])
        elif is_full:
            self.finish("length")
        return self.is_finished

    def finish(self, reason: str, stop_reason: str | int | None = None) -> None:
        """End it; a token that is still under way will be dropped."""
        self.status = SequenceStatus.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.num_tokens = len(self.token_ids)

    def fail(self, reason: str) -> None:
        """End it with what went wrong; the other sequences go on."""
        if self.rules is not None and self.rules.problem:
            reason = self.rules.problem  # what left no token to draw
        self.finish("error", reason)

    # For a prefill step rank 0 pickles its sequences and sends them to the other ranks. They get
    # these attributes and the tokens that the step computes (of a long prompt a chunk), no others.
    _SENT = (
        "num_computed_tokens",
        "num_scheduled_tokens",
        "row",
        "block_table",
        "temperature",
        "seed",
        "sampling_options",
        "reading",
    )

    def __getstate__(self) -> tuple[object, ...]:
        return (*(getattr(self, name) for name in self._SENT), self.scheduled_token_ids)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *values, self.token_ids = state
        for name, value in zip(self._SENT, values, strict=True):
            setattr(self, name, value)
        self._offset = self.num_computed_tokens - self.num_scheduled_tokens
