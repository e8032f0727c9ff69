"""The probability and the rank of a given token in each row of logits, in one pass over them.

The logits of a prompt are the largest thing that its log-probabilities take: 152,000 numbers a
token with Qwen3's vocabulary. Here they are read once, in the model's dtype, and never copied.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)

TILE = 4096  # logits that a program takes at a time
LOWEST = -3.4e38  # below every finite logit; minus infinity less itself would be no number


class TokenRanks(NamedTuple):
    """What is found in r rows of logits, `[r]` each."""

    logsumexp: Tensor  # float32; a logit less this is a log-probability
    ranks: Tensor  # int64, of the given token: 1 if no other is likelier
    likeliest: Tensor  # int64: a token id; of equally likely ones the lowest


@triton.jit
def _token_ranks_kernel(
    logits_ptr,
    stride_logits,
    token_ids_ptr,
    logsumexp_ptr,
    ranks_ptr,
    likeliest_ptr,
    vocab_size,
    BLOCK: tl.constexpr,
    LOWEST: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes a row. Each of its BLOCK lanes has numbers of its own until the end."""
    launch_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    given = tl.load(row_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
    lane = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), LOWEST, tl.float32)
    largest_id = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)  # of exp(logit - largest)
    num_larger = tl.zeros((BLOCK,), tl.int32)  # than the given token's
    for start in range(0, vocab_size, BLOCK):
        token_id = start + lane
        mask = token_id < vocab_size
        logit = tl.load(row_ptr + token_id, mask=mask, other=-float("inf")).to(tl.float32)
        is_larger = logit > largest
        new_largest = tl.where(is_larger, logit, largest)
        total = total * tl.exp(largest - new_largest) + tl.exp(logit - new_largest)
        largest_id = tl.where(is_larger, token_id, largest_id)
        largest = new_largest
        num_larger += (logit > given).to(tl.int32)
    row_largest = tl.max(largest, axis=0)
    row_total = tl.sum(total * tl.exp(largest - row_largest), axis=0)
    ids = tl.where(largest == row_largest, largest_id, vocab_size)
    tl.store(logsumexp_ptr + row, row_largest + tl.log(row_total))
    tl.store(ranks_ptr + row, (tl.sum(num_larger, axis=0) + 1).to(tl.int64))
    tl.store(likeliest_ptr + row, tl.min(ids, axis=0).to(tl.int64))


def token_ranks(logits: Tensor, token_ids: Tensor) -> TokenRanks:
    """Find log-sum-exp, rank and likeliest token of each row.

    logits: `[r, vocab]`, each row contiguous. token_ids: `[r]` int64, in the vocabulary.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    found = TokenRanks(
        logsumexp=torch.empty(num_rows, dtype=torch.float32, device=logits.device),
        ranks=torch.empty_like(token_ids),
        likeliest=torch.empty_like(token_ids),
    )
    _token_ranks_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        token_ids,
        *found,
        vocab_size,
        BLOCK=TILE,
        LOWEST=LOWEST,
        num_warps=8,
        **pdl_options(),
    )
    return found


def token_ranks_torch(logits: Tensor, token_ids: Tensor) -> TokenRanks:
    """`token_ranks` in PyTorch: the reference."""
    given = logits.gather(1, token_ids.unsqueeze(1))
    return TokenRanks(
        logsumexp=logits.float().logsumexp(dim=1),
        ranks=(logits > given).sum(dim=1) + 1,
        likeliest=logits.argmax(dim=1),
    )
