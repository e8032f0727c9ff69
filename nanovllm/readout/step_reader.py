"""On the device: read from the last hidden states of a prefill what its sequences want of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.layers.residual import Normed
from nanovllm.layers.sampler import Sampled, Sampler
from nanovllm.readout.reading import (
    HiddenSumReading,
    LogitReading,
    LogprobReading,
    Reading,
)
from nanovllm.sampling.extras import Logprobs
from nanovllm.sampling.stages import rank_tokens
from nanovllm.utils.context import StepInputs, running

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence
    from nanovllm.models.causal_lm import CausalLM

ROWS = 256  # most rows of logits at once: in float32, 156 MB of them with Qwen3's vocabulary


@dataclass(frozen=True, slots=True)
class StepReader:
    """What the n sequences of one prefill step want."""

    readings: list[Reading | None]  # of each sequence
    first_rows: list[int]  # [n + 1]: the row of each sequence's first token, and their number

    @classmethod
    def of(cls, seqs: list[Sequence]) -> StepReader | None:
        """Collect what the sequences want; None, nearly always, if none wants anything."""
        readings = [seq.reading for seq in seqs]
        if all(reading is None for reading in readings):
            return None
        first_rows = np.cumsum([0, *(seq.num_scheduled_tokens for seq in seqs)])
        return cls(readings, first_rows.tolist())

    @property
    def kinds(self) -> set[type]:
        """Classes of the readings; those of embeddings and scores share a step with no other."""
        return {type(reading) for reading in self.readings}

    @property
    def reads_all_rows(self) -> bool:
        """Whether the hidden states of all tokens are read, not only of each sequence's last."""
        return bool(self.kinds & {LogprobReading, HiddenSumReading})

    @property
    def samples(self) -> bool:
        """Whether next tokens are wanted, too. Embeddings and scores are asked for without."""
        return bool(self.kinds & {LogprobReading, type(None)})

    def run(
        self,
        inputs: StepInputs,
        model: CausalLM,
        sampler: Sampler,
        *,
        sample: Callable[[Tensor], Sampled | None],
        to_device: Callable[[np.ndarray], Tensor],
        max_rows: int,
    ) -> tuple[Sampled | None, Readings]:
        """Run a step, read from its hidden states, and sample if that is wanted.

        inputs: of a prefill. sample: draws the next tokens from this rank's logits.
        to_device: copies an array there without waiting.
        max_rows: of so many the warm-up has had logits, and there is memory for them.
        """

        def make_logits(hidden: Normed) -> Tensor:  # [m, vocab], on every rank
            return sampler.gather_vocabulary(model.compute_logits(hidden))

        inputs = replace(inputs, keeps_all_rows=self.reads_all_rows)
        with running(inputs):
            hidden: Normed = model(inputs.input_ids, inputs.positions)
            assert inputs.last_token_rows is not None
            last = hidden.select(inputs.last_token_rows) if inputs.keeps_all_rows else hidden
            vectors = None
            ranked = None
            if LogprobReading in self.kinds:
                wanted = to_device(self._find_wanted())
                ranked = self._read_logprobs(hidden, wanted, make_logits, max(max_rows, 16))
            elif LogitReading in self.kinds:
                vectors = self._read_logits(make_logits(last))
            elif HiddenSumReading in self.kinds:
                vectors = self._sum_rows(hidden.values())
            else:
                vectors = last.values().float()
            readings = Readings(self, vectors, ranked)
            if self.samples:
                return sample(model.compute_logits(last)), readings
        assert vectors is not None
        # The next tokens are nobody's, but a -1 says what it always does.
        is_number = vectors.isfinite().all(dim=1)
        return Sampled(is_number.long() - 1, logprobs=None), readings

    def _read_logprobs(
        self,
        hidden: Normed,
        wanted: Tensor,
        make_logits: Callable[[Normed], Tensor],
        max_rows: int,
    ) -> Logprobs:
        """Compute the log-probabilities of the tokens `wanted`, see `_find_wanted`, a few rows at a
        time: the logits of a long prompt would take gigabytes.
        """
        num_top = max(r.num_top for r in self.readings if isinstance(r, LogprobReading))
        parts = [
            rank_tokens(make_logits(hidden.select(rows)), token_ids, num_top)
            for rows, token_ids in wanted.split(min(max_rows, ROWS), dim=1)
        ]
        return Logprobs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))

    def _find_wanted(self) -> np.ndarray:
        """The rows to read log-probabilities from, and the token behind each: `[2, r]` int64."""
        rows: list[int] = []
        next_token_ids: list[int] = []
        for first_row, reading in zip(self.first_rows, self.readings, strict=False):
            if isinstance(reading, LogprobReading):
                rows += range(first_row, first_row + len(reading.next_token_ids))
                next_token_ids += reading.next_token_ids
        return np.array([rows, next_token_ids])

    def _read_logits(self, logits: Tensor) -> Tensor:
        """Take a few columns of the last tokens' logits `[n, vocab]`: `[n, m]` float32."""
        (token_ids,) = {r.token_ids for r in self.readings if isinstance(r, LogitReading)}
        # One by one: a list of indices would be copied to the device, and the host would wait.
        return torch.stack([logits[:, token_id] for token_id in token_ids], dim=1).float()

    def _sum_rows(self, hidden: Tensor) -> Tensor:
        """Sum the rows of each sequence: `[n, hidden]` float32."""
        sums = [hidden[a:b].sum(dim=0, dtype=torch.float32) for a, b in pairwise(self.first_rows)]
        return torch.stack(sums)


@dataclass(frozen=True, slots=True)
class Readings:
    """What a step has read for its n sequences."""

    reader: StepReader
    vectors: Tensor | None  # [n, size] float32
    ranked: Logprobs | None  # of all sequences' tokens, one after the other

    def move(self, copy: Callable[[Tensor], Tensor]) -> Readings:
        """Return this with copies of all tensors."""
        vectors = None if self.vectors is None else copy(self.vectors)
        ranked = None if self.ranked is None else Logprobs(*map(copy, self.ranked))
        return Readings(self.reader, vectors, ranked)

    def deliver(self, seqs: list[Sequence]) -> None:
        """Give each sequence of the step its own. The copies, on the host, must have ended."""
        start = 0  # in `ranked`
        for index, (seq, reading) in enumerate(zip(seqs, self.reader.readings, strict=True)):
            if reading is None:
                continue
            assert seq.readout is not None
            values: Any
            if isinstance(reading, LogprobReading):
                assert self.ranked is not None
                end = start + len(reading.next_token_ids)
                values = Logprobs(*(column[start:end] for column in self.ranked))
                start = end
            else:
                assert self.vectors is not None
                values = self.vectors[index].numpy()
            seq.readout.collect(values)
