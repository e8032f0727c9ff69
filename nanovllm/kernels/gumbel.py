"""Sampling a token from logits in one pass: the Gumbel-max trick with counter-based noise.

`argmax(logits / T + g)` with independent standard Gumbel noise g draws exactly from
`softmax(logits / T)` (Huijben et al., A Review of the Gumbel-max Trick, 2022). The noise is a pure
function of (request seed, position, token id): Philox4x32 (Salmon et al., Parallel Random Numbers:
As Easy as 1, 2, 3, 2011) with the seed as key and (token id / 4, position) as counter. So a
request's tokens depend neither on its neighbours nor on its preemptions.
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

NUM_ROUNDS = 7  # of Philox: the fewest that pass BigCrush, by the paper's table 2
TILE = 4096  # logits that a program takes
LOW32 = 0xFFFFFFFF


@triton.jit
def _log(x, APPROX: tl.constexpr):
    # Triton's interpreter has no fast logarithm.
    return libdevice.fast_logf(x) if APPROX else tl.log(x)


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
    """A program finds the best score of one tile of one row, and its token id."""
    launch_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    tile = tl.program_id(1)
    # A Philox call gives the noise of four token ids that begin at a multiple of 4. So tiles begin
    # there, too, although the part of the vocabulary that starts with first_id may not.
    token_id = first_id // 4 * 4 + tile * BLOCK + tl.arange(0, BLOCK)
    column = token_id - first_id
    mask = (column >= 0) & (column < vocab_size)
    row_ptr = logits_ptr + row.to(tl.int64) * stride_logits
    scores = tl.load(row_ptr + column, mask=mask, other=-float("inf")).to(tl.float32)
    scores = tl.where(scores == scores, scores, float("inf"))  # a NaN, which a maximum may lose
    temperature = tl.load(temperatures_ptr + row)
    if thresholds_ptr is not None:
        scores = tl.where(scores >= tl.load(thresholds_ptr + row), scores, -float("inf"))
        # A tile where nothing is left needs no noise.
        any_left = tl.max(scores, axis=0) > -float("inf")
        temperature = tl.where(any_left, temperature, 0.0)
    if temperature > 0:
        # Call number c makes four words, for the token ids 4 c to 4 c + 3.
        counter = (first_id // 4 + tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.int32)
        zero = counter * 0
        position = zero + tl.load(positions_ptr + row).to(tl.int32)
        b0, b1, b2, b3 = tl.philox(tl.load(seeds_ptr + row), counter, position, zero, zero, ROUNDS)
        bits = tl.interleave(tl.interleave(b0, b2), tl.interleave(b1, b3))
        uniform = ((bits >> 8).to(tl.float32) + 0.5) * (1.0 / 16777216.0)  # never 0 or 1
        # The exponential noise is -log(1 - uniform), and the Gumbel noise is -log(exponential). The
        # largest Gumbel noise, which decides, comes from the smallest exponentials. For those the
        # fast logarithm is too coarse, and a Taylor series takes its place.
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
    """A program finds the best tile of one row."""
    launch_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0)
    tile = tl.arange(0, BLOCK)
    values = tl.load(
        values_ptr + row * num_tiles + tile, mask=tile < num_tiles, other=-float("inf")
    )
    value, best = tl.max(values, axis=0, return_indices=True)
    best_id = tl.load(ids_ptr + row * num_tiles + best)
    is_finite = (value > -float("inf")) & (value < float("inf"))
    tl.store(value_ptr + row, value)
    tl.store(id_ptr + row, tl.where(is_finite, best_id, -1))


def gumbel_argmax(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row; at temperature 0 the most likely one, the lowest id among equals.

    Returns the best scores, `[n]` float32, which ranks with other parts of the vocabulary can
    compare, and their token ids, `[n]` int64. Where a score is not finite, because logits are NaN
    or infinite, the token id is -1.

    logits: `[n, vocab]` bf16, fp16 or fp32, rows contiguous: of the token ids from first_id on.
    temperatures: `[n]` float32.
    seeds: `[n]` int64, not negative.
    positions: `[n]` int64, of the token before the one that is drawn.
    thresholds: `[n]` float32; logits below are not drawn. None: all may be.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    tile_size = min(TILE, max(next_power_of_2(vocab_size), 16))
    num_tiles = triton.cdiv(vocab_size + first_id % 4, tile_size)
    tile_values = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    tile_ids = torch.empty_like(tile_values, dtype=torch.int64)
    _gumbel_argmax_kernel[(num_rows, num_tiles)](
        logits,
        logits.stride(0),
        temperatures,
        seeds,
        positions,
        thresholds,
        tile_values,
        tile_ids,
        vocab_size,
        first_id,
        ROUNDS=NUM_ROUNDS,
        BLOCK=tile_size,
        APPROX=logits.is_cuda,
        **pdl_options(),
    )
    values = tile_values.new_empty(num_rows)
    ids = tile_ids.new_empty(num_rows)
    _best_tile_kernel[(num_rows,)](
        tile_values,
        tile_ids,
        values,
        ids,
        num_tiles,
        BLOCK=next_power_of_2(num_tiles),
        **pdl_options(),
    )
    return values, ids


def gumbel_argmax_torch(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int = 0,
    thresholds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gumbel_argmax` in PyTorch: the reference, and the CPU's path."""
    vocab_size = logits.shape[1]
    scores = logits.float()
    if thresholds is not None:
        scores = scores.masked_fill(scores < thresholds.unsqueeze(1), -float("inf"))
    if temperatures.any():
        last_counter = -(-(first_id + vocab_size) // 4)  # exclusive
        counters = torch.arange(first_id // 4, last_counter, device=logits.device)
        words = philox_torch(seeds[:, None], counters, positions[:, None]).flatten(1)
        skipped = first_id % 4  # the first counter's words for token ids before first_id
        bits = words[:, skipped : skipped + vocab_size]
        uniform = ((bits >> 8).float() + 0.5) * (1.0 / 16777216.0)  # never 0 or 1
        noise = -torch.log(-torch.log1p(-uniform))
        divisors = temperatures.unsqueeze(1)
        scores = torch.where(divisors > 0, scores / divisors + noise, scores)
    values, indices = scores.max(dim=1)  # of a row with a NaN that is NaN
    return values, torch.where(values.isfinite(), indices + first_id, -1)


def philox_torch(seeds: Tensor, c0: Tensor, c1: Tensor) -> Tensor:
    """Return the words of Philox4x32 with key `seeds` and counter (c0, c1, 0, 0).

    The arguments are int64, and broadcast. The result is `[..., 4]` int64, of which each number is
    a word of 32 bits.
    """
    k0 = seeds & LOW32
    k1 = (seeds >> 32) & LOW32
    c0, c1 = torch.broadcast_tensors(c0 & LOW32, c1 & LOW32)
    c2 = torch.zeros_like(c0)
    c3 = torch.zeros_like(c0)
    for _ in range(NUM_ROUNDS):
        # A product has 64 bits without a sign, but int64 has a sign, which `>>` would copy into the
        # upper half: `& LOW32` removes it.
        product_a = c0 * 0xD2511F53
        product_b = c2 * 0xCD9E8D57
        high_a = (product_a >> 32) & LOW32
        high_b = (product_b >> 32) & LOW32
        c0 = high_b ^ c1 ^ k0
        c1 = product_b & LOW32
        c2 = high_a ^ c3 ^ k1
        c3 = product_a & LOW32
        k0 = (k0 + 0x9E3779B9) & LOW32
        k1 = (k1 + 0xBB67AE85) & LOW32
    return torch.stack((c0, c1, c2, c3), dim=-1)
