"""How the GEMVs of FP8 and INT4 weights divide their work.

The rules were measured on an H100 with the shapes of Qwen3-8B and Qwen3-0.6B. The loads of all
threads on a multiprocessor are on their way together, so these must be many bytes, but registers
end at 128 for each of 512 threads: for their columns of x, and a tile of the weight.
"""

from dataclasses import dataclass

from nanovllm.kernels._triton import next_power_of_2

WARPS_PER_MULTIPROCESSOR = 16
MAX_TILE_WORDS = 32  # that a thread has in registers
MAX_ROWS = 8  # as many products as `sum_threads` adds up at most


@dataclass(frozen=True, slots=True)
class PackedGemvConfig:
    """How a GEMV of FP8 or INT4 weights divides the work; the result does not depend on it."""

    rows: int  # of a tile, a power of two; of the gate and of up as many each; 8 at most in all
    words: int  # of a row, 4 bytes each, that a thread reads at a time: 2 or 4
    warps: int  # of a program
    programs: int  # on a multiprocessor


def packed_gemv_config(
    in_size: int, row_words: int, is_gated: bool, thread_columns: int, max_words: int = 4
) -> PackedGemvConfig:
    """Choose a configuration.

    row_words: words of 4 bytes in a row of the weight.
    thread_columns: at most, whose x a thread has in its registers.
    max_words: 2 or 4, that a thread reads at a time at most. It is 2 anyway where 4 for each thread
        would not come out even with a row, so that some loads would be masked.
    """
    warps = min(16, next_power_of_2(-(-in_size // (32 * thread_columns))))
    threads = 32 * warps
    words = max_words
    if row_words % (4 * threads) != 0:
        words = 2
    pieces = -(-row_words // (words * threads))
    rows = MAX_ROWS
    while rows > 2 and rows * pieces * words > MAX_TILE_WORDS:
        rows //= 2
    return PackedGemvConfig(
        rows=rows // 2 if is_gated else rows,  # each output needs two rows of the weight
        words=words,
        warps=warps,
        programs=WARPS_PER_MULTIPROCESSOR // warps,
    )
