"""From logits to the next token of each sequence, in named stages.

    logits -> bias -> penalties -> filters -> draw

Most requests ask for a temperature only, and most steps consist of the last stage. A request's
log-probabilities are those of the model: of the logits as they come in, before all stages.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch
from nanovllm.kernels.penalties import MAX_COUNT, Penalties, penalize, penalize_torch
from nanovllm.kernels.threshold import Filters, filter_thresholds, filter_thresholds_torch
from nanovllm.utils.tensor_parallel import get_tensor_parallel


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Numbers to add to single logits, `[m]` each; minus infinity forbids a token."""

    rows: Tensor  # int64: which of the step's sequences
    token_ids: Tensor  # int64
    values: Tensor  # float32


@dataclass(frozen=True, slots=True)
class LogprobRequest:
    """Whose log-probabilities are wanted."""

    rows: Tensor  # [r] int64: which of the step's sequences
    num_top: int  # how many of the likeliest tokens, beside the sampled one


@dataclass(frozen=True, slots=True)
class SamplingExtras:
    """What the n sequences of a step ask for beyond temperature. None: none of them asks for it."""

    filters: Filters | None = None  # top-k, top-p, min-p
    penalties: Penalties | None = None  # repetition, presence, frequency
    counts: Tensor | None = None  # with penalties: [max_num_seqs + 1, vocab] int16: `set_counts`
    count_rows: Tensor | None = None  # with penalties: [n] int64, each sequence's row of `counts`
    bias: LogitBias | None = None
    logprobs: LogprobRequest | None = None


class Logprobs(NamedTuple):
    """Log-probabilities of r sequences: of the sampled token first, then of the k likeliest."""

    token_ids: Tensor  # [r, 1 + k] int64
    values: Tensor  # [r, 1 + k] float32


class Sampled(NamedTuple):
    """What a step samples."""

    token_ids: Tensor  # [n] int64; -1 where the logits are NaN or infinite
    logprobs: Logprobs | None  # of the sequences that asked


class Sampler(nn.Module):
    """Samples by the Gumbel-max trick, on the device.

    Under tensor parallelism each rank draws the winner of its own part of the vocabulary. Only
    these (score, token id) pairs travel, and every rank then knows the token. A step with extras
    needs whole rows: the ranks exchange their logits, and all of them do the same. The logits of
    this rank are those of the token ids from `vocab_start` on.
    """

    def __init__(self, vocab_start: int, vocab_size: int) -> None:
        super().__init__()
        self.tp = get_tensor_parallel()
        self.vocab_start = vocab_start
        self.vocab_size = vocab_size

    def forward(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        extras: SamplingExtras | None = None,
    ) -> Sampled:
        """Draw one token for each sequence.

        logits: `[n, vocab / tp]`, not yet divided by the temperature.
        temperatures: `[n]` float32; 0 takes the likeliest token.
        seeds, positions: `[n]` int64; the position is that of the token before the drawn one.
        """
        if extras is None:
            return Sampled(self._draw(logits, temperatures, seeds, positions), None)

        if self.tp.size > 1:
            logits = self._gather_vocabulary(logits)
        changed = self._bias_and_penalize(logits, extras)
        thresholds = self._find_thresholds(changed, temperatures, extras)
        draw = gumbel_argmax if changed.is_cuda else gumbel_argmax_torch
        _, token_ids = draw(changed, temperatures, seeds, positions, thresholds=thresholds)

        indices = token_ids.clamp(min=0)
        if extras.penalties is not None:
            self._count(indices, extras)
        if extras.logprobs is None:
            return Sampled(token_ids, None)
        return Sampled(token_ids, self._logprobs(logits, indices, extras.logprobs))

    def _draw(
        self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor
    ) -> Tensor:
        """Draw from the logits as they are, which each rank has a part of: `[n]` int64."""
        draw = gumbel_argmax if logits.is_cuda else gumbel_argmax_torch
        scores, token_ids = draw(logits, temperatures, seeds, positions, self.vocab_start)
        if self.tp.size == 1:
            return token_ids
        # A float32 holds any token id below 2^24 exactly.
        pairs = self.tp.all_gather(torch.stack((scores, token_ids.float())))  # [tp, 2, n]
        all_scores, all_ids = pairs.unbind(1)
        best_rank = all_scores.argmax(dim=0, keepdim=True)
        return all_ids.gather(0, best_rank).squeeze(0).long()

    def _gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Exchange the logits `[n, vocab / tp]` of all ranks: `[n, vocab]` on every rank."""
        rows = -(-self.vocab_size // self.tp.size)  # the last ranks may have fewer
        padded = F.pad(logits, (0, rows - logits.shape[1]))
        parts = self.tp.all_gather(padded)  # [tp, n, rows]
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]

    def _bias_and_penalize(self, logits: Tensor, extras: SamplingExtras) -> Tensor:
        """Apply the first two stages, in vLLM's order, to a float32 copy of `[n, vocab]` logits."""
        if extras.bias is not None:
            logits = self._add_bias(logits, extras.bias)
        if extras.penalties is not None:
            logits = self._penalize(logits, extras)
        return logits

    def _add_bias(self, logits: Tensor, bias: LogitBias) -> Tensor:
        """Add to single logits of a float32 copy."""
        changed = logits.to(torch.float32, copy=True)
        changed.view(-1).index_add_(0, bias.rows * self.vocab_size + bias.token_ids, bias.values)
        return changed

    @staticmethod
    def _penalize(logits: Tensor, extras: SamplingExtras) -> Tensor:
        """Apply the penalties to a float32 copy."""
        assert extras.counts is not None
        assert extras.count_rows is not None
        assert extras.penalties is not None
        apply = penalize if logits.is_cuda else penalize_torch
        return apply(logits, extras.counts, extras.count_rows, extras.penalties)

    @staticmethod
    def _find_thresholds(
        logits: Tensor, temperatures: Tensor, extras: SamplingExtras
    ) -> Tensor | None:
        """Find the least logit of each row that the filters keep: `[n]` float32."""
        if extras.filters is None:
            return None
        find = filter_thresholds if logits.is_cuda else filter_thresholds_torch
        return find(logits, temperatures, extras.filters)

    @staticmethod
    def _count(token_ids: Tensor, extras: SamplingExtras) -> None:
        """Count the drawn tokens: the next step needs that long before the host knows them."""
        assert extras.counts is not None
        counts = extras.counts[extras.count_rows, token_ids]
        may_grow = (counts & MAX_COUNT) < MAX_COUNT
        extras.counts[extras.count_rows, token_ids] = counts + may_grow

    @staticmethod
    def _logprobs(logits: Tensor, token_ids: Tensor, request: LogprobRequest) -> Logprobs:
        """Compute the log-probabilities of the drawn and of the likeliest tokens."""
        wanted = logits[request.rows].float()
        drawn = token_ids[request.rows].unsqueeze(1)
        num_top = min(request.num_top, wanted.shape[1])  # a tiny vocabulary may have fewer
        ids = torch.cat((drawn, wanted.topk(num_top, dim=1).indices), dim=1)
        return Logprobs(ids, wanted.gather(1, ids) - wanted.logsumexp(dim=1, keepdim=True))
