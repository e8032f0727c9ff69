"""Draft: a GEMV for weights of several numbers a 32-bit word."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanovllm.kernels._triton import (
    device_limits,
    launch_next,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.gate_mul import gated
from nanovllm.kernels.int4_layout import SYMMETRIC_ZERO, Int4Weight, positions_per_group

ONE = 0x3F800000  # the bits of the float32 1.0

E4M3_ASSEMBLY = """{
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
}"""


@dataclass(frozen=True, slots=True)
class PackedGemvConfig:
    rows: int
    words: int  # of a row that a thread reads at a time
    warps: int
    programs: int  # a multiprocessor; 0: one for each tile
    stages: int = 0  # 0: the next tile is loaded into registers
    registers: int | None = None


@triton.jit
def _e4m3(word, K: tl.constexpr):
    bits = ((word >> 8 * K) & 0xFF).to(tl.uint8)
    return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def _unpack(word, one, FORMAT: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Return the numbers of each word, a tensor each."""
    if FORMAT == "int4":
        low = word << 15
        middle = word << 7
        high = word >> 1
        top = word >> 9
        return (
            ((low & 0x078000) | one).to(tl.float32, bitcast=True),
            ((low & 0x780000) | one).to(tl.float32, bitcast=True),
            ((middle & 0x078000) | one).to(tl.float32, bitcast=True),
            ((middle & 0x780000) | one).to(tl.float32, bitcast=True),
            ((high & 0x078000) | one).to(tl.float32, bitcast=True),
            ((high & 0x780000) | one).to(tl.float32, bitcast=True),
            ((top & 0x078000) | one).to(tl.float32, bitcast=True),
            ((top & 0x780000) | one).to(tl.float32, bitcast=True),
        )
    elif FORMAT == "e4m3":
        if ASSEMBLY is None:
            return _e4m3(word, 0), _e4m3(word, 1), _e4m3(word, 2), _e4m3(word, 3)
        else:
            return tl.inline_asm_elementwise(
                ASSEMBLY,
                "=f,=f,=f,=f,r",
                [word],
                dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
                is_pure=True,
                pack=1,
            )
    else:
        return (
            (word << 16).to(tl.float32, bitcast=True),
            (word & -65536).to(tl.float32, bitcast=True),
        )


@triton.jit
def _split_pairs(x):
    """`[threads, n]` -> the even and the odd ones."""
    SIZE: tl.constexpr = x.shape[1] // 2
    return tl.split(tl.reshape(x, [x.shape[0], SIZE, 2]))


@triton.jit
def _behind(a, b):
    """Two `[threads, n]` -> `[threads, 2 n]`"""
    pairs = tl.permute(tl.join(a, b), [0, 2, 1])
    return tl.reshape(pairs, [a.shape[0], 2 * a.shape[1]])


@triton.jit
def _load_columns(ptr, order_ptr, column, IN_SIZE: tl.constexpr):
    in_row = column < IN_SIZE
    if order_ptr is not None:
        column = tl.load(order_ptr + column, mask=in_row, other=0)
    return tl.load(ptr + column, mask=in_row, other=0.0).to(tl.float32)


