"""Top-k, top-p and min-p as one number a row: the least logit that is kept, found without sorting.

For top-k every logit weighs 1, for top-p it weighs its probability (times a constant). The kernel
looks for the largest threshold such that the logits at or above it weigh enough. One pass over the
logits weighs what lies at or above three pivots, and so quarters the interval of the threshold.

Passes leave out most of the logits: these are divided into groups of 128, and a group whose maximum
is below the interval cannot matter. With a small k, nearly all groups are left out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels._triton import next_power_of_2, tl, triton

GROUP = 128  # logits in a group
CHUNK = 32  # groups that a program takes at a time


@dataclass(frozen=True, slots=True)
class Filters:
    """The three filters of n sequences: contiguous tensors `[n]` on the device of the logits."""

    top_k: Tensor  # int32: keep that many logits; 0: all
    top_p: Tensor  # float32: keep the likeliest tokens that together have this probability; 1: all
    min_p: Tensor  # float32: keep tokens with this share of the largest probability; 0: all


@triton.jit
def _group_maxima(
    row_ptr,
    maxima_ptr,
    vocab_size,
    NUM: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest logit of each group: `[NUM]`. They go through memory, to be in one tile."""
    for start in range(0, NUM, 4 * CHUNK):
        group = start + tl.arange(0, 4 * CHUNK)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(row_ptr + column, mask=column < vocab_size, other=-float("inf"))
        tl.store(maxima_ptr + group, tl.max(x.to(tl.float32), axis=1))
    tl.debug_barrier()
    return tl.load(maxima_ptr + tl.arange(0, NUM))


@triton.jit
def _low_of_top_k(maxima, best, low, top_k):
    """A number that at least top_k logits reach, near the top_k-th; `low` where none is found.

    Where the maxima of k groups reach a number, k logits do. It is found by bisection.
    """
    under = tl.min(tl.where(maxima > low, maxima, best), axis=0)
    over = best
    for _ in range(12):
        middle = 0.5 * under + 0.5 * over
        enough = tl.sum((maxima >= middle).to(tl.int32), axis=0) >= top_k
        under = tl.where(enough, middle, under)
        over = tl.where(enough, over, middle)
    return tl.where(tl.sum((maxima >= under).to(tl.int32), axis=0) >= top_k, under, low)


@triton.jit
def _list_groups(maxima, low, list_ptr, NUM: tl.constexpr):
    """List the numbers of the groups with a logit at or above low; return how many there are."""
    selected = (maxima >= low).to(tl.int32)
    num_selected = tl.sum(selected, axis=0)
    tl.debug_barrier()  # no thread still reads the list of the pass before
    tl.store(list_ptr + tl.cumsum(selected, axis=0) - 1, tl.arange(0, NUM), mask=selected > 0)
    tl.debug_barrier()
    return num_selected


