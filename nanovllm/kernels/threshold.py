"""Top-k, top-p and min-p as one number a row, the least logit that is kept, found without sorting.

A pass weighs what lies at or above three pivots, by number for top-k and by probability for top-p, and so quarters
the interval that the border lies in. Groups of logits that lie all below it are left out: with a small k, nearly all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels._triton import next_power_of_2, tl, triton


@dataclass(frozen=True, slots=True)
class Filters:
    """The three filters of each of n sequences, `[n]` tensors, contiguous, on the device of the logits."""

    top_k: Tensor  # int32; keep this many logits; 0: all
    top_p: Tensor  # float32; keep the likeliest tokens until they have this probability; 1: all
    min_p: Tensor  # float32; keep tokens with at least this part of the likeliest one's probability; 0: all


# They are rows of one table, aligned or not: no reason to compile anew.
@triton.jit(do_not_specialize=["temperatures_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr"])
def _threshold_kernel(
    logits_ptr,
    stride_logits,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    maxima_ptr,
    list_ptr,
    out_ptr,
    vocab_size,
    NUM: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0)
    temperature, top_k = tl.load(temperatures_ptr + row), tl.load(top_k_ptr + row)
    top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < vocab_size, top_k, 0)
    threshold = -float("inf")
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
        maxima_ptr, list_ptr = maxima_ptr + row * NUM, list_ptr + row * NUM
        for start in range(0, NUM, 4 * CHUNK):
            group = start + tl.arange(0, 4 * CHUNK)
            column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            x = tl.load(row_ptr + column, mask=column < vocab_size, other=-float("inf"))
            tl.store(maxima_ptr + group, tl.max(x.to(tl.float32), axis=1))
        tl.debug_barrier()
        maxima = tl.load(maxima_ptr + tl.arange(0, NUM))
        best = tl.max(maxima, axis=0)
        low = -3e38  # whatever lies below has no probability
        if top_k > 0:  # where k groups reach a value, k logits do
            under, over = tl.min(tl.where(maxima > low, maxima, best), axis=0), best
            for _ in range(12):
                middle = 0.5 * under + 0.5 * over
                enough = tl.sum((maxima >= middle).to(tl.int32), axis=0) >= top_k
                under, over = tl.where(enough, middle, under), tl.where(enough, over, middle)
            low = tl.where(tl.sum((maxima >= under).to(tl.int32), axis=0) >= top_k, under, low)
        for phase in range(2):  # top-k, then top-p among what that kept
            if (phase == 0) & (top_k > 0) | (phase == 1) & (top_p < 1):
                scale = tl.where(
                    phase == 0, 0.0, 1.4426950408889634 / temperature
                )  # by 0, each logit weighs 1
                high = best + tl.abs(best) * 1e-6 + 1e-30
                least, largest, target, step = low, high, top_k.to(tl.float32), 1 - phase
                while (least < largest) & (
                    step < 200
                ):  # two different logits in the interval, as far as is known
                    part = tl.where(
                        step == 0, 0.0, 0.25
                    )  # top-p must know the sum of all weights first
                    pivot_1, pivot_2 = (
                        (1 - part) * low + part * high,
                        (1 - 2 * part) * low + 2 * part * high,
                    )
                    pivot_3 = (1 - 3 * part) * low + 3 * part * high
                    selected = (maxima >= low).to(tl.int32)
                    num_selected = tl.sum(selected, axis=0)
                    tl.debug_barrier()  # no thread still reads the last pass's list
                    tl.store(
                        list_ptr + tl.cumsum(selected, axis=0) - 1,
                        tl.arange(0, NUM),
                        mask=selected > 0,
                    )
                    tl.debug_barrier()
                    weight_1 = tl.zeros((CHUNK, GROUP), tl.float32)
                    weight_2, weight_3, above, below = (
                        weight_1,
                        weight_1,
                        weight_1 + 3e38,
                        weight_1 - 3e38,
                    )
                    for start in range(0, num_selected, CHUNK):
                        index = start + tl.arange(0, CHUNK)
                        group = tl.where(
                            index < num_selected, tl.load(list_ptr + index), NUM
                        )  # NUM: none
                        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
                        x = tl.load(
                            row_ptr + column, mask=column < vocab_size, other=-float("inf")
                        ).to(tl.float32)
                        weight = tl.exp2((x - best) * scale)
                        weight_1 += tl.where(x >= pivot_1, weight, 0.0)
                        weight_2 += tl.where(x >= pivot_2, weight, 0.0)
                        weight_3 += tl.where(x >= pivot_3, weight, 0.0)
                        above = tl.minimum(above, tl.where(x >= low, x, 3e38))
                        below = tl.maximum(below, tl.where(x < high, x, -3e38))
                    least, largest, total = tl.min(above), tl.max(below), tl.sum(weight_1)
                    if step == 0:
                        target = top_p * total
                        # All that lies below this weighs less than what top-p may drop.
                        low = tl.maximum(
                            least, best + temperature * tl.log((1 - top_p) * total / vocab_size)
                        )
                    else:
                        in_1, in_2, in_3 = (
                            total >= target,
                            tl.sum(weight_2) >= target,
                            tl.sum(weight_3) >= target,
                        )
                        low = tl.where(
                            in_3, pivot_3, tl.where(in_2, pivot_2, tl.where(in_1, pivot_1, least))
                        )
                        low = tl.maximum(low, least)  # the first interval is far too wide
                        high = tl.where(
                            in_3, high, tl.where(in_2, pivot_3, tl.where(in_1, pivot_2, pivot_1))
                        )
                    step += 1
                low = least
        threshold = tl.where(
            min_p > 0, tl.maximum(low, best + temperature * tl.log(tl.maximum(min_p, 1e-30))), low
        )
    tl.store(out_ptr + row, threshold)


def filter_thresholds(logits: Tensor, temperatures: Tensor, filters: Filters) -> Tensor:
    """The least logit of each row that top-k, then top-p, then min-p keep; equal ones are all kept.

    logits `[n, vocab]` bf16, fp16 or fp32, rows contiguous, not yet divided by temperatures `[n]` float32; filters:
    top_k int32, top_p and min_p float32, `[n]` each -> `[n]` float32, -inf where none is on or the temperature is 0.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1 and all(
        column.is_contiguous()
        for column in (temperatures, filters.top_k, filters.top_p, filters.min_p)
    )
    num_groups = max(next_power_of_2(-(-vocab_size // 128)), 128)
    maxima = torch.empty(num_rows, num_groups, dtype=torch.float32, device=logits.device)
    lists, out = torch.empty_like(maxima, dtype=torch.int32), maxima.new_empty(num_rows)
    _threshold_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        temperatures,
        filters.top_k,
        filters.top_p,
        filters.min_p,
        maxima,
        lists,
        out,
        vocab_size,
        NUM=num_groups,
        GROUP=128,
        CHUNK=32,
        num_warps=8,
        maxnreg=128,  # registers for two rows a multiprocessor
    )
    return out


def filter_thresholds_torch(logits: Tensor, temperatures: Tensor, filters: Filters) -> Tensor:
    """The same in PyTorch: the reference, and the CPU's path."""
    values = logits.double().sort(dim=1, descending=True).values
    top_k, top_p, min_p = filters.top_k, filters.top_p, filters.min_p
    vocab_size, best = values.shape[1], values[:, 0]
    last = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long() - 1
    values = values.masked_fill(values < values.gather(1, last.unsqueeze(1)), -float("inf"))
    probs = ((values - best.unsqueeze(1)) / temperatures.unsqueeze(1)).softmax(dim=1)
    before = (probs.cumsum(dim=1) - probs).masked_fill(values == -float("inf"), float("inf"))
    kept = before < top_p.where(top_p < 1, 2.0).unsqueeze(
        1
    )  # what stands before them is not yet enough
    least = torch.maximum(
        values.where(kept, float("inf")).amin(dim=1), best + temperatures * min_p.log()
    )
    off = (temperatures == 0) | (last == vocab_size - 1) & (top_p == 1) & (min_p == 0)
    return least.masked_fill(off, -float("inf")).float()
