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
    LastHiddenReading,
    LogitReading,
    LogprobReading,
    Reading,
)
from nanovllm.sampling.extras import Logprobs
from nanovllm.sampling.stages import rank_tokens
from nanovllm.utils.context import StepInputs, running

if TYPE_CHECKING:
    from nanovllm.engine.graphs import StepOutput
    from nanovllm.engine.sequence import Sequence
    from nanovllm.models.causal_lm import CausalLM

ROWS = 256  # most rows of logits at once: in bfloat16, 78 MB with Qwen3's vocabulary


@dataclass(frozen=True, slots=True)
class StepReader:
    """What the n sequences of one prefill step want."""

    readings: list[Reading | None]  # of each sequence
    first_rows: list[int]  # [n + 1]: the row of each sequence's first token, and their number

    sampler: Sampler
    to_device: Callable[[np.ndarray], Tensor]  # copies an array there without waiting

    @classmethod
    def of(
        cls,
        seqs: list[Sequence],
        sampler: Sampler,
        to_device: Callable[[np.ndarray], Tensor],
    ) -> StepReader | None:
        """Collect what the sequences want; None, nearly always, if none wants anything."""
        readings = [seq.reading for seq in seqs]
        if all(reading is None for reading in readings):
            return None
        first_rows = np.cumsum([0, *(seq.num_scheduled_tokens for seq in seqs)])
        return cls(readings, first_rows.tolist(), sampler, to_device)

    @property
    def kinds(self) -> set[type]:
        """Classes of the readings. Those of scores share a step with no other; embeddings may, but
        of one engine they are all of one kind.
        """
        return {type(reading) for reading in self.readings}

    @property
    def reads_all_rows(self) -> bool:
        """Whether the hidden states of all tokens are read, not only of each sequence's last."""
        return bool(self.kinds & {LogprobReading, HiddenSumReading})

    @property
    def samples(self) -> bool:
        """Whether next tokens are wanted, too. Embeddings and scores are asked for without."""
        return bool(self.kinds & {LogprobReading, type(None)})

    @property
    def reads_output_only(self) -> bool:
        """Whether what any step leaves is enough, so that a CUDA graph may run it."""
        return not self.reads_all_rows and not self.samples

    def read_output(
        self, output: StepOutput, model: CausalLM, num_seqs: int
    ) -> tuple[Sampled, Readings]:
        """Read from what a CUDA graph has left; it has padding behind the sequences."""
        if LogitReading in self.kinds:
            vectors = self._read_logits(output.logits[:num_seqs])
        else:
            vectors = model.model.norm(output.hidden[:num_seqs]).float()
        return self._without_samples(vectors)

    def run(
        self, inputs: StepInputs, model: CausalLM, sample: Callable[[Tensor], Sampled | None]
    ) -> tuple[Sampled | None, Readings]:
        """Run a step, read from its hidden states, and sample if that is wanted.

        inputs: of a prefill. sample: draws the next tokens from this rank's logits.
        """

        def make_logits(hidden: Normed) -> Tensor:  # [m, vocab], on every rank
            return self.sampler.gather_vocabulary(model.compute_logits(hidden))

        inputs = replace(inputs, keeps_all_rows=self.reads_all_rows)
        with running(inputs):
            hidden: Normed = model(inputs.input_ids, inputs.positions)
            assert inputs.last_token_rows is not None
            last = hidden.select(inputs.last_token_rows) if inputs.keeps_all_rows else hidden
            ranked = None
            if LogprobReading in self.kinds:
                ranked = self._read_logprobs(hidden, make_logits)
            vectors = None
            if LogitReading in self.kinds:
                vectors = self._read_logits(make_logits(last))
            elif HiddenSumReading in self.kinds:
                vectors = self._sum_rows(hidden.values())
            elif LastHiddenReading in self.kinds:
                vectors = last.values().float()
            if self.samples:  # for all: a token that is drawn for an embedding ends it
                return sample(model.compute_logits(last)), Readings(self, vectors, ranked)
            assert vectors is not None
            return self._without_samples(vectors)

    def _without_samples(self, vectors: Tensor) -> tuple[Sampled, Readings]:
        """What a step leaves whose next tokens are nobody's, but a -1 says what it always does."""
        token_ids = vectors.isfinite().all(dim=1).long() - 1
        return Sampled(token_ids, logprobs=None), Readings(self, vectors, None)

    def _read_logprobs(self, hidden: Normed, make_logits: Callable[[Normed], Tensor]) -> Logprobs:
        """Compute the log-probabilities that are wanted, a few rows at a time: the logits of a long
        prompt would take gigabytes.
        """
        num_top = max(r.num_top for r in self.readings if isinstance(r, LogprobReading))
        parts = [
            rank_tokens(make_logits(hidden.select(rows)), token_ids, num_top)
            for rows, token_ids in self.to_device(self._find_wanted()).split(ROWS, dim=1)
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
    vectors: Tensor | None  # [n, size] float32; a row counts where its sequence wants one
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
