"""The arithmetic of GEMVs whose weights are in FP8 or INT4: 32-bit words of several numbers.

Which thread has which words of a row is in packed_tile.py. A thread reads 8 or 16 bytes at a time,
so that a warp reads a row from end to end, and takes the numbers out of its words in registers.
Reading a weight of half or a quarter of the bytes leaves half or a quarter of the time for each
number, so instructions are what counts.

All tensors are `[threads, words]`, several of them instead of one with more axes. Of a tensor with
several axes of which only the last is contiguous in memory, Triton 3.6 lays a warp's threads along
the first axes and Triton 3.9 along the last ones but one: with one of them a warp reads 8 bytes
here and 8 there, which is slow.

**FP8.** One instruction converts two numbers to fp16, another one each of them to float32, and a
third one multiplies and adds.

**INT4.** Nothing is converted. The bits of the float32 1.0 are an exponent, and a mantissa of 23
zero bits. Four bits n put into the mantissa make it 1 + n / power:

    mantissa bits    19..22   16..19   15..18   12..15   11..14
    power                16      128      256     2048     4096

So one operation masks four bits of a word and sets the exponent, and the word as it is, shifted up
by 11 and down by 9 brings all eight numbers to one of these places. x is multiplied with the power
beforehand (`POWERS`). Then each number has given its x once too often, which is the same for all
rows. It is subtracted from the sum of a thread, together with the zero point:

    sum(scale (n - zero) x) = scale (sum((1 + n / power) (power x)) - sum(power x) - zero sum(x))

The last two sums are computed once (`prepare_inputs`). They cost precision: a sum of `power x` is
up to 4096 times as large as the result, which leaves 12 of a float32's 24 bits, more than x has in
16 bits. If x is in float32, the 1 is subtracted from each number instead (`Tile.is_exact`).
"""

# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

from torch import Tensor

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.packed_tile import first_column

ONE = 0x3F800000  # the bits of the float32 1.0

# A word of FP8 ($4) becomes four numbers.
E4M3_ASSEMBLY = tl.constexpr("""{
    .reg .b16 low, high, a, b, c, d;
    .reg .b32 first, second;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 first, low;
    cvt.rn.f16x2.e4m3x2 second, high;
    mov.b32 {a, b}, first;
    mov.b32 {c, d}, second;
    cvt.f32.f16 $0, a;
    cvt.f32.f16 $1, b;
    cvt.f32.f16 $2, c;
    cvt.f32.f16 $3, d;
}""")


def has_assembly(x: Tensor) -> bool:
    """Whether the kernel runs on a GPU, and not in the interpreter."""
    return x.device.type == "cuda"


# --- the weight ---


class TileWeight(NamedTuple):
    """A tile of the weight in registers. Its rows are in order, the gate's and up's of a row next
    to each other; of each there is a tensor for every piece.
    """

    words: Any  # [threads, words] int32 each
    scales: Any  # [threads] for each grain of a word; one number, if the row has one scale
    zeros: Any  # zero points: the same as scales, or () without any


@triton.jit
def load_tile(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    first_row,
    out_size,
    thread,
    is_tile,
    TILE: tl.constexpr,
):
    """Load the rows of a tile: `TileWeight`. Rows from `out_size` on are read as the last one.

    words_ptr, scales_ptr, zeros_ptr: of the matrix; zeros_ptr may be None.
    first_row: of the tile. thread: `[threads]`.
    is_tile: `[threads]`, all True, or all False: there is no such tile, and nothing is loaded.
    """
    words = _load_words(words_ptr, first_row, out_size, thread, is_tile, TILE)
    scales = _load_scales(scales_ptr, first_row, out_size, thread, is_tile, TILE)
    zeros = ()
    if zeros_ptr is not None:
        zeros = _load_scales(zeros_ptr, first_row, out_size, thread, is_tile, TILE)
    return TileWeight(words, scales, zeros)


