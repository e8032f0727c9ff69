"""What a GEMV of FP8 or INT4 weights knows when it is compiled: which thread has which columns.

A row of the weight is read in *words* of 32 bits, and all threads of a program share it: thread 0
has the first 2 or 4 words, thread 1 those behind them, and so on. Where the row goes on behind the
last thread's words, the threads begin again: each such round is a *piece* of the row.

A word of an FP8 weight holds four neighbouring columns. One of an INT4 weight holds eight, in the
order of int4_layout.py. The first word of a block of 128 columns, for example, has

    bits       0..3   4..7   8..11   12..15   16..19   20..23   24..27   28..31
    number        0      1       2        3        4        5        6        7
    column        0     32      64       96        1       33       65       97

So a row of 4,096 INT4 columns is 512 words: one piece for 128 threads with 4 words each. Thread 0
has the columns 0 to 7, 32 to 39, 64 to 71 and 96 to 103.
"""

from dataclasses import dataclass

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.int4_layout import BLOCK, SYMMETRIC_ZERO, positions_per_group


@dataclass(frozen=True, slots=True)
class Tile:
    """The rows that a program multiplies at a time. A *grain* is what has a scale in common."""

    format: str  # "fp8" or "int4"
    in_size: int  # columns of the weight
    row_grain: int  # rows of a grain
    column_grain: int  # columns of a grain
    halves: int  # 2: the weight is a gate projection above an up projection, else 1
    rows: int  # a power of two; of gate and up as many each
    words: int  # of a row that a thread reads at a time: 2 or 4
    warps: int  # of a program
    has_assembly: bool = False  # FP8 only: numbers are converted by the GPU's instructions
    is_exact: bool = False  # INT4 only: x is in float32, so a number must lose none of its bits

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 32 * self.warps

    @property
    def numbers_per_word(self) -> int:
        """Columns of a word."""
        return 8 if self.format == "int4" else 4

    @property
    def row_words(self) -> int:
        """Words of a row; an INT4 row ends with a whole block of 128 columns."""
        if self.format == "int4":
            return -(-self.in_size // BLOCK) * (BLOCK // 8)
        return -(-self.in_size // 4)

    @property
    def has_whole_words(self) -> bool:
        """Whether each row starts with a word of its own. Otherwise it is read in bytes."""
        return self.format == "int4" or self.in_size % 4 == 0

    @property
    def pieces(self) -> int:
        """How many times the threads must read to have a whole row."""
        return -(-self.row_words // (self.threads * self.words))

    @property
    def has_grains(self) -> bool:
        """Whether a row has several scales, so that each thread's sums are multiplied with them.
        Otherwise the finished sum of the row is.
        """
        return self.format == "int4" or self.column_grain < self.in_size

    @property
    def grains_per_row(self) -> int:
        """Scales of a row."""
        return -(-self.in_size // self.column_grain)

    @property
    def grains_per_word(self) -> int:
        """Scales of a word: 1, 2 or 4, since its INT4 columns are 32 apart.

        Number n of a word belongs to the one with index `n % 4 * grains_per_word // 4`.
        """
        if self.format == "int4":
            return 4 // positions_per_group(self.column_grain, self.in_size)
        return 1

    @property
    def scale_rows(self) -> int:
        """How many rows of a tile have scales of their own: all, or one for all."""
        return 1 if self.row_grain % self.rows == 0 else self.rows

    @property
    def symmetric_zero(self) -> float:
        """The zero point of INT4 weights that are stored without one."""
        return float(SYMMETRIC_ZERO)


@triton.jit
def first_column(thread, TILE: tl.constexpr):
    """The column of the first number of a thread's words; thread: counted on through the pieces."""
    if TILE.format == "int4":
        number = thread * (2 * TILE.words)  # of 16 bits: int4_layout.py counts in these
        return number // 32 * 128 + number % 32
    else:
        return thread * (4 * TILE.words)
