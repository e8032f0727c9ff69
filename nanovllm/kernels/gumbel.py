"""Sampling a token from logits in one pass: the Gumbel-max trick with counter-based noise.

`argmax(logits / T + g)` with independent standard Gumbel noise g draws exactly from `softmax(logits / T)`
(Gumbel, 1954; see Huijben et al., A Review of the Gumbel-max Trick, 2022), without ever forming the softmax.
The noise of a logit is a pure function of (request seed, position, token id): Philox4x32 (Salmon et al., Parallel
Random Numbers: As Easy as 1, 2, 3, 2011) with the seed as key and (token id, position) as counter. So a request's
tokens depend neither on its neighbours in the batch nor on how often it was preempted.
"""

import torch

from nanovllm.kernels._triton import next_power_of_2, tl, triton

NUM_ROUNDS = 7  # the fewest that pass BigCrush, by the paper's table 2
TILE = 4096


@triton.jit
def _gumbel_argmax_kernel(
    logits_ptr, stride_logits, temperatures_ptr, seeds_ptr, positions_ptr, values_ptr, indices_ptr,
    vocab_size, first_id, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.program_id(1)
    column = tile * BLOCK + tl.arange(0, BLOCK)
    mask = column < vocab_size
    scores = tl.load(logits_ptr + row.to(tl.int64) * stride_logits + column, mask=mask, other=-float("inf"))
    scores = scores.to(tl.float32)
    temperature = tl.load(temperatures_ptr + row)
    if temperature > 0:
        token_id = (column + first_id).to(tl.int32)
        zero = token_id * 0
        position = zero + tl.load(positions_ptr + row).to(tl.int32)
        bits, _, _, _ = tl.philox(tl.load(seeds_ptr + row), token_id, position, zero, zero, ROUNDS)
        uniform = ((bits >> 8).to(tl.float32) + 0.5) * (1.0 / 16777216.0)  # never 0 or 1
        scores = scores / temperature - tl.log(-tl.log(uniform))
        scores = tl.where(mask, scores, -float("inf"))
    value, index = tl.max(scores, axis=0, return_indices=True)
    out = row * tl.num_programs(1) + tile
    tl.store(values_ptr + out, value)
    tl.store(indices_ptr + out, (index + tile * BLOCK + first_id).to(tl.int64))


def gumbel_argmax(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, first_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row; at temperature 0, the most likely one.

    Args:
        logits: `[n, vocab]`, bf16, fp16 or fp32, rows contiguous; a tensor-parallel rank's part of the vocabulary.
        temperatures: `[n]` float32.
        seeds: `[n]` int64, not negative.
        positions: `[n]` int64, of the token that is drawn.
        first_id: token id of column 0.

    Returns:
        The winning score `[n]` float32 (comparable across ranks) and its token id `[n]` int64. Of equal scores the
        lowest id wins.
    """
    num_rows, vocab_size = logits.shape
    assert logits.stride(1) == 1
    block = min(TILE, max(next_power_of_2(vocab_size), 16))
    num_tiles = triton.cdiv(vocab_size, block)
    values = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    indices = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=logits.device)
    _gumbel_argmax_kernel[(num_rows, num_tiles)](
        logits, logits.stride(0), temperatures, seeds, positions, values, indices, vocab_size, first_id,
        ROUNDS=NUM_ROUNDS, BLOCK=block,
    )  # fmt: skip
    best = values.argmax(dim=1, keepdim=True)
    return values.gather(1, best).squeeze(1), indices.gather(1, best).squeeze(1)


def gumbel_argmax_torch(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, first_id: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in PyTorch: the reference, and the CPU's path. Same arguments and results as `gumbel_argmax`."""
    scores = logits.float()
    random_rows = temperatures.nonzero().squeeze(1)
    if len(random_rows):
        token_ids = torch.arange(first_id, first_id + logits.shape[1], device=logits.device).unsqueeze(0)
        bits = philox_torch(seeds[random_rows].unsqueeze(1), token_ids, positions[random_rows].unsqueeze(1))
        uniform = ((bits >> 8).float() + 0.5) * (1.0 / 16777216.0)
        noise = -torch.log(-torch.log(uniform))
        scores = scores.clone()
        scores[random_rows] = scores[random_rows] / temperatures[random_rows].unsqueeze(1) + noise
    values, indices = scores.max(dim=1)
    return values, indices + first_id


def philox_torch(seeds: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor) -> torch.Tensor:
    """First 32-bit word of Philox4x32 with key `seeds` and counter (c0, c1, 0, 0), as int64; inputs broadcast."""
    low32 = 0xFFFFFFFF
    k0, k1 = seeds & low32, (seeds >> 32) & low32
    c0, c1 = torch.broadcast_tensors(c0 & low32, c1 & low32)
    c2 = c3 = torch.zeros_like(c0)
    for _ in range(NUM_ROUNDS):
        # The products need 64 bits unsigned; int64 wraps, and the masks drop the sign that comes of it.
        product_a, product_b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product_b >> 32) & low32 ^ c1 ^ k0, product_b & low32
        c2, c3 = (product_a >> 32) & low32 ^ c3 ^ k1, product_a & low32
        k0, k1 = (k0 + 0x9E3779B9) & low32, (k1 + 0xBB67AE85) & low32
    return c0
