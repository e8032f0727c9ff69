"""Repetition, presence and frequency penalties in one pass over the logits.

The repetition penalty is that of CTRL (Keskar et al. 2019), and treats prompt and completion alike.
The other two are OpenAI's, and treat the completion alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels._triton import tl, triton

# A count says in its lower bits how often the completion contains a token; this bit is set if the
# prompt contains it.
PROMPT_FLAG = 1 << 14
MAX_COUNT = PROMPT_FLAG - 1  # the largest count of a token in the completion
BLOCK = 4096  # logits that a program takes


@dataclass(frozen=True, slots=True)
class Penalties:
    """The three penalties of n sequences: tensors `[n]` float32 on the device of the logits."""

    # Divides a positive logit, and multiplies a negative one, of a token that prompt or completion
    # contain; 1: off.
    repetition: Tensor
    # Is subtracted from the logit of a token that the completion contains; 0: off.
    presence: Tensor
    # Is subtracted once for each time that the completion contains the token; 0: off.
    frequency: Tensor


# These pointers are rows of a table, which are aligned to 16 bytes or not: without the option,
# Triton would compile the kernel again for every combination.
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
    """A program takes BLOCK logits of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocab_size
    x = tl.load(logits_ptr + row * stride_logits + column, mask=mask, other=0.0).to(tl.float32)
    count_row = tl.load(rows_ptr + row)
    counts = tl.load(counts_ptr + count_row * vocab_size + column, mask=mask, other=0).to(tl.int32)
    repetition = tl.load(repetition_ptr + row)
    times = (counts & (FLAG - 1)).to(tl.float32)  # in the completion
    x = tl.where(counts != 0, tl.where(x > 0, x / repetition, x * repetition), x)
    frequency = tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    x -= times * frequency + tl.where(times > 0, presence, 0.0)
    tl.store(out_ptr + row * vocab_size + column, x, mask=mask)


def penalize(logits: Tensor, counts: Tensor, count_rows: Tensor, penalties: Penalties) -> Tensor:
    """Return the penalised logits, a new tensor `[n, vocab]` float32.

    logits: `[n, vocab]` bf16, fp16 or fp32, rows contiguous.
    counts: `[m, vocab]` int16, contiguous: of each token, see PROMPT_FLAG.
    count_rows: `[n]` int64, the row of counts that belongs to each row of logits.
    penalties: tensors `[n]`.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and counts.is_contiguous() and counts.shape[1] == vocab_size
    out = torch.empty(num_rows, vocab_size, dtype=torch.float32, device=logits.device)
    _penalize_kernel[(num_rows, triton.cdiv(vocab_size, BLOCK))](
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
        BLOCK=BLOCK,
        num_warps=8,
    )
    return out


def penalize_torch(
    logits: Tensor, counts: Tensor, count_rows: Tensor, penalties: Penalties
) -> Tensor:
    """`penalize` in PyTorch: the reference, and the CPU's path."""
    repetition = penalties.repetition.unsqueeze(1)
    presence = penalties.presence.unsqueeze(1)
    frequency = penalties.frequency.unsqueeze(1)
    x = logits.float()
    counts = counts[count_rows]
    x = torch.where(counts != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    times = counts & (PROMPT_FLAG - 1)
    return x - (times * frequency + (times > 0) * presence)


def set_counts(counts: Tensor, row: int, prompt_ids: list[int], completion_ids: list[int]) -> None:
    """Fill a row of the counts that `penalize` takes, for a sequence that is admitted.

    Each number holds how often the token occurs in the completion, at most MAX_COUNT, and the bit
    PROMPT_FLAG if it occurs in the prompt.
    """
    completion, times = np.unique(np.array(completion_ids, dtype=np.int64), return_counts=True)
    times = times.clip(max=MAX_COUNT).astype(np.int16)
    prompt = np.array(prompt_ids, dtype=np.int64)

    def to_device(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if not counts.is_cuda:
            return tensor
        return tensor.pin_memory().to(counts.device, non_blocking=True)

    known = counts[row].zero_()
    known[to_device(completion)] = to_device(times)
    prompt_index = to_device(prompt)
    known[prompt_index] = known[prompt_index] | PROMPT_FLAG
