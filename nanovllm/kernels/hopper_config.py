"""How `hopper_gemm` divides its work. The numbers were measured on an H100."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from nanovllm.kernels._gluon import TILE_ROWS

MAX_HOPPER_TOKENS = 2047  # above, dequantising the weight for cuBLAS costs less than it saves
BLOCK = 128  # columns of a stage
MAX_STAGES = 8
SCRATCH_BYTES = 6 << 10  # of shared memory, for what is not a stage
# Microseconds for one block of a tile, by its tokens. Those of few are spent waiting.
BLOCK_TIMES = {16: 0.55, 32: 0.58, 64: 0.66, 128: 0.87, 256: 1.41}
TILE_TIME = 2.0  # in blocks: filling the ring, and writing the sums
SPLIT_TIME = 0.25  # in blocks: the reader has one more partial sum


@dataclass(frozen=True, slots=True)
class HopperGemmConfig:
    """The tiles of `hopper_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile: a power of two from 16 to 256
    splits: int  # of the inner dimension
    num_stages: int  # blocks of 128 columns that are on their way
    early: bool = True
    registers: int = 168
    programs: int = 1
    rows: int = 128


@lru_cache(maxsize=1024)  # without a CUDA graph, each layer of a step asks again
def hopper_gemm_config(
    num_tokens: int,
    out_size: int,
    in_size: int,
    weight_bits: int,
    num_multiprocessors: int,
    shared_memory: int,
    reader_sums: bool = True,
) -> HopperGemmConfig:
    """Choose the tiles and splits that should take the least time.

    shared_memory: bytes that a program may use.
    reader_sums: whether the kernel that reads the product adds up partial sums. Otherwise there is
        one of them, as an addition of its own would cost what splitting gains.
    """
    row_tiles = -(-out_size // TILE_ROWS)
    blocks = -(-in_size // BLOCK)
    best_time = float("inf")
    for tokens, num_stages in _tiles(num_tokens, weight_bits, shared_memory):
        tiles = row_tiles * -(-num_tokens // tokens)
        for splits in range(1, min(blocks, 16) + 1 if reader_sums else 2):
            rounds = -(-tiles * splits // num_multiprocessors)
            length = -(-blocks // splits) + TILE_TIME
            time = (rounds * length + splits * SPLIT_TIME) * BLOCK_TIMES[tokens]
            if time < best_time:
                best_time = time
                best = HopperGemmConfig(tokens, splits, num_stages)
    return best


def _tiles(num_tokens: int, weight_bits: int, shared_memory: int) -> Iterator[tuple[int, int]]:
    """The tokens and stages of the tiles to choose from."""
    for tokens in BLOCK_TIMES:
        stage_bytes = BLOCK * (2 * tokens + TILE_ROWS * weight_bits // 8)
        num_stages = min(MAX_STAGES, (shared_memory - SCRATCH_BYTES) // stage_bytes)
        is_last = tokens >= num_tokens
        # With two stages the tensor cores wait. A smaller tile converts the weight more often.
        if num_stages >= 3 and (is_last or tokens >= 64):
            yield tokens, num_stages
        if is_last:
            break
