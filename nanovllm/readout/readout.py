"""What one sequence wants of its prompt's last hidden states, and what it has got so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.readout.reading import (
    HiddenSumReading,
    LastHiddenReading,
    LogitReading,
    LogprobReading,
    Reading,
)
from nanovllm.results import LogprobDict

if TYPE_CHECKING:
    from collections.abc import Callable

    from nanovllm.engine.sequence import Sequence
    from nanovllm.sampling.extras import Logprobs


class Readout(ABC):
    """Belongs to one sequence, on rank 0.

    A long prompt is computed in chunks, by several steps, and a step is scheduled before the one
    ahead of it has ended. So `plan` is called when a step is scheduled, and `collect` when its
    results are known, in the same order.
    """

    # While this is so, none of the prompt may come from the prefix cache: what a step does not
    # compute, it cannot read.
    needs_whole_prompt = False

    @abstractmethod
    def plan(self, seq: Sequence) -> Reading | None:
        """Say what the step that was just scheduled is to read; None: nothing."""

    @abstractmethod
    def collect(self, values: Any) -> None:
        """Take what a step has read: of a `LogprobReading` the `Logprobs` of its tokens, on the
        host; of the other readings a vector, a float32 array.
        """

    def result_items(self, decode: Callable[[int], str] | None) -> dict[str, Any]:
        """What the request's result shows of it; `decode` makes text of a token id."""
        return {}


class PromptLogprobs(Readout):
    """The log-probability of each token of the prompt but the first, which follows nothing.

    They are kept when the sequence is preempted, and not computed again.
    """

    def __init__(self, num_top: int) -> None:
        """num_top: how many of the likeliest tokens are wanted, beside the prompt's own."""
        self.needs_whole_prompt = True
        self.num_top = num_top
        self.num_planned = 0  # of the tokens that follow another
        self.parts: list[Logprobs] = []  # of one chunk each

    def plan(self, seq: Sequence) -> LogprobReading | None:
        """Read the log-probabilities of the tokens that follow those which the step computes."""
        start = seq.num_computed_tokens - seq.num_scheduled_tokens
        end = min(
            seq.num_computed_tokens, seq.num_prompt_tokens - 1
        )  # the last is followed by none
        self.needs_whole_prompt = end < seq.num_prompt_tokens - 1
        if start >= end or start < self.num_planned:  # after a preemption they are known
            return None
        assert start == self.num_planned, "a step has computed tokens that another one has to read"
        self.num_planned = end
        return LogprobReading(seq.token_ids[start + 1 : end + 1], self.num_top)

    def collect(self, values: Logprobs) -> None:
        """Take those of a chunk."""
        self.parts.append(values)

    def result_items(self, decode: Callable[[int], str] | None) -> dict[str, Any]:
        """For each token of the prompt None or a dict of log-probabilities, its own first.

        They are fewer than the prompt's tokens if the request has ended before all were computed.
        """
        entries: list[LogprobDict | None] = [None]
        num_kept = 1 + self.num_top  # a neighbour may have asked for more
        for part in self.parts:
            # Column by column: of a matrix there would be a list for each row.
            id_columns = [column.tolist() for column in part.token_ids[:, :num_kept].unbind(1)]
            value_columns = [column.tolist() for column in part.values[:, :num_kept].unbind(1)]
            rows = zip(
                zip(*id_columns, strict=True),
                zip(*value_columns, strict=True),
                part.ranks.tolist(),
                strict=True,
            )
            entries += [LogprobDict(ids, values, rank, decode) for ids, values, rank in rows]
        return {"prompt_logprobs": entries}


class LastHidden(Readout):
    """The last token's hidden state: the only one of a causal model that has seen all tokens."""

    def __init__(self) -> None:
        self.vector: np.ndarray = np.empty(0, np.float32)  # [hidden] when it is known

    def plan(self, seq: Sequence) -> Reading:
        """Read that of each chunk; the last one counts."""
        return LastHiddenReading()

    def collect(self, values: np.ndarray) -> None:
        """Take that of a chunk."""
        self.vector = values


class MeanHidden(Readout):
    """The mean of all tokens' hidden states."""

    def __init__(self, num_tokens: int) -> None:
        """num_tokens: of the prompt."""
        self.needs_whole_prompt = True
        self.num_tokens = num_tokens
        self.vector: np.ndarray = np.zeros(1, np.float32)  # [hidden] when all chunks are known

    def plan(self, seq: Sequence) -> Reading:
        """Read the sum over each chunk."""
        return HiddenSumReading()

    def collect(self, values: np.ndarray) -> None:
        """Add a chunk's share of the mean."""
        self.vector = self.vector + values / self.num_tokens


class NextLogits(LastHidden):
    """The logits of a few tokens that may follow the prompt."""

    def __init__(self, token_ids: tuple[int, ...]) -> None:
        super().__init__()
        self.token_ids = token_ids

    def plan(self, seq: Sequence) -> Reading:
        """Read those behind each chunk; the last ones count."""
        return LogitReading(self.token_ids)
