"""The arithmetic of GEMVs whose weights are in FP8 or INT4: 32-bit words of several numbers.

A thread reads 8 or 16 bytes of a row at a time, so that a warp reads them from end to end, and
takes the numbers out of its words in registers. Reading a weight of half or a quarter of the bytes
leaves half or a quarter of the time for each number: what counts is instructions.

All tensors are `[threads, words]`, several of them instead of one with more axes. Of a tensor with
several axes of which only the last is contiguous in memory, Triton 3.6 lays a warp's threads along
the first axes and Triton 3.9 along the last ones but one: with one of them a warp reads 8 bytes
here and 8 there, and takes twice as long.

**FP8.** One conversion makes two numbers of 16 bits, another one of 32; the third instruction
multiplies and adds.

**INT4.** Nothing is converted. Four bits in the mantissa of a float32, under the exponent of 1.0,
*are* a number: 1 + n / 16 in its upper four bits, 1 + n / 256 in the four below, and so on. One
operation masks the bits and sets the exponent. The power of two is multiplied into x beforehand
(`POWERS`), and what is too much is the same for all rows, so it is subtracted from a thread's sum:

    sum(scale (n - zero) x) = scale (sum((1 + n / power) (power x)) - sum(power x) - zero sum(x))

The sums on the right are computed once. With powers of 4096 the subtraction leaves 12 bits less of
a float32's 24, still more than the inputs have; where x is in float32, each 1 is subtracted by
itself instead.
"""

# mypy: disable-error-code="assignment"

from torch import Tensor

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.packed_input import input_sums, scaled_inputs
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


@triton.jit
def load_words(ptr, first_row, out_size, thread, is_tile, T: tl.constexpr):
    """Load a tile that a step reads once. The L2 cache had better keep K and V, which may fit.

    ptr: of the matrix. first_row: of the tile; rows from `out_size` on are read as the last one.
    thread: `[threads]`. is_tile: `[threads]`, all True or all False: nothing is loaded.
    """
    ROWS: tl.constexpr = T.rows
    HALVES: tl.constexpr = T.halves
    PIECES: tl.constexpr = T.pieces
    WORDS: tl.constexpr = T.words
    words = ()
    for row in tl.static_range(ROWS):
        for half in tl.static_range(HALVES):
            matrix_row = tl.minimum(first_row + row, out_size - 1) + half * out_size
            for piece in tl.static_range(PIECES):
                word = (piece * T.threads + thread[:, None]) * WORDS + tl.arange(0, WORDS)[None, :]
                words += (_load_row_words(ptr, matrix_row.to(tl.int64), word, is_tile, T),)
    return words


@triton.jit
def _load_row_words(ptr, row, word, is_tile, T: tl.constexpr):
    """Load words `[threads, words]` of a row."""
    mask = is_tile[:, None]
    if T.row_words % (T.threads * T.words) != 0:
        mask = mask & (word < T.row_words)
    if T.has_whole_words:
        ptrs = ptr.to(tl.pointer_type(tl.int32)) + row * T.row_words + word
        # Without numbers to put in their places, loads that are masked need no instructions more.
        # Whatever an INT4 word holds is finite, and x is 0 there; an FP8 number could be NaN.
        if T.format == "int4" or T.row_words % (T.threads * T.words) == 0:
            return tl.load(ptrs, mask=mask, eviction_policy="evict_first")
        else:
            return tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first")
    else:
        byte_ptr = ptr.to(tl.pointer_type(tl.uint8)) + row * T.in_size
        words = tl.zeros(word.shape, tl.int32)
        for byte in tl.static_range(4):
            column = word * 4 + byte
            in_row = is_tile[:, None] & (column < T.in_size)
            words |= tl.load(byte_ptr + column, mask=in_row, other=0).to(tl.int32) << 8 * byte
        return words


