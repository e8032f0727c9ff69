"""What the kernels of FP8 and INT4 GEMVs know of their work when they are compiled."""

from dataclasses import dataclass

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.int4_layout import SYMMETRIC_ZERO, positions_per_group


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program multiplies at a time, known when the kernel is compiled.

    Helpers below return a tuple of `[threads, words]` for all rows of a tile, the gate's and up's
    of a row next to each other, and for all pieces of a row.
    """

    format: str  # "fp8" or "int4"
    in_size: int
    row_grain: int  # rows of the weight that have a scale in common
    column_grain: int  # columns that have
    halves: int  # 2: the weight is a gate projection above an up projection, else 1
    rows: int  # a power of two; of gate and up as many each
    words: int  # of a row that a thread reads at a time, 2 or 4
    warps: int
    has_assembly: bool  # False in the interpreter
    is_exact: bool  # x is in float32

    @property
    def threads(self) -> int:
        """Threads of a program; all of them share each row."""
        return 32 * self.warps

    @property
    def numbers(self) -> int:
        """Numbers in a word."""
        return 8 if self.format == "int4" else 4

    @property
    def row_words(self) -> int:
        """Words in a row; an INT4 row ends with a whole block of 128 columns."""
        return -(-self.in_size // 128) * 16 if self.format == "int4" else -(-self.in_size // 4)

    @property
    def has_whole_words(self) -> bool:
        """Whether rows start at addresses of words."""
        return self.format == "int4" or self.in_size % 4 == 0

    @property
    def pieces(self) -> int:
        """How many times the threads must read to have a whole row."""
        return -(-self.row_words // (self.threads * self.words))

    @property
    def has_grains(self) -> bool:
        """Whether a row has several scales, with which a thread's sums are multiplied."""
        return self.format == "int4" or self.column_grain < self.in_size

    @property
    def grains(self) -> int:
        """Scales of a row."""
        return -(-self.in_size // self.column_grain)

    @property
    def scale_rows(self) -> int:
        """Rows of a tile that have scales of their own."""
        return 1 if self.row_grain % self.rows == 0 else self.rows

    @property
    def steps(self) -> int:
        """How many scales the numbers of a word have: the columns of INT4 words are 32 apart."""
        if self.format == "int4":
            return 4 // positions_per_group(self.column_grain, self.in_size)
        return 1

    @property
    def symmetric_zero(self) -> float:
        """The zero point of INT4 weights that are stored without one."""
        return float(SYMMETRIC_ZERO)


@triton.jit
def first_column(thread, T: tl.constexpr):
    """The column of the first number of a thread's words."""
    if T.format == "int4":
        number = thread * (2 * T.words)  # of 16 bits; see int4_layout.py
        return number // 32 * 128 + number % 32
    else:
        return thread * (4 * T.words)
