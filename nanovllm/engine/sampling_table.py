"""From the options of sequences to the inputs of the sampler."""

from collections.abc import Callable
from math import inf

import numpy as np
import torch

from nanovllm.engine.sequence import SamplerOptions, Sequence
from nanovllm.layers.sampler import SamplingExtras, set_counts
from nanovllm.sampling_params import NEUTRAL_ROW, SamplingParams

PLAIN = SamplerOptions(SamplingParams())


class SamplingTable:
    """What each admitted sequence asks of the sampler beyond temperature and seed: one row for each.

    It is written when a sequence is prefilled. A step whose sequences are those of the step before takes its tensors
    over, so that most decode steps cost one comparison; a step of plain requests builds none at all.
    """

    def __init__(
        self, num_rows: int, vocab_size: int, device: torch.device, to_device: Callable[..., torch.Tensor]
    ) -> None:
        self.counts_shape, self.device, self.to_device = (num_rows, vocab_size), device, to_device
        self.counts: torch.Tensor | None = None  # of tokens, for penalties; made for the first request that has any
        self.is_used, self.min_lengths = np.zeros(num_rows, dtype=bool), np.zeros(num_rows, dtype=np.int64)
        self.numbers = np.tile(np.array(NEUTRAL_ROW, dtype=np.float32), (num_rows, 1))
        self.options = [PLAIN] * num_rows
        self._key: tuple[bytes, bytes] | None = None  # of the last step's extras
        self._extras: SamplingExtras | None = None

    def fill(self, seq: Sequence) -> None:
        """Take in the options of a sequence whose prefill is about to be launched."""
        row, options = seq.row, seq.options or PLAIN
        if options is self.options[row]:
            return  # plain, as the one before it
        self.is_used[row], self.options[row] = options is not PLAIN, options
        self.min_lengths[row] = options.min_length
        self.numbers[row] = options.params.sampler_row
        self.numbers[row, 0] *= options.params.top_k < self.counts_shape[1]  # no more tokens than there are
        self._key = None
        if options.params.has_penalties:
            if self.counts is None:
                self.counts = torch.zeros(self.counts_shape, dtype=torch.int16, device=self.device)
            set_counts(self.counts, row, options.prompt_ids, options.completion_ids)

    def build(self, rows: np.ndarray, lengths: np.ndarray) -> SamplingExtras | None:
        """The extras of a step; `[n]` each: the sequences' rows, and how many of their tokens are computed."""
        if not self.is_used[rows].any():
            return None
        may_not_end = lengths < self.min_lengths[rows]
        key = rows.tobytes(), may_not_end.tobytes()
        if key != self._key:
            self._key, self._extras = key, self._build(rows, may_not_end)
        return self._extras

    def _build(self, rows: np.ndarray, may_not_end: np.ndarray) -> SamplingExtras | None:
        numbers, options = self.numbers[rows], [self.options[row] for row in rows]
        top_k, *columns = self.to_device(np.ascontiguousarray(numbers.T))
        is_changed = (numbers != NEUTRAL_ROW).any(axis=0)
        has_penalties = is_changed[3:].any()
        entries = [
            (index, token_id, value)
            for index, (option, forbid) in enumerate(zip(options, may_not_end, strict=True))
            for biases in ((option.params.logit_bias or {}).items(), [(i, -inf) for i in option.end_ids if forbid])
            for token_id, value in biases
        ]
        index, token_ids, values = zip(*entries, strict=True) if entries else ((), (), ())
        wanted = [i for i, option in enumerate(options) if option.params.logprobs is not None]
        if not (entries or wanted or is_changed.any()):
            return None  # all that was asked for is over: min_tokens
        return SamplingExtras(
            filters=(top_k.int(), *columns[:2]) if is_changed[:3].any() else None,
            penalties=tuple(columns[2:]) if has_penalties else None,
            counts=self.counts if has_penalties else None,
            rows=self.to_device(rows.copy(), torch.int64) if has_penalties else None,
            bias=(*(self.to_device(part, torch.int64) for part in (index, token_ids)),
                  self.to_device(values, torch.float32)) if entries else None,
            logprobs=(self.to_device(wanted, torch.int64), max(options[i].params.logprobs for i in wanted))
            if wanted else None,
        )  # fmt: skip
