"""How the kernels of FP8 weights divide their work, and up to where each is taken.

The numbers were measured on an H100, those of the GEMV in packed_config.py.
"""

from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.kernels._triton import next_power_of_2
from nanovllm.kernels.packed_config import PackedGemvConfig, packed_gemv_config

# Up to so many tokens the weight is converted in registers, and the input stays in 16 bits. Above,
# the tensor cores' time counts, which FP8 halves; where the input may not be quantised, converting
# in registers takes less than writing the weight in 16 bits and reading it again.
MAX_GEMM_TOKENS = 64
MAX_GEMM_TOKENS_ALONE = 512
# Hopper's tensor cores keep some 14 bits of a sum in FP8, unless they stop to add each 128 columns
# outside, which takes a tenth longer. Where products have either sign that changes 0.1% to 0.3% of
# the result (rounding x: 2.6%). But where all have the same, as if x were a row of the weight, the
# sum came out 5% too small with 4,096 columns, and 15% with 12,288. Beyond so many they do stop.
MAX_FAST_COLUMNS = 4096
MAX_BLOCK_COLUMNS = 128  # of a block that `fp8_scaled_gemm` multiplies with


def fp8_gemv_config(in_size: int, column_grain: int, is_gated: bool) -> PackedGemvConfig:
    """Choose tiles; what a thread reads at a time is of one grain."""
    has_whole_rows = column_grain == in_size
    max_words = 4 if has_whole_rows or column_grain % 16 == 0 else 2  # of four columns each
    row_words = -(-in_size // 4)
    return packed_gemv_config(in_size, row_words, is_gated, thread_columns=32, max_words=max_words)


@dataclass(frozen=True, slots=True)
class FP8GemmConfig:
    """The tiles of `fp8_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile: a power of two, at least 16
    rows: int  # of the weight in a tile
    chunk: int  # of the inner dimension; all of one grain
    splits: int  # of the inner dimension
    num_warps: int
    num_stages: int


def fp8_gemm_config(
    num_tokens: int,
    out_size: int,
    in_size: int,
    column_grain: int,
    num_multiprocessors: int,
    reader_sums: bool = True,
) -> FP8GemmConfig:
    """Choose tiles that give every multiprocessor some work.

    reader_sums: whether the kernel that reads the product adds up partial sums. Otherwise there is
        one of them, as an addition of its own would cost what splitting gains.
    """
    tokens = min(128, max(16, next_power_of_2(num_tokens)))
    chunk = 128 if column_grain == in_size else min(128, column_grain & -column_grain)
    tiles = -(-out_size // 64) * -(-num_tokens // tokens)
    splits = 1
    if reader_sums:
        splits = max(1, min(3 * num_multiprocessors // tiles, in_size // 512, 4))
    # Where there are many programs, the shared memory of a multiprocessor holds three.
    num_stages = {16: 6, 32: 4, 64: 4, 128: 3}[tokens]
    if tokens == 64 and tiles * splits > 2 * num_multiprocessors:
        num_stages = 3
    return FP8GemmConfig(tokens, 64, chunk, splits, num_warps=4, num_stages=num_stages)


@dataclass(frozen=True, slots=True)
class FP8ScaledGemmConfig:
    """The tiles of `fp8_scaled_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile
    rows: int  # of the weight in a tile
    splits: int  # of the inner dimension
    num_warps: int
    num_stages: int


class ScaledTile(NamedTuple):
    """A tile of `fp8_scaled_gemm` to choose, of 128 rows, and what it takes."""

    tokens: int
    num_stages: int
    block_time: float  # microseconds for 128 columns
    tile_blocks: float  # what is done once takes as long as so many times 128 columns


# With a scale for each row, and for each block. Fitted so that of Qwen3-8B's and 0.6B's layers with
# 96 to 256 tokens they choose what took least together with the kernels before and after. So the
# time of a large tile has a part for the reader of the splits.
ROW_TILES = (ScaledTile(64, 6, 0.34, 1.0), ScaledTile(128, 6, 0.46, 15.0))
BLOCK_TILES = (ScaledTile(64, 6, 0.50, 0.0), ScaledTile(128, 4, 0.67, 1.0))


def fp8_scaled_gemm_config(
    num_tokens: int,
    out_size: int,
    in_size: int,
    column_grain: int,
    num_multiprocessors: int,
    shared_memory: int,
    reader_sums: bool,
) -> FP8ScaledGemmConfig:
    """Choose tiles, and as many splits as give each multiprocessor one of them.

    shared_memory: bytes that a program may use. Blackwell's cards for desktops have 99 KB of them,
        less than half of what an H100 has; a kernel that asks for more cannot be launched.
    reader_sums: whether the kernel that reads the product adds up partial sums.
    """
    blocks = -(-in_size // 128)
    best_time = float("inf")
    for tile in ROW_TILES if column_grain == in_size else BLOCK_TILES:
        tiles = -(-num_tokens // tile.tokens) * -(-out_size // 128)
        splits = 1
        if reader_sums:
            splits = max(1, min(num_multiprocessors // tiles, in_size // 512, 4))
        rounds = -(-tiles * splits // num_multiprocessors)
        time = rounds * (-(-blocks // splits) + tile.tile_blocks) * tile.block_time
        if time < best_time:
            best_time = time
            num_stages = min(tile.num_stages, shared_memory // (128 * (tile.tokens + 128)))
            best = FP8ScaledGemmConfig(
                tokens=tile.tokens,
                rows=128,
                splits=splits,
                num_warps=tile.tokens // 16,
                num_stages=num_stages,
            )
    return best
