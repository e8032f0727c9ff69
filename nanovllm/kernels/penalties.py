"""Repetition, presence and frequency penalties, in one pass over the logits and the counts of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels._triton import tl, triton

PROMPT_FLAG = (
    1 << 14
)  # in a count: the token is in the prompt; the bits below say how often in the completion


@dataclass(frozen=True, slots=True)
class Penalties:
    """The three penalties of each of n sequences, `[n]` float32 tensors on the device of the logits."""

    repetition: (
        Tensor  # divides a positive logit, multiplies a negative one, of all tokens seen; 1: off
    )
    presence: Tensor  # is subtracted from the logit of a token that the completion contains; 0: off
    frequency: Tensor  # is subtracted once for each time the completion contains the token; 0: off


# They are rows of one table, aligned or not: no reason to compile anew.
@triton.jit(do_not_specialize=["rows_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr"])
def _penalize_kernel(
    logits_ptr,
    stride_logits,
    counts_ptr,
    rows_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    out_ptr,
    vocab_size,
    FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocab_size
    x = tl.load(logits_ptr + row * stride_logits + column, mask=mask, other=0.0).to(tl.float32)
    counts = tl.load(
        counts_ptr + tl.load(rows_ptr + row) * vocab_size + column, mask=mask, other=0
    ).to(tl.int32)
    repetition, times = tl.load(repetition_ptr + row), (counts & (FLAG - 1)).to(tl.float32)
    x = tl.where(counts != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    x -= times * tl.load(frequency_ptr + row) + tl.where(
        times > 0, tl.load(presence_ptr + row), 0.0
    )
    tl.store(out_ptr + row * vocab_size + column, x, mask=mask)


def penalize(logits: Tensor, counts: Tensor, count_rows: Tensor, penalties: Penalties) -> Tensor:
    """Logits `[n, vocab]`, rows contiguous -> float32, penalised. Each has a row of counts `[m, vocab]` int16: count_rows
    `[n]` int64; penalties are repetition (of prompt and completion), presence, frequency, `[n]` float32 each."""
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and counts.is_contiguous() and counts.shape[1] == vocab_size
    out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    _penalize_kernel[(num_rows, triton.cdiv(vocab_size, 4096))](
        logits,
        logits.stride(0),
        counts,
        count_rows,
        penalties.repetition,
        penalties.presence,
        penalties.frequency,
        out,
        vocab_size,
        FLAG=PROMPT_FLAG,
        BLOCK=4096,
        num_warps=8,
    )
    return out


def penalize_torch(
    logits: Tensor, counts: Tensor, count_rows: Tensor, penalties: Penalties
) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    repetition = penalties.repetition.unsqueeze(1)
    presence = penalties.presence.unsqueeze(1)
    frequency = penalties.frequency.unsqueeze(1)
    x, counts = logits.float(), counts[count_rows]
    x = torch.where(counts != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    times = counts & (PROMPT_FLAG - 1)
    return x - (times * frequency + (times > 0) * presence)