@triton.jit
def load_scales(ptr, first_row, out_size, thread, is_tile, T: tl.constexpr):
    """Load a tile's scales, or zero points: `[threads]` for each row, half, piece and step, or one
    number for each row and half, if a row has one.

    Of rows that have the same ones they are loaded once. The arguments are those of `load_words`.
    """
    ROWS: tl.constexpr = T.scale_rows
    HALVES: tl.constexpr = T.halves
    PIECES: tl.constexpr = T.pieces if T.has_grains else 0
    STEPS: tl.constexpr = T.steps
    scales = ()
    for row in tl.static_range(ROWS):
        for half in tl.static_range(HALVES):
            matrix_row = tl.minimum(first_row + row, out_size - 1) + half * out_size
            row_ptr = ptr + (matrix_row // T.row_grain).to(tl.int64) * T.grains
            if not T.has_grains:
                scales += (tl.load(row_ptr),)
            for piece in tl.static_range(PIECES):
                column = first_column(piece * T.threads + thread, T)
                for step in tl.static_range(STEPS):
                    step_column = column + step * (128 // STEPS)
                    grain = tl.minimum(step_column // T.column_grain, T.grains - 1)
                    scales += (tl.load(row_ptr + grain, mask=is_tile),)
    return scales


# --- the product ---


@triton.jit
def _unpack(word, one, T: tl.constexpr):
    """Return the numbers of words as tensors of float32 of the same shape, one for each place.

    one: ONE. It is an argument since the compiler makes two operations of mask and exponent if it
        knows both.
    """
    if T.format == "int4":
        low = word << 11
        high = word >> 9
        return (
            _mantissa(low & 0x007800, one, T),
            _mantissa(low & 0x078000, one, T),
            _mantissa(low & 0x780000, one, T),
            _mantissa(word & 0x00F000, one, T),
            _mantissa(word & 0x0F0000, one, T),
            _mantissa(high & 0x007800, one, T),
            _mantissa(high & 0x078000, one, T),
            _mantissa(high & 0x780000, one, T),
        )
    elif T.has_assembly:
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
def _mantissa(bits, one, T: tl.constexpr):
    number = (bits | one).to(tl.float32, bitcast=True)
    if T.is_exact:
        number -= 1.0
    return number


@triton.jit
def _e4m3(word):
    """The number in the lowest 8 bits."""
    bits = (word & 0xFF).to(tl.uint8)
    return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def prepare_inputs(inputs, T: tl.constexpr):
    """Return the inputs as the numbers are multiplied with them, and, for INT4, a thread's sums of
    them: before, and after they were multiplied with `POWERS`.
    """
    if T.format == "int4":
        scaled = scaled_inputs(inputs, T)
        return scaled, input_sums(inputs, T), input_sums(scaled, T)
    else:
        return inputs, (), ()


@triton.jit
def multiply_words(words, scales, zeros, inputs, one, T: tl.constexpr):
    """Return what each thread has of the product, `[threads]` for each row and half.

    words, scales, zeros: a tile's; zeros are empty without zero points. inputs: `prepare_inputs`.
    """
    scaled, sums, scaled_sums = inputs
    COUNT: tl.constexpr = T.rows * T.halves
    SCALES: tl.constexpr = T.scale_rows * T.halves
    PIECES: tl.constexpr = T.pieces
    STEPS: tl.constexpr = T.steps
    NUMBERS: tl.constexpr = T.numbers
    products = ()
    for row in tl.static_range(COUNT):
        product = tl.zeros([words[0].shape[0]], tl.float32)
        partial = tl.zeros(words[0].shape, tl.float32)
        for piece in tl.static_range(PIECES):
            numbers = _unpack(words[row * PIECES + piece], one, T)
            for step in tl.static_range(STEPS):
                if T.has_grains:
                    partial = tl.zeros(words[0].shape, tl.float32)
                for number in tl.static_range(NUMBERS):
                    if number % 4 * STEPS // 4 == step:
                        x = scaled[piece * NUMBERS + number]
                        partial = tl.fma(numbers[number], x, partial)
                if T.has_grains:
                    grain_sum = tl.sum(partial, axis=1)
                    if T.format == "int4":
                        zero = T.symmetric_zero
                        if len(zeros) > 0:
                            zero = zeros[(row * PIECES + piece) * STEPS + step].to(tl.float32)
                        if not T.is_exact:
                            grain_sum -= scaled_sums[piece * STEPS + step]
                        grain_sum -= zero * sums[piece * STEPS + step]
                    scale = scales[(row % SCALES * PIECES + piece) * STEPS + step]
                    product = tl.fma(grain_sum, scale.to(tl.float32), product)
        if not T.has_grains:
            product = tl.sum(partial, axis=1) * scales[row % SCALES]
        products += (product,)
    return products
