"""From what single sequences ask of the sampler to the tensors of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.penalties import Penalties, set_counts
from nanovllm.kernels.threshold import Filters
from nanovllm.kernels.token_mask import TokenMasks
from nanovllm.sampling.extras import LogitBias, LogprobRequest, SamplingExtras
from nanovllm.sampling.masks import StepMasks
from nanovllm.sampling.options import SamplingOptions
from nanovllm.sampling_params import SamplerNumbers, SamplingParams

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.engine.sequence import Sequence

NEUTRAL = SamplerNumbers()  # numbers that change nothing
PLAIN = SamplingOptions(SamplingParams())


class SamplingTable:
    """What each admitted sequence asks for beyond temperature and seed: one row for each.

    Most steps consist of plain requests, which the table answers with None after one look. A step
    of the same sequences as the step before takes over its tensors, at the cost of a comparison.
    """

    def __init__(
        self,
        num_rows: int,
        config: Config,
        device: torch.device,
        to_device: Callable[..., Tensor],
    ) -> None:
        self.shape = (num_rows, config.hf_config.vocab_size)  # of `counts`
        self.device = device
        self.to_device = to_device  # copies a list or an array, as a tensor of a NumPy type
        self.is_processed = config.logprobs_mode == "processed_logprobs"
        self.options: list[SamplingOptions] = [PLAIN] * num_rows
        # Two columns of `options` as arrays, for one look at a whole step. A min_length of 0 means
        # that the row is plain: any other is at least the prompt's length.
        self.min_lengths = np.zeros(num_rows, dtype=np.int64)
        self.numbers = np.tile(np.array(NEUTRAL, dtype=np.float32), (num_rows, 1))
        # How often each token occurs, for penalties. It is large: made for the first that has any.
        self.counts: Tensor | None = None
        # The extras of the last step, and all they depend on while no sequence is admitted: which
        # sequences, in which order; which of them still have to reach their `min_tokens`.
        self._last_extras: SamplingExtras | None = None
        self._last_key: tuple[bytes, bytes] | None = None

    def free_counts(self) -> None:
        """Free what is large; no sequence may be under way."""
        self.counts = None
        self._last_extras = None
        self._last_key = None

    def fill(self, seq: Sequence) -> None:
        """Take in the options of a sequence whose prefill is about to be launched."""
        options = seq.sampling_options or PLAIN
        row = seq.row
        if options is self.options[row]:
            return  # plain, as the sequence before it in this row
        self.options[row] = options
        self.min_lengths[row] = options.min_length
        self.numbers[row] = options.params.sampler_numbers
        self._last_key = None
        if options.params.has_penalties:
            if self.counts is None:
                self.counts = torch.zeros(self.shape, dtype=torch.int16, device=self.device)
            completion_ids = options.penalized_completion_ids
            set_counts(self.counts, row, options.penalized_prompt_ids, completion_ids)

    def build(self, table_rows: np.ndarray, lengths: np.ndarray) -> SamplingExtras | None:
        """The extras of sequences with these rows and computed tokens, `[n]` each; or None."""
        min_lengths = self.min_lengths[table_rows]
        if not min_lengths.any():
            return None
        too_short = lengths < min_lengths  # to end yet
        key = (table_rows.tobytes(), too_short.tobytes())
        if key != self._last_key:
            self._last_key = key
            self._last_extras = self._make_extras(table_rows, too_short)
        return self._last_extras

    def _make_extras(self, table_rows: np.ndarray, too_short: np.ndarray) -> SamplingExtras | None:
        bias = self._make_bias(table_rows, too_short)
        logprobs = self._make_logprob_request(table_rows)
        numbers = self.numbers[table_rows]
        is_changed = SamplerNumbers(*(numbers != np.array(NEUTRAL)).any(axis=0))
        has_filters = is_changed.top_k or is_changed.top_p or is_changed.min_p
        all_params = [self.options[row].params for row in table_rows.tolist()]
        has_penalties = any(params.has_penalties for params in all_params)
        has_rules = any(params.has_token_rules for params in all_params)
        is_changed_otherwise = has_filters or has_penalties or has_rules
        if bias is None and logprobs is None and not is_changed_otherwise:
            return None  # `min_tokens` alone, and they are there

        top_k, top_p, min_p, repetition, presence, frequency = self.to_device(numbers.T.copy())
        filters = None
        if has_filters:
            filters = Filters(top_k.int(), top_p, min_p)
        extras = SamplingExtras(
            filters=filters, bias=bias, logprobs=logprobs, waits_for_masks=has_rules
        )
        if not has_penalties:
            return extras
        penalties = Penalties(repetition, presence, frequency)
        count_rows = self.to_device(table_rows, np.int64)
        return replace(extras, penalties=penalties, counts=self.counts, count_rows=count_rows)

    def add_masks(self, extras: SamplingExtras, masks: StepMasks) -> SamplingExtras:
        """The extras of a step with the masks that they wait for."""
        on_device = None
        if len(masks.rows) > 0:
            words = self.to_device(masks.words.view(np.int32))
            on_device = TokenMasks(self.to_device(masks.rows), words)
        return replace(extras, masks=on_device, waits_for_masks=False)

    def _make_bias(self, table_rows: np.ndarray, too_short: np.ndarray) -> LogitBias | None:
        """The requests' own biases, and minus infinity for ends that would come too early."""
        rows: list[int] = []
        token_ids: list[int] = []
        values: list[float] = []
        for index, row in enumerate(table_rows.tolist()):
            options = self.options[row]
            bias = options.params.logit_bias or {}
            rows += [index] * len(bias)
            token_ids += bias.keys()
            values += bias.values()
            if too_short[index]:
                rows += [index] * len(options.early_ids)
                token_ids += options.early_ids
                values += [-inf] * len(options.early_ids)
        if not rows:
            return None
        return LogitBias(
            rows=self.to_device(rows, np.int64),
            token_ids=self.to_device(token_ids, np.int64),
            values=self.to_device(values, np.float32),
        )

    def _make_logprob_request(self, table_rows: np.ndarray) -> LogprobRequest | None:
        num_tops: dict[int, int] = {}  # which of the step's sequences -> how many it asks for
        for index, row in enumerate(table_rows.tolist()):
            num_top = self.options[row].params.logprobs
            if num_top is not None:
                num_tops[index] = num_top
        if not num_tops:
            return None
        rows = self.to_device(list(num_tops), np.int64)
        return LogprobRequest(rows, max(num_tops.values()), self.is_processed)
