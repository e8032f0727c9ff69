"""What a GEMV of FP8 or INT4 weights multiplies them with: columns of x in registers.

Each thread keeps the columns of x that its words of a row hold, for all rows: see packed_tile.py.
They are a tuple of tensors, `[threads, words]` in float32, one for each piece of a row and number
of a word. With 2 pieces of INT4, entry 8 + 3 is what number 3 of each word of the second piece is
multiplied with.
"""

# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.packed_tile import first_column

# INT4 only: number n of a word is taken out as `1 + n / power` (see packed_words.py), so the column
# of x that it meets is multiplied with this power beforehand.
POWERS = tl.constexpr((4096.0, 256.0, 16.0, 2048.0, 128.0, 4096.0, 256.0, 16.0))


class Inputs(NamedTuple):
    """A thread's columns of x, and its sums of them, for `multiply_words`."""

    columns: Any  # as above; of INT4 multiplied with POWERS
    # INT4 only, `[threads]` for each piece and grain of a word:
    sums: Any  # of x
    scaled_sums: Any  # of `columns`


@triton.jit
def load_input(ptr, order_ptr, thread, TILE: tl.constexpr):
    """Load x, or the weight of the norm: the tuple described above.

    ptr: of x; or `[threads, 1]`, if threads have an x of their own. thread: `[threads]`.
    order_ptr: the column of x for each column of the weight, int32, or None.
    """
    PIECES: tl.constexpr = TILE.pieces
    WORDS: tl.constexpr = TILE.words
    columns = ()
    for piece in tl.static_range(PIECES):
        first = first_column(piece * TILE.threads + thread, TILE)[:, None]
        if TILE.format == "int4":
            column = first + tl.arange(0, 2 * WORDS)[None, :]
            x0, x4 = _split_pairs(_load_columns(ptr, order_ptr, column, TILE))
            x1, x5 = _split_pairs(_load_columns(ptr, order_ptr, column + 32, TILE))
            x2, x6 = _split_pairs(_load_columns(ptr, order_ptr, column + 64, TILE))
            x3, x7 = _split_pairs(_load_columns(ptr, order_ptr, column + 96, TILE))
            columns += (x0, x1, x2, x3, x4, x5, x6, x7)
        else:
            # Eight numbers of 16 bits are what a thread loads at once. Of sixteen in one load
            # Triton would give it eight, and eight of another thread's.
            column = first + tl.arange(0, 8)[None, :]
            even, odd = _split_pairs(_load_columns(ptr, order_ptr, column, TILE))
            x0, x2 = _split_pairs(even)
            x1, x3 = _split_pairs(odd)
            if WORDS == 4:
                even, odd = _split_pairs(_load_columns(ptr, order_ptr, column + 8, TILE))
                more0, more2 = _split_pairs(even)
                more1, more3 = _split_pairs(odd)
                x0 = _concatenate(x0, more0)
                x1 = _concatenate(x1, more1)
                x2 = _concatenate(x2, more2)
                x3 = _concatenate(x3, more3)
            columns += (x0, x1, x2, x3)
    return columns


@triton.jit
def _load_columns(ptr, order_ptr, column, TILE: tl.constexpr):
    """Load columns `[threads, n]` of x in float32; 0 behind the last one."""
    in_row = column < TILE.in_size
    if order_ptr is not None:
        column = tl.load(order_ptr + column, mask=in_row, other=0)
    return tl.load(ptr + column, mask=in_row, other=0.0).to(tl.float32)


@triton.jit
def _split_pairs(x):
    """Return the even and the odd columns of `[threads, n]`: `[threads, n / 2]` each."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def _concatenate(a, b):
    """Put `[threads, n]` behind `[threads, n]`: the registers keep their places."""
    pairs = tl.permute(tl.join(a, b), [0, 2, 1])
    return tl.reshape(pairs, [a.shape[0], 2 * a.shape[1]])


@triton.jit
def multiply_inputs(columns, factors, TILE: tl.constexpr):
    """Multiply each column with its own factor; both as `load_input` returns them."""
    COUNT: tl.constexpr = TILE.pieces * TILE.numbers_per_word
    products = ()
    for index in tl.static_range(COUNT):
        products += (columns[index] * factors[index],)
    return products


@triton.jit
def scale_inputs(columns, scale, TILE: tl.constexpr):
    """Multiply all columns of a thread with the same scale, `[threads, 1]`."""
    COUNT: tl.constexpr = TILE.pieces * TILE.numbers_per_word
    scaled = ()
    for index in tl.static_range(COUNT):
        scaled += (columns[index] * scale,)
    return scaled


@triton.jit
def sum_of_squares(columns, TILE: tl.constexpr):
    """Return the sum of the squares of x over all threads: one number."""
    COUNT: tl.constexpr = TILE.pieces * TILE.numbers_per_word
    squares = columns[0] * columns[0]
    for index in tl.static_range(1, COUNT):
        squares += columns[index] * columns[index]
    return tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def prepare_inputs(columns, TILE: tl.constexpr):
    """Compute once what `multiply_words` needs for every row: `Inputs`."""
    if TILE.format == "int4":
        scaled = _scale_by_powers(columns, TILE)
        return Inputs(scaled, _thread_sums(columns, TILE), _thread_sums(scaled, TILE))
    else:
        return Inputs(columns, (), ())


@triton.jit
def _scale_by_powers(columns, TILE: tl.constexpr):
    COUNT: tl.constexpr = TILE.pieces * 8
    scaled = ()
    for index in tl.static_range(COUNT):
        scaled += (columns[index] * POWERS[index % 8],)
    return scaled


@triton.jit
def _thread_sums(columns, TILE: tl.constexpr):
    """Return a thread's sums of INT4 columns: `[threads]` for each piece and grain of a word."""
    PIECES: tl.constexpr = TILE.pieces
    GRAINS: tl.constexpr = TILE.grains_per_word
    sums = ()
    for piece in tl.static_range(PIECES):
        for grain in tl.static_range(GRAINS):
            grain_sum = tl.zeros(columns[0].shape, tl.float32)
            for number in tl.static_range(8):
                if number % 4 * GRAINS // 4 == grain:
                    grain_sum += columns[piece * 8 + number]
            sums += (tl.sum(grain_sum, axis=1),)
    return sums