@triton.jit
def _load_input(
    ptr, order_ptr, thread, WORDS: tl.constexpr, IN_SIZE: tl.constexpr, FORMAT: tl.constexpr
):
    """What the numbers of a thread's words are multiplied with, in the order of `_unpack`."""
    if FORMAT == "int4":
        number = thread * (2 * WORDS)
        first = number // 32 * 128 + number % 32
        column = first[:, None] + tl.arange(0, 2 * WORDS)[None, :]
        x0, x4 = _split_pairs(_load_columns(ptr, order_ptr, column, IN_SIZE))
        x1, x5 = _split_pairs(_load_columns(ptr, order_ptr, column + 32, IN_SIZE))
        x2, x6 = _split_pairs(_load_columns(ptr, order_ptr, column + 64, IN_SIZE))
        x3, x7 = _split_pairs(_load_columns(ptr, order_ptr, column + 96, IN_SIZE))
        return x0, x1, x2, x3, x4, x5, x6, x7
    elif FORMAT == "e4m3":
        if WORDS == 4:
            column = thread[:, None] * 16 + tl.arange(0, 8)[None, :]
            a_even, a_odd = _split_pairs(_load_columns(ptr, order_ptr, column, IN_SIZE))
            b_even, b_odd = _split_pairs(_load_columns(ptr, order_ptr, column + 8, IN_SIZE))
            a0, a2 = _split_pairs(a_even)
            a1, a3 = _split_pairs(a_odd)
            b0, b2 = _split_pairs(b_even)
            b1, b3 = _split_pairs(b_odd)
            return _behind(a0, b0), _behind(a1, b1), _behind(a2, b2), _behind(a3, b3)
        else:
            column = thread[:, None] * (4 * WORDS) + tl.arange(0, 4 * WORDS)[None, :]
            even, odd = _split_pairs(_load_columns(ptr, order_ptr, column, IN_SIZE))
            x0, x2 = _split_pairs(even)
            x1, x3 = _split_pairs(odd)
            return x0, x1, x2, x3
    else:
        column = thread[:, None] * (2 * WORDS) + tl.arange(0, 2 * WORDS)[None, :]
        return _split_pairs(_load_columns(ptr, order_ptr, column, IN_SIZE))


@triton.jit
def _load_words(
    ptr,
    first_output,
    out_size,
    thread,
    is_tile,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    THREADS: tl.constexpr,
    PIECES: tl.constexpr,
    IS_SAFE: tl.constexpr,
):
    """`[THREADS, WORDS]` for each row, half and piece"""
    words = ()
    for row in tl.static_range(ROWS):
        for half in tl.static_range(HALVES):
            matrix_row = tl.minimum(first_output + row, out_size - 1) + half * out_size
            row_ptr = ptr + matrix_row.to(tl.int64) * ROW_WORDS
            for piece in tl.static_range(PIECES):
                first = (piece * THREADS + thread) * WORDS
                word = first[:, None] + tl.arange(0, WORDS)[None, :]
                ptrs = row_ptr + word
                if (piece + 1) * THREADS * WORDS <= ROW_WORDS:
                    words += (tl.load(ptrs, mask=is_tile[:, None], eviction_policy="evict_first"),)
                elif IS_SAFE:
                    mask = is_tile[:, None] & (word < ROW_WORDS)
                    words += (tl.load(ptrs, mask=mask, eviction_policy="evict_first"),)
                else:
                    mask = is_tile[:, None] & (word < ROW_WORDS)
                    words += (tl.load(ptrs, mask=mask, other=0, eviction_policy="evict_first"),)
    return words


