"""What the sequences of a step ask of the sampler beyond temperature and seed, as tensors."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.penalties import Penalties
from nanovllm.kernels.threshold import Filters
from nanovllm.kernels.token_mask import TokenMasks


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
    is_processed: bool = False  # whether after all stages, and not of the model's own logits


@dataclass(frozen=True, slots=True)
class SamplingExtras:
    """What the n sequences of a step ask for beyond temperature. None: none of them asks for it."""

    filters: Filters | None = None  # top-k, top-p, min-p
    penalties: Penalties | None = None  # repetition, presence, frequency
    counts: Tensor | None = None  # with penalties: [max_num_seqs + 1, vocab] int16: `set_counts`
    count_rows: Tensor | None = None  # with penalties: [n] int64, each sequence's row of `counts`
    bias: LogitBias | None = None
    logprobs: LogprobRequest | None = None
    masks: TokenMasks | None = None  # which tokens may be drawn
    waits_for_masks: bool = False  # the masks are not there yet: see masks.py


Extras = SamplingExtras | None  # of a step; None: nobody asks for more than a temperature


def copying_extras(num_seqs: int, device: torch.device) -> SamplingExtras:
    """Options that make float32 copies of all logits: none take more memory."""
    all_seqs = torch.arange(num_seqs, device=device)
    zero = all_seqs[:1]
    bias = LogitBias(rows=zero, token_ids=zero, values=zero.float())
    return SamplingExtras(bias=bias, logprobs=LogprobRequest(all_seqs, num_top=1))


class Logprobs(NamedTuple):
    """Log-probabilities of r sequences: of the sampled token first, then of the k likeliest."""

    token_ids: Tensor  # [r, 1 + k] int64
    values: Tensor  # [r, 1 + k] float32
    # [r] int64: of the sampled token among the whole vocabulary, 1 for the likeliest. The others
    # are the likeliest ones in their order.
    ranks: Tensor