@triton.jit
def _weigh_listed_groups(
    row_ptr,
    list_ptr,
    num_selected,
    best,
    scale,
    low,
    high,
    pivot_1,
    pivot_2,
    pivot_3,
    vocab_size,
    NUM: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One pass. A logit x weighs `exp2((x - best) * scale)`: 1 where scale is 0.

    Returns five tiles `[CHUNK, GROUP]`, each to be reduced to one number by the caller: the weights
    at or above each pivot (by sum), the logits from low on (by minimum), those below high (by
    maximum).
    """
    weight_1 = tl.zeros((CHUNK, GROUP), tl.float32)
    weight_2 = weight_1
    weight_3 = weight_1
    above = weight_1 + 3e38
    below = weight_1 - 3e38
    for start in range(0, num_selected, CHUNK):
        index = start + tl.arange(0, CHUNK)
        # Behind the end of the list stands group NUM, which is empty.
        group = tl.where(index < num_selected, tl.load(list_ptr + index), NUM)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        x = tl.load(row_ptr + column, mask=column < vocab_size, other=-float("inf"))
        x = x.to(tl.float32)
        weight = tl.exp2((x - best) * scale)
        weight_1 += tl.where(x >= pivot_1, weight, 0.0)
        weight_2 += tl.where(x >= pivot_2, weight, 0.0)
        weight_3 += tl.where(x >= pivot_3, weight, 0.0)
        above = tl.minimum(above, tl.where(x >= low, x, 3e38))
        below = tl.maximum(below, tl.where(x < high, x, -3e38))
    return weight_1, weight_2, weight_3, above, below


@triton.jit
def _least_kept(
    row_ptr,
    maxima,
    list_ptr,
    best,
    low,
    temperature,
    top_k,
    top_p,
    phase,
    vocab_size,
    NUM: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The least logit that top-k (phase 0) or top-p (phase 1) keeps of those from low on."""
    scale = tl.where(phase == 0, 0.0, 1.4426950408889634 / temperature)  # log2(e) / T
    # The logits from low on weigh enough, those from high on do not. least and largest are the
    # extremes of the logits in that interval, as far as they are known.
    high = best + tl.abs(best) * 1e-6 + 1e-30
    least = low
    largest = high
    target = top_k.to(tl.float32)  # the weight that is enough; for top-p, see step 0
    step = 1 - phase
    # Until all logits in the interval are equal: that one is the threshold.
    while (least < largest) & (step < 200):
        # Step 0, of top-p only, has all pivots at low and so finds the whole weight.
        part = tl.where(step == 0, 0.0, 0.25)
        pivot_1 = (1 - part) * low + part * high
        pivot_2 = (1 - 2 * part) * low + 2 * part * high
        pivot_3 = (1 - 3 * part) * low + 3 * part * high
        num_selected = _list_groups(maxima, low, list_ptr, NUM)
        weight_1, weight_2, weight_3, above, below = _weigh_listed_groups(
            row_ptr,
            list_ptr,
            num_selected,
            best,
            scale,
            low,
            high,
            pivot_1,
            pivot_2,
            pivot_3,
            vocab_size,
            NUM,
            GROUP,
            CHUNK,
        )
        least = tl.min(above)
        largest = tl.max(below)
        total_1 = tl.sum(weight_1)
        if step == 0:
            target = top_p * total_1
            # top-p may drop (1 - top_p) of the whole weight. Logits that each weigh less than an
            # equal share of that, of vocab_size shares, can be dropped together.
            share = (1 - top_p) * total_1 / vocab_size
            low = tl.maximum(least, best + temperature * tl.log(share))
        else:
            enough_1 = total_1 >= target
            enough_2 = tl.sum(weight_2) >= target
            enough_3 = tl.sum(weight_3) >= target
            # The highest pivot with enough above it is the new low, the next the high.
            low = tl.where(enough_1, pivot_1, least)
            low = tl.where(enough_2, pivot_2, low)
            low = tl.where(enough_3, pivot_3, low)
            low = tl.maximum(low, least)  # the first interval is far too wide
            high_2 = tl.where(enough_1, pivot_2, pivot_1)
            high_3 = tl.where(enough_2, pivot_3, high_2)
            high = tl.where(enough_3, high, high_3)
        step += 1
    return least


# These pointers are rows of a table, which are aligned to 16 bytes or not: without the option,
# Triton would compile the kernel again for every combination.
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
    """A program takes one row."""
    row = tl.program_id(0)
    temperature = tl.load(temperatures_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_k = tl.where(top_k < vocab_size, top_k, 0)
    threshold = -float("inf")
    if (temperature > 0) & ((top_k > 0) | (top_p < 1) | (min_p > 0)):
        row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
        maxima_ptr = maxima_ptr + row * NUM
        list_ptr = list_ptr + row * NUM
        maxima = _group_maxima(row_ptr, maxima_ptr, vocab_size, NUM, GROUP, CHUNK)
        best = tl.max(maxima, axis=0)
        low = -3e38  # a logit below has no probability
        if top_k > 0:
            low = _low_of_top_k(maxima, best, low, top_k)
        # Phase 0 is top-k, phase 1 is top-p among the logits that top-k kept. In a loop they share
        # the code of a pass, which takes most of the kernel's instructions.
        for phase in range(2):
            is_on = ((phase == 0) & (top_k > 0)) | ((phase == 1) & (top_p < 1))
            if is_on:
                low = _least_kept(
                    row_ptr,
                    maxima,
                    list_ptr,
                    best,
                    low,
                    temperature,
                    top_k,
                    top_p,
                    phase,
                    vocab_size,
                    NUM,
                    GROUP,
                    CHUNK,
                )
        # A probability of min_p times the largest is a logit that is T log(min_p) below the best.
        threshold = tl.where(
            min_p > 0, tl.maximum(low, best + temperature * tl.log(tl.maximum(min_p, 1e-30))), low
        )
    tl.store(out_ptr + row, threshold)


def filter_thresholds(logits: Tensor, temperatures: Tensor, filters: Filters) -> Tensor:
    """Return the least logit of each row that top-k, then top-p, then min-p keep: `[n]` float32.

    Equal logits are all kept. The threshold is -inf where no filter is on or the temperature is 0.

    logits: `[n, vocab]` bf16, fp16 or fp32, rows contiguous, not yet divided by the temperature.
    temperatures: `[n]` float32.
    filters: tensors `[n]`, contiguous.
    """
    num_rows, vocab_size = logits.shape
    columns = (temperatures, filters.top_k, filters.top_p, filters.min_p)
    assert logits.stride(1) == 1 and all(column.is_contiguous() for column in columns)
    num_groups = max(next_power_of_2(-(-vocab_size // GROUP)), 128)
    maxima = torch.empty(num_rows, num_groups, dtype=torch.float32, device=logits.device)
    lists = torch.empty_like(maxima, dtype=torch.int32)
    thresholds = maxima.new_empty(num_rows)
    _threshold_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        temperatures,
        filters.top_k,
        filters.top_p,
        filters.min_p,
        maxima,
        lists,
        thresholds,
        vocab_size,
        NUM=num_groups,
        GROUP=GROUP,
        CHUNK=CHUNK,
        num_warps=8,
        maxnreg=128,  # so few registers that two rows share a multiprocessor
    )
    return thresholds


def filter_thresholds_torch(logits: Tensor, temperatures: Tensor, filters: Filters) -> Tensor:
    """`filter_thresholds` in PyTorch, by sorting: the reference, and the CPU's path."""
    values = logits.double().sort(dim=1, descending=True).values
    vocab_size = values.shape[1]
    best = values[:, 0]
    top_k = torch.where(filters.top_k > 0, filters.top_k, vocab_size).clamp(max=vocab_size)
    last = values.gather(1, top_k.long().unsqueeze(1) - 1)  # the last one that top-k keeps
    values = values.masked_fill(values < last, -float("inf"))
    probs = ((values - best.unsqueeze(1)) / temperatures.unsqueeze(1)).softmax(dim=1)
    # top-p keeps a token as long as those before it have less than top_p of the probability.
    before = (probs.cumsum(dim=1) - probs).masked_fill(values == -float("inf"), float("inf"))
    top_p = torch.where(filters.top_p < 1, filters.top_p, 2.0)  # at 1, rounding must drop nothing
    kept = before < top_p.unsqueeze(1)
    least_of_top_p = values.where(kept, float("inf")).amin(dim=1)
    least_of_min_p = best + temperatures * filters.min_p.log()
    least = torch.maximum(least_of_top_p, least_of_min_p)
    no_filter = (top_k == vocab_size) & (filters.top_p == 1) & (filters.min_p == 0)
    return least.masked_fill((temperatures == 0) | no_filter, -float("inf")).float()
