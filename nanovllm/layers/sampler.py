"""From logits to the next token of each sequence, in named stages.

    logits -> bias -> penalties -> mask -> filters -> draw

Most requests ask for a temperature only, and most steps consist of the last stage; the others are
in `sampling/stages.py`. A request's log-probabilities are those of the model: of the logits as they
come in, before all stages; with `logprobs_mode="processed_logprobs"` those that it draws by.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch
from nanovllm.sampling import stages
from nanovllm.sampling.extras import Logprobs, SamplingExtras
from nanovllm.utils.tensor_parallel import get_tensor_parallel


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

        logits = self.gather_vocabulary(logits)
        changed = stages.bias_and_penalize(logits, extras)
        changed = stages.mask(logits, changed, extras)
        thresholds = stages.find_thresholds(changed, temperatures, extras)  # the filters
        draw = gumbel_argmax if changed.is_cuda else gumbel_argmax_torch
        _, token_ids = draw(changed, temperatures, seeds, positions, thresholds=thresholds)

        indices = token_ids.clamp(min=0)
        stages.count_drawn(indices, extras)
        draw_from = stages.Draw(changed, thresholds, temperatures)
        logprobs = stages.find_logprobs(extras.logprobs, logits, indices, draw_from)
        return Sampled(token_ids, logprobs)

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

    def gather_vocabulary(self, logits: Tensor) -> Tensor:
        """Exchange the logits `[n, vocab / tp]` of all ranks: `[n, vocab]` on every rank."""
        if self.tp.size == 1:
            return logits
        rows = -(-self.vocab_size // self.tp.size)  # the last ranks may have fewer
        padded = F.pad(logits, (0, rows - logits.shape[1]))
        parts = self.tp.all_gather(padded)  # [tp, n, rows]
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]
