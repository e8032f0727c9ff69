"""What a GEMV of FP8 or INT4 weights multiplies them with: columns of x in registers."""

# mypy: disable-error-code="assignment"

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.packed_tile import first_column

# Of the numbers in a word of INT4, from the lowest bits to the highest: the power of two that a
# number in its place of the mantissa is divided by. The lowest three are shifted up together, the
# highest three down, and the two between them stay where they are.
POWERS = tl.constexpr((4096.0, 256.0, 16.0, 2048.0, 128.0, 4096.0, 256.0, 16.0))


@triton.jit
def load_input(ptr, order_ptr, thread, T: tl.constexpr):
    """Load x, or the norm's weight, in float32: what the numbers of a thread's words are multiplied
    with, `[threads, words]` for each piece and number.

    order_ptr: the column of x for each column of the weight, or None.
    """
    PIECES: tl.constexpr = T.pieces
    WORDS: tl.constexpr = T.words
    inputs = ()
    for piece in tl.static_range(PIECES):
        first = first_column(piece * T.threads + thread, T)[:, None]
        if T.format == "int4":
            column = first + tl.arange(0, 2 * WORDS)[None, :]
            x0, x4 = _split_pairs(_load_columns(ptr, order_ptr, column, T))
            x1, x5 = _split_pairs(_load_columns(ptr, order_ptr, column + 32, T))
            x2, x6 = _split_pairs(_load_columns(ptr, order_ptr, column + 64, T))
            x3, x7 = _split_pairs(_load_columns(ptr, order_ptr, column + 96, T))
            inputs += (x0, x1, x2, x3, x4, x5, x6, x7)
        else:
            # Eight numbers of 16 bits are what a thread loads at once. If it were to have sixteen
            # neighbours, Triton would give it eight here and eight elsewhere.
            column = first + tl.arange(0, 8)[None, :]
            even, odd = _split_pairs(_load_columns(ptr, order_ptr, column, T))
            x0, x2 = _split_pairs(even)
            x1, x3 = _split_pairs(odd)
            if WORDS == 4:
                even, odd = _split_pairs(_load_columns(ptr, order_ptr, column + 8, T))
                more0, more2 = _split_pairs(even)
                more1, more3 = _split_pairs(odd)
                x0 = _concatenate(x0, more0)
                x1 = _concatenate(x1, more1)
                x2 = _concatenate(x2, more2)
                x3 = _concatenate(x3, more3)
            inputs += (x0, x1, x2, x3)
    return inputs


@triton.jit
def _load_columns(ptr, order_ptr, column, T: tl.constexpr):
    in_row = column < T.in_size
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
def multiply_inputs(inputs, factors, T: tl.constexpr):
    """Multiply the inputs with others of as many."""
    COUNT: tl.constexpr = T.pieces * T.numbers
    products = ()
    for index in tl.static_range(COUNT):
        products += (inputs[index] * factors[index],)
    return products


@triton.jit
def scale_inputs(inputs, scale, T: tl.constexpr):
    """Multiply all inputs with the same scale."""
    COUNT: tl.constexpr = T.pieces * T.numbers
    scaled = ()
    for index in tl.static_range(COUNT):
        scaled += (inputs[index] * scale,)
    return scaled


@triton.jit
def sum_of_squares(inputs, T: tl.constexpr):
    """Return the sum over all threads."""
    COUNT: tl.constexpr = T.pieces * T.numbers
    squares = inputs[0] * inputs[0]
    for index in tl.static_range(1, COUNT):
        squares += inputs[index] * inputs[index]
    return tl.sum(tl.sum(squares, axis=1), axis=0)


@triton.jit
def scaled_inputs(inputs, T: tl.constexpr):
    """Return the inputs as the numbers of `_unpack` are multiplied with them."""
    if T.format != "int4":
        return inputs
    else:
        COUNT: tl.constexpr = T.pieces * T.numbers
        scaled = ()
        for index in tl.static_range(COUNT):
            scaled += (inputs[index] * POWERS[index % 8],)
        return scaled


@triton.jit
def input_sums(inputs, T: tl.constexpr):
    """Return a thread's sums of the inputs, `[threads]` for each piece and step; INT4 only."""
    PIECES: tl.constexpr = T.pieces
    STEPS: tl.constexpr = T.steps
    sums = ()
    for piece in tl.static_range(PIECES):
        for step in tl.static_range(STEPS):
            step_sum = tl.zeros(inputs[0].shape, tl.float32)
            for number in tl.static_range(8):
                if number % 4 * STEPS // 4 == step:
                    step_sum += inputs[piece * 8 + number]
            sums += (tl.sum(step_sum, axis=1),)
    return sums
