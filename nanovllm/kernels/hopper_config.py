"""How `hopper_gemm` divides its work. The numbers were measured on an H100."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from nanovllm.kernels._gluon import CONSUMER_ROWS, TILE_ROWS

MAX_HOPPER_TOKENS = 2047  # above, dequantising the weight for cuBLAS costs less than it saves
BLOCK = 128  # columns of a stage
MAX_STAGES = 16
SCRATCH_BYTES = 6 << 10  # of shared memory, for what is not a stage
RESERVED_BYTES = 1 << 10  # of a multiprocessor's shared memory, by each program
# Up to so many tokens in a tile a program leaves room on its multiprocessor for a second one: while
# one of them converts or waits, the other multiplies. Above, the sums take all registers.
MAX_SHARED_TOKENS = 64
MAX_SPLITS = 8
# Microseconds that one block of a tile takes, by the tile's tokens; up to 64 of them beside another
# program.
BLOCK_TIMES = {16: 1.0, 32: 1.03, 64: 1.1, 128: 0.87, 256: 1.41}
TILE_TIME = 2.0  # in blocks: filling the ring, and writing the sums
READ_RATE = 2.4e6  # bytes of the weight that all programs together read in a microsecond
SUMS_RATE = 1.8e6  # and bytes of partial sums that they write and the reader reads
SPLIT_TIME = 0.3  # microseconds that one more partial sum takes whatever its size


@dataclass(frozen=True, slots=True)
class HopperGemmConfig:
    """The tiles of `hopper_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile: a power of two from 16 to 256
    splits: int  # of the inner dimension
    num_stages: int  # blocks of 128 columns that are on their way
    rows: int = TILE_ROWS  # of the weight in a tile; 64: both consumers have the same rows
    programs: int = 1  # on a multiprocessor

    @property
    def registers(self) -> int:
        """Of a thread, on average. A program has 384 threads, a multiprocessor 65,536 registers.

        One program takes nearly all of them with 168 a thread, and two do with 80. With 64 even the
        small kernels before and after find room beside two programs.
        """
        if self.tokens > MAX_SHARED_TOKENS:
            return 168
        return 64 if self.tokens <= 32 else 80


@lru_cache(maxsize=1024)  # without a CUDA graph, each layer of a step asks again
def hopper_gemm_config(
    num_tokens: int,
    out_size: int,
    in_size: int,
    weight_bits: int,
    num_multiprocessors: int,
    shared_memory: int,
    reader_sums: bool = True,
    is_gated: bool = False,
) -> HopperGemmConfig:
    """Choose the tiles and splits that should take the least time.

    shared_memory: bytes that a program may use.
    reader_sums: whether the kernel that reads the product adds up partial sums. Otherwise there is
        one of them, as an addition of its own would cost what splitting gains.
    is_gated: whether the activation is applied. As it takes whole sums, there is one of them, too.
    """
    blocks = -(-in_size // BLOCK)
    max_splits = 1
    if reader_sums and not is_gated:
        max_splits = min(blocks, MAX_SPLITS)
    reading = out_size * in_size * weight_bits / 8 / READ_RATE
    adding = SPLIT_TIME + num_tokens * out_size * 2 * 2 / SUMS_RATE
    best_time = float("inf")
    for tile in _tiles(num_tokens, weight_bits, shared_memory, is_gated):
        tiles = -(-out_size // tile.rows) * -(-num_tokens // tile.tokens)
        for splits in range(1, max_splits + 1):
            rounds = -(-tiles * splits // (tile.programs * num_multiprocessors))
            length = -(-blocks // splits) + TILE_TIME
            multiplying = rounds * length * BLOCK_TIMES[tile.tokens]
            time = max(multiplying, reading) + splits * adding
            if time < best_time:
                best_time = time
                best = replace(tile, splits=splits)
    return best


def _tiles(
    num_tokens: int, weight_bits: int, shared_memory: int, is_gated: bool
) -> Iterator[HopperGemmConfig]:
    """The tiles to choose from, with one split each."""
    for tokens in BLOCK_TIMES:
        is_last = tokens >= num_tokens
        rows = TILE_ROWS
        programs = 2 if tokens <= MAX_SHARED_TOKENS else 1
        if is_gated and weight_bits == 8 and tokens == 16:
            # The weight takes long to read. Twice as many tiles of half the size are shared more
            # evenly by the multiprocessors, which is worth more than a second program.
            rows = CONSUMER_ROWS
            programs = 1
        budget = (shared_memory - (programs - 1) * RESERVED_BYTES) // programs
        stage_bytes = BLOCK * (2 * tokens + rows * weight_bits // 8)
        scratch_bytes = SCRATCH_BYTES
        if rows < TILE_ROWS:
            scratch_bytes += 4 * rows * tokens  # what one consumer hands to the other
        num_stages = min(MAX_STAGES, (budget - scratch_bytes) // stage_bytes)
        # With two stages the tensor cores wait. A smaller tile converts the weight more often.
        if num_stages >= 3 and (is_last or tokens >= 64):
            yield HopperGemmConfig(tokens, 1, num_stages, rows, programs)
        if is_last:
            break