@triton.jit
def _load_words(ptr, first_row, out_size, thread, is_tile, TILE: tl.constexpr):
    ROWS: tl.constexpr = TILE.rows
    HALVES: tl.constexpr = TILE.halves
    PIECES: tl.constexpr = TILE.pieces
    WORDS: tl.constexpr = TILE.words
    words = ()
    for row in tl.static_range(ROWS):
        for half in tl.static_range(HALVES):
            matrix_row = tl.minimum(first_row + row, out_size - 1) + half * out_size
            for piece in tl.static_range(PIECES):
                first_word = (piece * TILE.threads + thread[:, None]) * WORDS
                word = first_word + tl.arange(0, WORDS)[None, :]
                words += (_load_row_words(ptr, matrix_row.to(tl.int64), word, is_tile, TILE),)
    return words


@triton.jit
def _load_row_words(ptr, row, word, is_tile, TILE: tl.constexpr):
    """Load words `[threads, words]` of a row. A step reads them once, so they are the first to go
    from the L2 cache, which had better keep K and V: those may fit.
    """
    mask = is_tile[:, None]
    if TILE.row_words % (TILE.threads * TILE.words) != 0:
        mask = mask & (word < TILE.row_words)
    if TILE.has_whole_words:
        ptrs = ptr.to(tl.pointer_type(tl.int32)) + row * TILE.row_words + word
        # Without `other`, a masked load needs no instruction to fill its registers, and leaves
        # anything in them. Of INT4 anything is a finite number, and x is 0 behind the row; an FP8
        # number could be NaN.
        if TILE.format == "int4" or TILE.row_words % (TILE.threads * TILE.words) == 0:
            return tl.load(ptrs, mask=mask, eviction_policy="evict_first")
        else:
            return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first")
    else:
        byte_ptr = ptr.to(tl.pointer_type(tl.uint8)) + row * TILE.in_size
        words = tl.zeros(word.shape, tl.int32)
        for byte in tl.static_range(4):
            column = word * 4 + byte
            in_row = is_tile[:, None] & (column < TILE.in_size)
            words |= tl.load(byte_ptr + column, mask=in_row, other=0).to(tl.int32) << 8 * byte
        return words


