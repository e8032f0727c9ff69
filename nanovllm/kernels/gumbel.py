"""Sampling a token from logits in one pass: the Gumbel-max trick with counter-based noise.

`argmax(logits / T + g)` with independent standard Gumbel noise g draws exactly from `softmax(logits / T)` (Huijben
et al., A Review of the Gumbel-max Trick, 2022). The noise is a pure function of (request seed, position, token id):
Philox4x32 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) with the seed as key and (token
id / 4, position) as counter. So a request's tokens depend neither on its neighbours nor on its preemptions.
"""

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    launch_next,
    libdevice,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)

NUM_ROUNDS = 7  # the fewest that pass BigCrush, by the paper's table 2
TILE = 4096


@triton.jit
def _log(x, APPROX: tl.constexpr):
    return (
        libdevice.fast_logf(x) if APPROX else tl.log(x)
    )  # Triton's interpreter knows only the latter


@triton.jit
def _gumbel_argmax_kernel(
    logits_ptr,
    stride_logits,
    temperatures_ptr,
    seeds_ptr,
    positions_ptr,
    thresholds_ptr,
    values_ptr,
    ids_ptr,
    vocab_size,
    first_id,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROX: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    row, tile = tl.program_id(0), tl.program_id(1)
    # Tiles lie on multiples of 4 of the token id, whatever part of the vocabulary this is: see the noise below.
    token_id = first_id // 4 * 4 + tile * BLOCK + tl.arange(0, BLOCK)
    column = token_id - first_id
    mask = (column >= 0) & (column < vocab_size)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
    scores = tl.load(row_ptr + column, mask=mask, other=-float("inf")).to(tl.float32)
    temperature = tl.load(temperatures_ptr + row)
    if thresholds_ptr is not None:  # known at compile time
        scores = tl.where(scores >= tl.load(thresholds_ptr + row), scores, -float("inf"))
        temperature = tl.where(
            tl.max(scores, axis=0) > -float("inf"), temperature, 0.0
        )  # nothing left: no noise
    if temperature > 0:
        # One Philox call makes four words, for the token ids 4 c to 4 c + 3 of its counter c.
        counter = (first_id // 4 + tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.int32)
        zero = counter * 0
        position = zero + tl.load(positions_ptr + row).to(tl.int32)
        b0, b1, b2, b3 = tl.philox(tl.load(seeds_ptr + row), counter, position, zero, zero, ROUNDS)
        bits = tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))
        uniform = ((bits >> 8).to(tl.float32) + 0.5) * (1.0 / 16777216.0)  # never 0 or 1
        # The largest noise, which decides, comes of the smallest exponentials; there a fast logarithm is too coarse.
        series = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
        exponential = tl.where(uniform < 0.015625, series, -_log(1.0 - uniform, APPROX))
        scores = scores / temperature - _log(exponential, APPROX)
        scores = tl.where(mask, scores, -float("inf"))
    value, index = tl.max(scores, axis=0, return_indices=True)
    out = row * tl.num_programs(1) + tile
    tl.store(values_ptr + out, value)
    tl.store(ids_ptr + out, (first_id // 4 * 4 + tile * BLOCK + index).to(tl.int64))


@triton.jit
def _best_tile_kernel(
    values_ptr, ids_ptr, value_ptr, id_ptr, num_tiles, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    launch_next(PDL)
    wait_for_previous(PDL)
    row, tile = tl.program_id(0), tl.arange(0, BLOCK)
    values = tl.load(
        values_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=-float("inf")
    )
    value, best = tl.max(values, axis=0, return_indices=True)
    tl.store(value_ptr + row, value)
    tl.store(id_ptr + row, tl.load(ids_ptr + row * num_tiles + best))


def gumbel_argmax(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row; at temperature 0, the most likely one, the lowest id among equals.

    logits `[n, vocab]` bf16, fp16 or fp32, rows contiguous, of the token ids from first_id on; `[n]` each:
    temperatures float32, seeds int64, not negative, positions int64, of the token before, thresholds float32: what
    lies below is not drawn. Returns the best scores `[n]` float32, which ranks can compare, and their ids int64.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    block = min(TILE, max(next_power_of_2(vocab_size), 16))
    num_tiles = triton.cdiv(vocab_size + first_id % 4, block)
    values = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    ids = torch.empty_like(values, dtype=torch.int64)
    _gumbel_argmax_kernel[(num_rows, num_tiles)](
        logits,
        logits.stride(0),
        temperatures,
        seeds,
        positions,
        thresholds,
        values,
        ids,
        vocab_size,
        first_id,
        ROUNDS=NUM_ROUNDS,
        BLOCK=block,
        APPROX=logits.is_cuda,
        **pdl_options(),
    )
    best, best_ids = values.new_empty(num_rows), ids.new_empty(num_rows)
    block = next_power_of_2(num_tiles)
    _best_tile_kernel[(num_rows,)](
        values, ids, best, best_ids, num_tiles, BLOCK=block, **pdl_options()
    )
    return best, best_ids


def gumbel_argmax_torch(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch: the reference, and the CPU's path."""
    scores = logits.float()
    if thresholds is not None:
        scores = scores.masked_fill(scores < thresholds.unsqueeze(1), -float("inf"))
    if temperatures.any():
        counters = torch.arange(
            first_id // 4, -(-(first_id + logits.shape[1]) // 4), device=logits.device
        )
        bits = philox_torch(seeds[:, None], counters, positions[:, None]).flatten(1)[
            :, first_id % 4 :
        ]
        uniform = ((bits[:, : logits.shape[1]] >> 8).float() + 0.5) * (1.0 / 16777216.0)
        noise, divisors = -torch.log(-torch.log1p(-uniform)), temperatures.unsqueeze(1)
        scores = torch.where(divisors > 0, scores / divisors + noise, scores)
    values, indices = scores.max(dim=1)
    return values, indices + first_id


def philox_torch(seeds: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """Philox4x32 with key `seeds` and counter (c0, c1, 0, 0), which broadcast: `[..., 4]` 32-bit words, as int64."""
    low32 = 0xFFFFFFFF  # drops the sign that comes of products that need 64 bits unsigned, as int64 wraps
    k0, k1 = seeds & low32, (seeds >> 32) & low32
    c0, c1 = torch.broadcast_tensors(c0 & low32, c1 & low32)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(NUM_ROUNDS):
        product_a, product_b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product_b >> 32) & low32 ^ c1 ^ k0, product_b & low32
        c2, c3 = (product_a >> 32) & low32 ^ c3 ^ k1, product_a & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return torch.stack((c0, c1, c2, c3), dim=-1)
