"""How the GEMVs of FP8 and INT4 weights divide their work."""

from dataclasses import dataclass

WARPS_PER_MULTIPROCESSOR = 16  # with two tiles and their columns of x they need all registers
MAX_TILE_WORDS = 48  # of a thread, which has two tiles


@dataclass(frozen=True, slots=True)
class PackedGemvConfig:
    """How a GEMV of FP8 or INT4 weights divides the work; the result does not depend on it."""

    rows: int  # of a tile, a power of two; of the gate and of up as many each; 8 at most in all
    words: int  # of a row, 4 bytes each, that a thread reads at a time: 2 or 4
    warps: int  # of a program
    programs: int  # on a multiprocessor


def packed_gemv_config(
    rows: int, in_size: int, row_words: int, is_gated: bool, max_words: int = 4
) -> PackedGemvConfig:
    """Choose so many threads that each has 32 to 63 columns of x in its registers.

    rows: of a tile. row_words: words of 4 bytes in a row.
    max_words: that a thread may read at a time.
    """
    warps = 1
    while warps < 16 and in_size >= 2048 * warps:
        warps *= 2
    words = max_words if row_words % (32 * warps * 4) == 0 else 2
    if is_gated:
        rows //= 2  # each output needs two rows of the weight
        while rows > 1 and 2 * rows * row_words > MAX_TILE_WORDS * 32 * warps:
            rows //= 2
    while rows > 1 and rows * row_words > MAX_TILE_WORDS * 32 * warps:
        rows //= 2
    return PackedGemvConfig(rows, words, warps, max(1, WARPS_PER_MULTIPROCESSOR // warps))
