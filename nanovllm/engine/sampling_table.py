"""From the options of sequences to the inputs of the sampler."""

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import torch

from nanovllm.engine.sequence import SamplingOptions, Sequence
from nanovllm.layers.sampler import SamplingExtras, set_counts
from nanovllm.sampling_params import SamplerNumbers, SamplingParams

# The options of a sequence that has none.
PLAIN = SamplingOptions(
    params=SamplingParams(),
    min_length=0,
    end_ids=(),
    penalized_prompt_ids=[],
    penalized_completion_ids=[],
)


class SamplingTable:
    """What each admitted sequence asks of the sampler beyond temperature and seed: one row for each.

    A step whose sequences are those of the step before takes its tensors over, so that most decode steps cost one
    comparison; a step of plain requests has none.
    """

    def __init__(
        self,
        num_rows: int,
        vocab_size: int,
        device: torch.device,
        to_device: Callable[..., torch.Tensor],
    ) -> None:
        self.num_rows, self.vocab_size, self.device, self.to_device = (
            num_rows,
            vocab_size,
            device,
            to_device,
        )
        self.counts: torch.Tensor | None = (
            None  # of tokens, for penalties; made for the first request that has any
        )
        self.min_lengths = np.zeros(num_rows, dtype=np.int64)  # 0: plain, for no prompt is empty
        self.numbers = np.tile(np.array(SamplerNumbers(), dtype=np.float32), (num_rows, 1))
        self.options: list[SamplingOptions] = [PLAIN] * num_rows
        self._last: tuple[tuple[bytes, bytes] | None, SamplingExtras | None] = None, None

    def fill(self, seq: Sequence) -> None:
        """Take in the options of a sequence whose prefill is about to be launched."""
        row, options = seq.row, seq.sampling_options or PLAIN
        if options is self.options[row]:
            return  # plain, as the one before it
        self.options[row] = options
        self.min_lengths[row] = options.min_length
        self.numbers[row] = options.params.sampler_numbers
        self._last = None, None
        if options.params.has_penalties:
            if self.counts is None:
                self.counts = torch.zeros(
                    self.num_rows, self.vocab_size, dtype=torch.int16, device=self.device
                )
            set_counts(
                self.counts, row, options.penalized_prompt_ids, options.penalized_completion_ids
            )

    def build(self, rows: np.ndarray, lengths: np.ndarray) -> SamplingExtras | None:
        """The extras of a step; `[n]` each: the sequences' rows, and how many of their tokens are computed."""
        min_lengths = self.min_lengths[rows]
        if not min_lengths.any():
            return None
        may_not_end = lengths < min_lengths
        key = rows.tobytes(), may_not_end.tobytes()
        if key != self._last[0]:
            self._last = key, self._build(rows, may_not_end)
        return self._last[1]

    def _build(self, rows: np.ndarray, may_not_end: np.ndarray) -> SamplingExtras | None:
        wanted, biases = [], []
        for index, (row, forbid) in enumerate(
            zip(rows.tolist(), may_not_end.tolist(), strict=True)
        ):
            params = self.options[row].params
            if params.logprobs is not None:
                wanted.append((index, params.logprobs))
            biases += [(index, *entry) for entry in (params.logit_bias or {}).items()]
            biases += [(index, token_id, -inf) for token_id in self.options[row].end_ids if forbid]
        extras: dict[str, Any] = {}
        is_changed = (self.numbers[rows] != SamplerNumbers()).any(axis=0)
        top_k, top_p, min_p, *penalties = self.to_device(self.numbers[rows].T.copy())
        if is_changed[:3].any():
            extras["filters"] = top_k.int(), top_p, min_p
        if is_changed[3:].any():
            extras.update(
                penalties=tuple(penalties), counts=self.counts, rows=self.to_device(rows, np.int64)
            )
        if biases:
            extras["bias"] = tuple(
                map(self.to_device, zip(*biases, strict=True), (np.int64, np.int64, np.float32))
            )
        if wanted:
            indices, numbers = zip(*wanted, strict=True)
            extras["logprobs"] = self.to_device(indices, np.int64), max(numbers)
        return SamplingExtras(**extras) if extras else None  # None: min_tokens, and they are there
