"""The stages between the logits and the draw, for the steps in which a request asks for them."""

from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from nanovllm.kernels.penalties import MAX_COUNT, penalize, penalize_torch
from nanovllm.kernels.threshold import filter_thresholds, filter_thresholds_torch
from nanovllm.kernels.token_mask import mask_tokens, mask_tokens_torch
from nanovllm.kernels.token_ranks import token_ranks, token_ranks_torch
from nanovllm.sampling.extras import LogitBias, LogprobRequest, Logprobs, SamplingExtras


@dataclass(frozen=True, slots=True)
class Draw:
    """What n tokens are drawn from."""

    logits: Tensor  # [n, vocab], with biases and penalties
    thresholds: Tensor | None  # [n] float32: the least logit that the filters keep; None: no filter
    temperatures: Tensor  # [n] float32


def bias_and_penalize(logits: Tensor, extras: SamplingExtras) -> Tensor:
    """Apply the first two stages, in vLLM's order, to a float32 copy of `[n, vocab]` logits."""
    if extras.bias is not None:
        logits = add_bias(logits, extras.bias)
    if extras.penalties is not None:
        assert extras.counts is not None
        assert extras.count_rows is not None
        apply = penalize if logits.is_cuda else penalize_torch
        logits = apply(logits, extras.counts, extras.count_rows, extras.penalties)
    return logits


def mask(logits: Tensor, changed: Tensor, extras: SamplingExtras) -> Tensor:
    """Forbid tokens in `changed` `[n, vocab]`, which the stages before have made of `logits`.

    In place: nobody reads the logits later, unless their log-probabilities are wanted.
    """
    if extras.masks is None:
        return changed
    if changed is logits and extras.logprobs is not None:
        changed = logits.clone()
    apply = mask_tokens if changed.is_cuda else mask_tokens_torch
    apply(changed, extras.masks)
    return changed


def add_bias(logits: Tensor, bias: LogitBias) -> Tensor:
    """Add to single logits of a float32 copy."""
    changed = logits.to(torch.float32, copy=True)
    vocab_size = logits.shape[1]
    changed.view(-1).index_add_(0, bias.rows * vocab_size + bias.token_ids, bias.values)
    return changed


def find_thresholds(logits: Tensor, temperatures: Tensor, extras: SamplingExtras) -> Tensor | None:
    """Find the least logit of each row that the filters keep: `[n]` float32."""
    if extras.filters is None:
        return None
    find = filter_thresholds if logits.is_cuda else filter_thresholds_torch
    return find(logits, temperatures, extras.filters)


def count_drawn(token_ids: Tensor, extras: SamplingExtras) -> None:
    """Count the drawn tokens: the next step needs that long before the host knows them."""
    if extras.penalties is None:
        return
    assert extras.counts is not None
    counts = extras.counts[extras.count_rows, token_ids]
    may_grow = (counts & MAX_COUNT) < MAX_COUNT
    extras.counts[extras.count_rows, token_ids] = counts + may_grow


def find_logprobs(
    request: LogprobRequest | None, logits: Tensor, token_ids: Tensor, draw: Draw
) -> Logprobs | None:
    """Compute the log-probabilities of the drawn and of the likeliest tokens.

    logits: `[n, vocab]`, as the model gave them.
    token_ids: `[n]` int64, drawn.
    """
    if request is None:
        return None
    if request.is_processed:
        wanted = processed_logits(request.rows, draw)
    else:
        wanted = logits[request.rows]
    return rank_tokens(wanted, token_ids[request.rows], request.num_top)


def rank_tokens(logits: Tensor, token_ids: Tensor, num_top: int) -> Logprobs:
    """Compute the log-probabilities of tokens, and of as many likeliest ones.

    logits: `[r, vocab]`, as the model gave them.
    token_ids: `[r]` int64, one for each row.
    """
    find = token_ranks if logits.is_cuda else token_ranks_torch
    found = find(logits, token_ids)
    num_top = min(num_top, logits.shape[1])  # a tiny vocabulary may have fewer
    if num_top == 1:
        top_ids = found.likeliest.unsqueeze(1)
    else:
        top_ids = logits.topk(num_top, dim=1).indices
    ids = torch.cat((token_ids.unsqueeze(1), top_ids), dim=1)
    values = logits.gather(1, ids).float() - found.logsumexp.unsqueeze(1)
    return Logprobs(token_ids=ids, values=values, ranks=found.ranks)


def processed_logits(rows: Tensor, draw: Draw) -> Tensor:
    """The logits of the distribution that was drawn from, `[r, vocab]` float32, in a copy. Tokens
    that the filters leave out have minus infinity. Greedy rows are those of temperature 1.
    """
    wanted = draw.logits[rows].float()
    if draw.thresholds is not None:
        wanted.masked_fill_(wanted < draw.thresholds[rows].unsqueeze(1), -inf)
    temperatures = draw.temperatures[rows].unsqueeze(1)
    return wanted.div_(temperatures.where(temperatures > 0, 1.0))