@triton.jit
def _load_scales(ptr, first_row, out_size, thread, is_tile, TILE: tl.constexpr):
    """Load a tile's scales, or its zero points, for each half, piece and grain of a word; of rows
    that have the same ones only once.
    """
    ROWS: tl.constexpr = TILE.scale_rows
    HALVES: tl.constexpr = TILE.halves
    PIECES: tl.constexpr = TILE.pieces if TILE.has_grains else 0
    GRAINS: tl.constexpr = TILE.grains_per_word
    scales = ()
    for row in tl.static_range(ROWS):
        for half in tl.static_range(HALVES):
            matrix_row = tl.minimum(first_row + row, out_size - 1) + half * out_size
            row_ptr = ptr + (matrix_row // TILE.row_grain).to(tl.int64) * TILE.grains_per_row
            if not TILE.has_grains:
                scales += (tl.load(row_ptr),)
            for piece in tl.static_range(PIECES):
                first = first_column(piece * TILE.threads + thread, TILE)
                for word_grain in tl.static_range(GRAINS):
                    column = first + word_grain * (128 // GRAINS)
                    grain = tl.minimum(column // TILE.column_grain, TILE.grains_per_row - 1)
                    scales += (tl.load(row_ptr + grain, mask=is_tile),)
    return scales


# --- the product ---


@triton.jit
def multiply_words(weight, inputs, one, TILE: tl.constexpr):
    """Return what each thread has of the product, `[threads]` for each row and half.

    weight: `TileWeight`. inputs: `Inputs`.
    one: ONE. It is an argument of the kernel, since the compiler makes two operations of mask and
        exponent if it knows both.
    """
    COUNT: tl.constexpr = TILE.rows * TILE.halves
    SCALES: tl.constexpr = TILE.scale_rows * TILE.halves
    PIECES: tl.constexpr = TILE.pieces
    GRAINS: tl.constexpr = TILE.grains_per_word
    NUMBERS: tl.constexpr = TILE.numbers_per_word
    products = ()
    for row in tl.static_range(COUNT):
        product = tl.zeros([weight.words[0].shape[0]], tl.float32)
        partial = tl.zeros(weight.words[0].shape, tl.float32)
        for piece in tl.static_range(PIECES):
            numbers = _unpack(weight.words[row * PIECES + piece], one, TILE)
            for grain in tl.static_range(GRAINS):
                if TILE.has_grains:
                    partial = tl.zeros(weight.words[0].shape, tl.float32)
                for number in tl.static_range(NUMBERS):
                    if number % 4 * GRAINS // 4 == grain:
                        x = inputs.columns[piece * NUMBERS + number]
                        partial = tl.fma(numbers[number], x, partial)
                if TILE.has_grains:
                    grain_sum = tl.sum(partial, axis=1)
                    if TILE.format == "int4":
                        zero = TILE.symmetric_zero
                        if len(weight.zeros) > 0:
                            zero = weight.zeros[(row * PIECES + piece) * GRAINS + grain]
                            zero = zero.to(tl.float32)
                        if not TILE.is_exact:
                            grain_sum -= inputs.scaled_sums[piece * GRAINS + grain]
                        grain_sum -= zero * inputs.sums[piece * GRAINS + grain]
                    scale = weight.scales[(row % SCALES * PIECES + piece) * GRAINS + grain]
                    product = tl.fma(grain_sum, scale.to(tl.float32), product)
        if not TILE.has_grains:
            product = tl.sum(partial, axis=1) * weight.scales[row % SCALES]
        products += (product,)
    return products


@triton.jit
def _unpack(word, one, TILE: tl.constexpr):
    """Take the numbers out of words: a float32 tensor of the words' shape for each number."""
    if TILE.format == "int4":
        low = word << 11
        high = word >> 9
        return (
            _mantissa(low & 0x007800, one, TILE),
            _mantissa(low & 0x078000, one, TILE),
            _mantissa(low & 0x780000, one, TILE),
            _mantissa(word & 0x00F000, one, TILE),
            _mantissa(word & 0x0F0000, one, TILE),
            _mantissa(high & 0x007800, one, TILE),
            _mantissa(high & 0x078000, one, TILE),
            _mantissa(high & 0x780000, one, TILE),
        )
    elif TILE.has_assembly:
        return tl.inline_asm_elementwise(
            E4M3_ASSEMBLY,
            "=f,=f,=f,=f,r",
            [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        return (_e4m3(word), _e4m3(word >> 8), _e4m3(word >> 16), _e4m3(word >> 24))


@triton.jit
def _mantissa(bits, one, TILE: tl.constexpr):
    """Return the number from 1 to 2 that has these bits of the mantissa."""
    number = (bits | one).to(tl.float32, bitcast=True)
    if TILE.is_exact:
        number -= 1.0
    return number


@triton.jit
def _e4m3(word):
    """Return the FP8 number in the lowest 8 bits."""
    bits = (word & 0xFF).to(tl.uint8)
    return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def sum_threads(products, COUNT: tl.constexpr):
    """Sum up 1, 2, 4 or 8 products `[threads]` over the threads: `[COUNT]`.

    They are joined first, so that one reduction, whose steps wait for each other, serves them all.
    """
    if COUNT == 1:
        return tl.sum(products[0][:, None], axis=0)
    elif COUNT == 2:
        return tl.sum(tl.join(products[0], products[1]), axis=0)
    elif COUNT == 4:
        four = _join_four(products[0], products[1], products[2], products[3])
        return tl.sum(four, axis=0)
    else:
        even = _join_four(products[0], products[2], products[4], products[6])
        odd = _join_four(products[1], products[3], products[5], products[7])
        return tl.sum(tl.reshape(tl.join(even, odd), [even.shape[0], 8]), axis=0)


@triton.jit
def _join_four(a, b, c, d):
    """`[threads]` each -> `[threads, 4]`"""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, [a.shape[0], 4])