@triton.jit
def _load_scales(
    ptr,
    first_output,
    out_size,
    thread,
    is_tile,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    WORDS: tl.constexpr,
    THREADS: tl.constexpr,
    PIECES: tl.constexpr,
    FORMAT: tl.constexpr,
    IN_SIZE: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    STEPS: tl.constexpr,
):
    """`[THREADS]` for each row, half, piece and step"""
    GRAINS: tl.constexpr = (IN_SIZE + COLUMN_GRAIN - 1) // COLUMN_GRAIN
    scales = ()
    for row in tl.static_range(ROWS):
        for half in tl.static_range(HALVES):
            matrix_row = tl.minimum(first_output + row, out_size - 1) + half * out_size
            row_ptr = ptr + (matrix_row // ROW_GRAIN).to(tl.int64) * GRAINS
            for piece in tl.static_range(PIECES):
                for step in tl.static_range(STEPS):
                    if FORMAT == "int4":
                        number = (piece * THREADS + thread) * (2 * WORDS)
                        column = number // 32 * 128 + number % 32 + step * (128 // STEPS)
                    else:
                        column = (piece * THREADS + thread) * (4 * WORDS)
                    grain = tl.minimum(column // COLUMN_GRAIN, GRAINS - 1)
                    scales += (tl.load(row_ptr + grain, mask=is_tile),)
    return scales


@triton.jit(do_not_specialize=["one"])
def _packed_gemv_kernel(
    x_ptr,
    order_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    norm_ptr,
    eps,
    residual_ptr,
    out_ptr,
    out_size,
    one,
    IN_SIZE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    COLUMN_GRAIN: tl.constexpr,
    STEPS: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    THREADS: tl.constexpr = WARPS * 32
    PIECES: tl.constexpr = (ROW_WORDS + THREADS * WORDS - 1) // (THREADS * WORDS)
    HALVES: tl.constexpr = 1 if ACTIVATION is None else 2
    NUMBERS: tl.constexpr = 8 if FORMAT == "int4" else (4 if FORMAT == "e4m3" else 2)
    HAS_GRAINS: tl.constexpr = FORMAT == "int4" or COLUMN_GRAIN != IN_SIZE
    PER_STEP: tl.constexpr = 4 // STEPS
    IS_SAFE: tl.constexpr = FORMAT == "int4"
    # The rows of a tile that have scales of their own
    SCALE_ROWS: tl.constexpr = 1 if ROW_GRAIN % ROWS == 0 else ROWS
    num_tiles = tl.cdiv(out_size, ROWS)
    num_programs = tl.num_programs(0)
    thread = tl.arange(0, THREADS)
    tile = tl.program_id(0)
    is_tile = tl.zeros([THREADS], tl.int32) + tile < num_tiles
    words_ptr = weight_ptr.to(tl.pointer_type(tl.int32))
    # The first tile is loaded before the wait.
    words = _load_words(
        words_ptr,
        tile * ROWS,
        out_size,
        thread,
        is_tile,
        ROWS,
        HALVES,
        ROW_WORDS,
        WORDS,
        THREADS,
        PIECES,
        IS_SAFE,
    )
    scales = ()
    zeros = ()
    if HAS_GRAINS:
        scales = _load_scales(
            scales_ptr,
            tile * ROWS,
            out_size,
            thread,
            is_tile,
            SCALE_ROWS,
            HALVES,
            WORDS,
            THREADS,
            PIECES,
            FORMAT,
            IN_SIZE,
            ROW_GRAIN,
            COLUMN_GRAIN,
            STEPS,
        )
        if zeros_ptr is not None:
            zeros = _load_scales(
                zeros_ptr,
                tile * ROWS,
                out_size,
                thread,
                is_tile,
                SCALE_ROWS,
                HALVES,
                WORDS,
                THREADS,
                PIECES,
                FORMAT,
                IN_SIZE,
                ROW_GRAIN,
                COLUMN_GRAIN,
                STEPS,
            )
    norms = ()
    if norm_ptr is not None:
        for piece in tl.static_range(PIECES):
            piece_thread = piece * THREADS + thread
            norms += _load_input(norm_ptr, order_ptr, piece_thread, WORDS, IN_SIZE, FORMAT)
    launch_next(PDL)
    wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
    squares = tl.zeros([THREADS, WORDS], tl.float32)
    xs = ()
    x_sums = ()
    bases = ()
    for piece in tl.static_range(PIECES):
        inputs = _load_input(x_ptr, order_ptr, piece * THREADS + thread, WORDS, IN_SIZE, FORMAT)
        for step in tl.static_range(STEPS):
            if FORMAT == "int4":
                x_sum = tl.zeros([THREADS, WORDS], tl.float32)
                base = tl.zeros([THREADS, WORDS], tl.float32)
                for i in tl.static_range(8):
                    if i % 4 // PER_STEP == step:
                        x = inputs[i]
                        if norm_ptr is not None:
                            x = x * norms[piece * 8 + i]
                        x_sum += x
                        base += x * (16.0 if i % 2 == 1 else 256.0)
                x_sums += (tl.sum(x_sum, axis=1),)
                bases += (tl.sum(base, axis=1),)
        for i in tl.static_range(NUMBERS):
            x = inputs[i]
            if norm_ptr is not None:
                squares += x * x
                x *= norms[piece * NUMBERS + i]
            if FORMAT == "int4":
                x *= 16.0 if i % 2 == 1 else 256.0
            xs += (x,)
    factor = 1.0
    if norm_ptr is not None:
        factor = tl.rsqrt(tl.sum(tl.sum(squares, axis=1), axis=0) / IN_SIZE + eps)
    HAS_ZEROS: tl.constexpr = zeros_ptr is not None
    if STAGES == 0:
        while tile < num_tiles:
            next_tile = tile + num_programs
            is_tile = tl.zeros([THREADS], tl.int32) + next_tile < num_tiles
            next_words = _load_words(
                words_ptr,
                next_tile * ROWS,
                out_size,
                thread,
                is_tile,
                ROWS,
                HALVES,
                ROW_WORDS,
                WORDS,
                THREADS,
                PIECES,
                IS_SAFE,
            )
            next_scales = ()
            next_zeros = ()
            if HAS_GRAINS:
                next_scales = _load_scales(
                    scales_ptr,
                    next_tile * ROWS,
                    out_size,
                    thread,
                    is_tile,
                    SCALE_ROWS,
                    HALVES,
                    WORDS,
                    THREADS,
                    PIECES,
                    FORMAT,
                    IN_SIZE,
                    ROW_GRAIN,
                    COLUMN_GRAIN,
                    STEPS,
                )
                if zeros_ptr is not None:
                    next_zeros = _load_scales(
                        zeros_ptr,
                        next_tile * ROWS,
                        out_size,
                        thread,
                        is_tile,
                        SCALE_ROWS,
                        HALVES,
                        WORDS,
                        THREADS,
                        PIECES,
                        FORMAT,
                        IN_SIZE,
                        ROW_GRAIN,
                        COLUMN_GRAIN,
                        STEPS,
                    )
            _finish_tile(
                words,
                scales,
                zeros,
                xs,
                x_sums,
                bases,
                factor,
                tile,
                scales_ptr,
                bias_ptr,
                residual_ptr,
                out_ptr,
                out_size,
                one,
                ROWS,
                HALVES,
                THREADS,
                WORDS,
                PIECES,
                STEPS,
                SCALE_ROWS,
                NUMBERS,
                HAS_GRAINS,
                HAS_ZEROS,
                ROW_GRAIN,
                SYMMETRIC_ZERO,
                FORMAT,
                ASSEMBLY,
                ACTIVATION,
            )
            words = next_words
            scales = next_scales
            zeros = next_zeros
            tile = next_tile
    else:
        first_tile = tile
        next_tile = tile + num_programs
        is_tile = tl.zeros([THREADS], tl.int32) + next_tile < num_tiles
        next_scales = ()
        next_zeros = ()
        if HAS_GRAINS:
            next_scales = _load_scales(
                scales_ptr,
                next_tile * ROWS,
                out_size,
                thread,
                is_tile,
                SCALE_ROWS,
                HALVES,
                WORDS,
                THREADS,
                PIECES,
                FORMAT,
                IN_SIZE,
                ROW_GRAIN,
                COLUMN_GRAIN,
                STEPS,
            )
            if zeros_ptr is not None:
                next_zeros = _load_scales(
                    zeros_ptr,
                    next_tile * ROWS,
                    out_size,
                    thread,
                    is_tile,
                    SCALE_ROWS,
                    HALVES,
                    WORDS,
                    THREADS,
                    PIECES,
                    FORMAT,
                    IN_SIZE,
                    ROW_GRAIN,
                    COLUMN_GRAIN,
                    STEPS,
                )
        for tile in tl.range(first_tile + num_programs, num_tiles, num_programs, num_stages=STAGES):
            is_tile = tl.zeros([THREADS], tl.int32) + tile < num_tiles
            next_words = _load_words(
                words_ptr,
                tile * ROWS,
                out_size,
                thread,
                is_tile,
                ROWS,
                HALVES,
                ROW_WORDS,
                WORDS,
                THREADS,
                PIECES,
                IS_SAFE,
            )
            tile_scales = next_scales
            tile_zeros = next_zeros
            next_tile = tile + num_programs
            is_tile = tl.zeros([THREADS], tl.int32) + next_tile < num_tiles
            next_scales = ()
            next_zeros = ()
            if HAS_GRAINS:
                next_scales = _load_scales(
                    scales_ptr,
                    next_tile * ROWS,
                    out_size,
                    thread,
                    is_tile,
                    SCALE_ROWS,
                    HALVES,
                    WORDS,
                    THREADS,
                    PIECES,
                    FORMAT,
                    IN_SIZE,
                    ROW_GRAIN,
                    COLUMN_GRAIN,
                    STEPS,
                )
                if zeros_ptr is not None:
                    next_zeros = _load_scales(
                        zeros_ptr,
                        next_tile * ROWS,
                        out_size,
                        thread,
                        is_tile,
                        SCALE_ROWS,
                        HALVES,
                        WORDS,
                        THREADS,
                        PIECES,
                        FORMAT,
                        IN_SIZE,
                        ROW_GRAIN,
                        COLUMN_GRAIN,
                        STEPS,
                    )
            _finish_tile(
                next_words,
                tile_scales,
                tile_zeros,
                xs,
                x_sums,
                bases,
                factor,
                tile,
                scales_ptr,
                bias_ptr,
                residual_ptr,
                out_ptr,
                out_size,
                one,
                ROWS,
                HALVES,
                THREADS,
                WORDS,
                PIECES,
                STEPS,
                SCALE_ROWS,
                NUMBERS,
                HAS_GRAINS,
                HAS_ZEROS,
                ROW_GRAIN,
                SYMMETRIC_ZERO,
                FORMAT,
                ASSEMBLY,
                ACTIVATION,
            )
        tile = first_tile
        _finish_tile(
            words,
            scales,
            zeros,
            xs,
            x_sums,
            bases,
            factor,
            tile,
            scales_ptr,
            bias_ptr,
            residual_ptr,
            out_ptr,
            out_size,
            one,
            ROWS,
            HALVES,
            THREADS,
            WORDS,
            PIECES,
            STEPS,
            SCALE_ROWS,
            NUMBERS,
            HAS_GRAINS,
            HAS_ZEROS,
            ROW_GRAIN,
            SYMMETRIC_ZERO,
            FORMAT,
            ASSEMBLY,
            ACTIVATION,
        )


@triton.jit
def _finish_tile(
    words,
    scales,
    zeros,
    xs,
    x_sums,
    bases,
    factor,
    tile,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    out_size,
    one,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    THREADS: tl.constexpr,
    WORDS: tl.constexpr,
    PIECES: tl.constexpr,
    STEPS: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    NUMBERS: tl.constexpr,
    HAS_GRAINS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROW_GRAIN: tl.constexpr,
    SYMMETRIC_ZERO: tl.constexpr,
    FORMAT: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    PER_STEP: tl.constexpr = 4 // STEPS
    output = tile * ROWS + tl.arange(0, ROWS)
    is_output = output < out_size
    last = tl.minimum(output, out_size - 1)
    if not HAS_GRAINS and scales_ptr is not None:
        which = tl.arange(0, HALVES * ROWS)
        row = tl.minimum(tile * ROWS + which // HALVES, out_size - 1)
        row_scale = tl.load(scales_ptr + (row + which % HALVES * out_size) // ROW_GRAIN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + last).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + last).to(tl.float32)
    sums = ()
    for row in tl.static_range(ROWS * HALVES):
        total = tl.zeros([THREADS], tl.float32)
        products = tl.zeros([THREADS, WORDS], tl.float32)
        for piece in tl.static_range(PIECES):
            numbers = _unpack(words[row * PIECES + piece], one, FORMAT, ASSEMBLY)
            for step in tl.static_range(STEPS):
                if HAS_GRAINS:
                    products = tl.zeros([THREADS, WORDS], tl.float32)
                for i in tl.static_range(NUMBERS):
                    if FORMAT != "int4" or i % 4 // PER_STEP == step:
                        products = tl.fma(numbers[i], xs[piece * NUMBERS + i], products)
                if HAS_GRAINS:
                    product = tl.sum(products, axis=1)
                    scale = scales[(row % (SCALE_ROWS * HALVES) * PIECES + piece) * STEPS + step]
                    if FORMAT == "int4":
                        zero = SYMMETRIC_ZERO
                        if HAS_ZEROS:
                            zero = zeros[(row * PIECES + piece) * STEPS + step].to(tl.float32)
                        product -= bases[piece * STEPS + step]
                        product -= zero * x_sums[piece * STEPS + step]
                    total = tl.fma(product, scale.to(tl.float32), total)
        if not HAS_GRAINS:
            total = tl.sum(products, axis=1)
        sums += (total,)
    result = _sum_rows(sums, ROWS * HALVES) * factor
    if not HAS_GRAINS and scales_ptr is not None:
        result *= row_scale
    if ACTIVATION is not None:
        gate, up = tl.split(tl.reshape(result, [ROWS, 2]))
        out = gated(gate, up, ACTIVATION)
    else:
        out = result
    if bias_ptr is not None:
        out += bias
    if residual_ptr is not None:
        out += residual
    tl.store(out_ptr + output, out.to(out_ptr.dtype.element_ty), mask=is_output)


@triton.jit
def _sum_rows(sums, COUNT: tl.constexpr):
    """`[threads]` each -> `[COUNT]`"""
    if COUNT == 1:
        return tl.sum(sums[0][:, None], axis=0)
    elif COUNT == 2:
        return tl.sum(tl.join(sums[0], sums[1]), axis=0)
    elif COUNT == 4:
        return tl.sum(_join4(sums[0], sums[1], sums[2], sums[3]), axis=0)
    elif COUNT == 8:
        a = _join4(sums[0], sums[2], sums[4], sums[6])
        b = _join4(sums[1], sums[3], sums[5], sums[7])
        return tl.sum(tl.reshape(tl.join(a, b), [a.shape[0], 8]), axis=0)
    else:
        a = _join4(sums[0], sums[4], sums[8], sums[12])
        b = _join4(sums[1], sums[5], sums[9], sums[13])
        c = _join4(sums[2], sums[6], sums[10], sums[14])
        d = _join4(sums[3], sums[7], sums[11], sums[15])
        ac = tl.reshape(tl.join(a, c), [a.shape[0], 8])
        bd = tl.reshape(tl.join(b, d), [a.shape[0], 8])
        return tl.sum(tl.reshape(tl.join(ac, bd), [a.shape[0], 16]), axis=0)


@triton.jit
def _join4(a, b, c, d):
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, [a.shape[0], 4])


def packed_gemv(
    x: Tensor,
    weight: Tensor | FP8Weight | Int4Weight,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
    config: PackedGemvConfig | None = None,
) -> Tensor:
    in_size = x.shape[1]
    order = zeros = scales = None
    row_grain, column_grain, steps = 1, in_size, 1
    assembly = None
    if isinstance(weight, Int4Weight):
        form, values, rows = "int4", weight.packed, weight.out_size
        row_words = weight.packed.shape[1] // 2
        order, scales, zeros = weight.column_order, weight.scales, weight.zero_points
        column_grain = weight.group_size
        steps = 4 // positions_per_group(weight.group_size, in_size)
    elif isinstance(weight, FP8Weight):
        form, values, rows = "e4m3", weight.values, weight.out_size
        row_words = in_size // 4
        scales, row_grain, column_grain = weight.scales, weight.row_grain, weight.column_grain
        if x.is_cuda or FORCE_ASSEMBLY:
            assembly = E4M3_ASSEMBLY
    else:
        form, values, rows = "bf16", weight, len(weight)
        row_words = in_size // 2
    is_gated = activation is not None
    out_size = rows // 2 if is_gated else rows
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=out_dtype or x.dtype, device=x.device)
    assert config is not None
    tiles = triton.cdiv(out_size, config.rows)
    grid = tiles
    if config.programs:
        num_multiprocessors, _ = device_limits(x.device)
        each = triton.cdiv(tiles, num_multiprocessors * config.programs)
        grid = triton.cdiv(tiles, each)
    limit = {"maxnreg": config.registers} if config.registers else {}
    global last_kernel
    last_kernel = _packed_gemv_kernel[(grid,)](
        x,
        order,
        values,
        scales,
        zeros,
        bias,
        norm_weight,
        eps,
        residual,
        out,
        out_size,
        ONE,
        IN_SIZE=in_size,
        ROW_WORDS=row_words,
        ROW_GRAIN=row_grain,
        COLUMN_GRAIN=column_grain,
        STEPS=steps,
        SYMMETRIC_ZERO=float(SYMMETRIC_ZERO),
        FORMAT=form,
        ASSEMBLY=assembly,
        ROWS=config.rows,
        WORDS=config.words,
        WARPS=config.warps,
        STAGES=config.stages,
        ACTIVATION=activation,
        num_warps=config.warps,
        **limit,
        **pdl_options(),
    )
    return out


FORCE_ASSEMBLY = False
last_kernel = None
HAS_STAGES = True
