"""Forbidding tokens by a mask of bits, in place, before one is drawn."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels._triton import tl, triton

BLOCK = 4096  # logits that a program takes


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """Which tokens m of the sequences of a step may draw."""

    rows: Tensor  # [m] int64: which rows of the logits
    # [m, words] int32, at least one for each 32 logits: bit i % 32 of word i // 32 is set if token
    # i may be drawn.
    words: Tensor


@triton.jit
def _mask_kernel(
    logits_ptr, stride_logits, rows_ptr, words_ptr, num_words, vocab_size, BLOCK: tl.constexpr
):
    """A program takes BLOCK logits of one row, of which it reads none."""
    index = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_logit = column < vocab_size
    word = tl.load(words_ptr + index * num_words + column // 32, mask=is_logit, other=0)
    is_forbidden = ((word >> (column % 32)) & 1) == 0
    row = tl.load(rows_ptr + index)
    tl.store(logits_ptr + row * stride_logits + column, -float("inf"), mask=is_logit & is_forbidden)


def mask_tokens(logits: Tensor, masks: TokenMasks) -> None:
    """Set the logits of forbidden tokens to minus infinity, in place.

    logits: `[n, vocab]` bf16, fp16 or fp32, rows contiguous.
    """
    vocab_size = logits.shape[1]
    num_masks, num_words = masks.words.shape
    assert logits.stride(1) == 1 and masks.words.is_contiguous() and num_words * 32 >= vocab_size
    _mask_kernel[(num_masks, triton.cdiv(vocab_size, BLOCK))](
        logits,
        logits.stride(0),
        masks.rows,
        masks.words,
        num_words,
        vocab_size,
        BLOCK=BLOCK,
        num_warps=8,
    )


def mask_tokens_torch(logits: Tensor, masks: TokenMasks) -> None:
    """`mask_tokens` in PyTorch: the reference, and the CPU's path."""
    bits = torch.arange(32, dtype=torch.int32, device=logits.device)
    is_allowed = (masks.words.unsqueeze(-1) >> bits) & 1  # [m, words, 32]
    is_forbidden = is_allowed.flatten(1)[:, : logits.shape[1]] == 0
    logits[masks.rows] = logits[masks.rows].masked_fill(is_forbidden, -float("inf"))
