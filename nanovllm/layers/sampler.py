"""From logits to the next token of each sequence."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch
from nanovllm.kernels.penalties import PROMPT_FLAG, Penalties, penalize, penalize_torch
from nanovllm.kernels.threshold import Filters, filter_thresholds, filter_thresholds_torch
from nanovllm.utils.tensor_parallel import get_tensor_parallel

MAX_COUNT = PROMPT_FLAG - 1


@dataclass(frozen=True, slots=True)
class SamplingExtras:
    """What the n sequences of a step ask for beyond temperature, on the device; None: none of them asks for it."""

    filters: Filters | None = None
    penalties: Penalties | None = None
    counts: Tensor | None = (
        None  # with penalties: `[max_num_seqs + 1, vocab]` int16, see `set_counts`
    )
    rows: Tensor | None = None  # with penalties: `[n]` int64, rows of counts
    bias: tuple[Tensor, Tensor, Tensor] | None = (
        None  # `[m]` each: of the n int64, token id int64, value float32
    )
    logprobs: tuple[Tensor, int] | None = (
        None  # which of the n want them `[r]` int64, and how many top ones (k)
    )


class Sampler(nn.Module):
    """Samples by the Gumbel-max trick, on the device.

    Under tensor parallelism each rank draws the winner of its own part of the vocabulary, and only those (score,
    token id) pairs travel; every rank then knows the token. With extras the logits do, and all ranks do the same.
    """

    def __init__(self, vocab_start: int, vocab_size: int) -> None:
        super().__init__()
        self.tp, self.vocab_start, self.vocab_size = get_tensor_parallel(), vocab_start, vocab_size

    def forward(
        self,
        logits: Tensor,
        temperatures: Tensor,
        seeds: Tensor,
        positions: Tensor,
        extras: SamplingExtras | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """logits `[n, vocab / tp]`, temperatures `[n]` float32, seeds and positions (of the token before) `[n]` int64
        -> ids `[n]` int64, and if asked for (ids int64, logprobs float32), `[r, 1 + k]`: the drawn one, the top k."""
        draw = gumbel_argmax if logits.is_cuda else gumbel_argmax_torch
        if extras is None:
            scores, token_ids = draw(logits, temperatures, seeds, positions, self.vocab_start)
            if self.tp.size > 1:  # a float32 holds any token id below 2^24 exactly
                scores, ids = self.tp.all_gather(torch.stack((scores, token_ids.float()))).unbind(
                    1
                )  # [tp, n] each
                token_ids = ids.gather(0, scores.argmax(dim=0, keepdim=True)).squeeze(0).long()
            return token_ids, None
        logits = logits if self.tp.size == 1 else self._gather(logits)
        changed, thresholds = self._apply(extras, logits, temperatures)
        _, token_ids = draw(changed, temperatures, seeds, positions, thresholds=thresholds)
        if (
            extras.penalties is not None
        ):  # the next step counts this token, long before the host knows it
            counts = extras.counts[extras.rows, token_ids]
            extras.counts[extras.rows, token_ids] = counts + (counts & MAX_COUNT < MAX_COUNT)
        if extras.logprobs is None:
            return token_ids, None
        wanted, num_top = extras.logprobs
        logits = logits[wanted].float()
        ids = torch.cat((token_ids[wanted, None], logits.topk(num_top, dim=1).indices), dim=1)
        return token_ids, (ids, logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True))

    def _gather(self, logits: Tensor) -> Tensor:
        """`[n, part of the vocabulary]` of each rank -> `[n, vocab]` on every rank."""
        rows = -(-self.vocab_size // self.tp.size)  # the last parts may be smaller
        parts = self.tp.all_gather(F.pad(logits, (0, rows - logits.shape[1])))
        return parts.transpose(0, 1).flatten(1)[:, : self.vocab_size]

    def _apply(
        self, extras: SamplingExtras, logits: Tensor, temperatures: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Logits `[n, vocab]` -> a copy with bias, then penalties, as vLLM orders them, and its thresholds `[n]`."""
        if extras.bias is not None:
            index, token_ids, values = extras.bias
            logits = logits.to(torch.float32, copy=True)
            logits.view(-1).index_add_(0, index * self.vocab_size + token_ids, values)
        if extras.penalties is not None:
            apply = penalize if logits.is_cuda else penalize_torch
            logits = apply(logits, extras.counts, extras.rows, extras.penalties)
        find = filter_thresholds if logits.is_cuda else filter_thresholds_torch
        return logits, None if extras.filters is None else find(
            logits, temperatures, extras.filters
        )


def set_counts(counts: Tensor, row: int, prompt_ids: list[int], completion_ids: list[int]) -> None:
    """Fill a row of `SamplingExtras.counts`: PROMPT_FLAG, and how often a token occurs in the completion."""
    ids, times = np.unique(np.array(completion_ids, dtype=np.int64), return_counts=True)
    arrays = ids, times.clip(max=MAX_COUNT).astype(np.int16), np.array(prompt_ids, dtype=np.int64)
    tensors = (torch.from_numpy(array) for array in arrays)
    if counts.is_cuda:
        tensors = (tensor.pin_memory().to(counts.device, non_blocking=True) for tensor in tensors)
    completion, times, prompt = tensors
    known = counts[row].zero_()
    known[completion] = times
    known[prompt] = known[prompt] | PROMPT_FLAG
