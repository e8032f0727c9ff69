"""A linear layer of FP8 or INT4 weights for one token, where nearly all the time goes into reading
them: the kernel of `fp8_gemv` and `int4_gemv`.

As in `gemv`, a program takes whole rows of the weight, and the RMSNorm before the product and the
addition after it are a part of the kernel. But these weights are read in half or a quarter of the
time, in which a program that ends after a few rows would start, wait for memory, multiply and add
up, one after the other. So there are only as many programs as run at once. Each keeps its columns
of x in registers, normed, and goes from tile to tile. The registers of a tile are loaded with the
next one as soon as they have been multiplied, while the sums of all threads are still to be added
up; and there are enough programs that some of them wait for memory at any time. The first tile is
on its way before a program waits for the kernel ahead.
"""

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
from nanovllm.kernels.gate_mul import gated
from nanovllm.kernels.packed_input import (
    input_sums,
    load_input,
    multiply_inputs,
    scaled_inputs,
    sum_of_squares,
)
from nanovllm.kernels.packed_tile import Tile
from nanovllm.kernels.packed_words import ONE, load_scales, load_words, multiply_words


@triton.jit
def _join_four(a, b, c, d):
    """`[threads]` each -> `[threads, 4]`"""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, [a.shape[0], 4])


@triton.jit
def sum_threads(products, COUNT: tl.constexpr):
    """Sum up 1, 2, 4 or 8 products `[threads]` by one reduction: `[COUNT]`."""
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
    T: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes every num_programs-th tile of outputs."""
    ROWS: tl.constexpr = T.rows
    COUNT: tl.constexpr = T.rows * T.halves
    num_tiles = tl.cdiv(out_size, ROWS)
    num_programs = tl.num_programs(0)
    thread = tl.arange(0, T.threads)
    tile = tl.program_id(0)
    words, scales, zeros = _load_tile(
        tile, weight_ptr, scales_ptr, zeros_ptr, out_size, thread, num_tiles, T
    )
    if norm_ptr is not None:
        norm = load_input(norm_ptr, order_ptr, thread, T)
    launch_next(PDL)
    wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
    inputs = load_input(x_ptr, order_ptr, thread, T)
    factor = 1.0
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the results.
        factor = tl.rsqrt(sum_of_squares(inputs, T) / T.in_size + eps)
        inputs = multiply_inputs(inputs, norm, T)
    sums = ()
    scaled_sums = ()
    if T.format == "int4":
        sums = input_sums(inputs, T)
    inputs = scaled_inputs(inputs, T)
    if T.format == "int4":
        scaled_sums = input_sums(inputs, T)
    while tile < num_tiles:
        output = tile * ROWS + tl.arange(0, ROWS)
        addend = tl.zeros([ROWS], tl.float32)
        if bias_ptr is not None:
            addend += tl.load(bias_ptr + output, mask=output < out_size, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            ptrs = residual_ptr + output
            addend += tl.load(ptrs, mask=output < out_size, other=0.0).to(tl.float32)
        products = multiply_words(words, scales, zeros, inputs, sums, scaled_sums, one, T)
        # What comes next is loaded before this tile's sums are finished, which takes a while.
        tile += num_programs
        words, scales, zeros = _load_tile(
            tile, weight_ptr, scales_ptr, zeros_ptr, out_size, thread, num_tiles, T
        )
        out = sum_threads(products, COUNT) * factor
        if ACTIVATION is not None:
            gate, up = tl.split(tl.reshape(out, [ROWS, 2]))
            out = gated(gate, up, ACTIVATION)
        out += addend
        tl.store(out_ptr + output, out.to(out_ptr.dtype.element_ty), mask=output < out_size)


@triton.jit
def _load_tile(
    tile, weight_ptr, scales_ptr, zeros_ptr, out_size, thread, num_tiles, T: tl.constexpr
):
    """Load words, scales and zero points of a tile; nothing, if there is no such tile."""
    is_tile = tl.zeros(thread.shape, tl.int32) + tile < num_tiles
    first_row = tile * T.rows
    words = load_words(weight_ptr, first_row, out_size, thread, is_tile, T)
    zeros = ()
    scales = load_scales(scales_ptr, first_row, out_size, thread, is_tile, T)
    if zeros_ptr is not None:
        zeros = load_scales(zeros_ptr, first_row, out_size, thread, is_tile, T)
    return words, scales, zeros


def packed_gemv(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    tile: Tile,
    programs: int,
    zero_points: Tensor | None = None,
    column_order: Tensor | None = None,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Launch the kernel: see `fp8_gemv` and `int4_gemv`.

    weight: `[out, ...]`, as `tile.format` has it. programs: on a multiprocessor.
    """
    out_size = len(weight) // tile.halves
    assert x.shape == (1, tile.in_size) and not (activation is not None and bias is not None)
    assert all(t is None or t.is_contiguous() for t in (x, weight, scales, residual))
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=out_dtype or x.dtype, device=x.device)
    num_multiprocessors, _ = device_limits(x.device)
    num_tiles = triton.cdiv(out_size, tile.rows)
    rounds = triton.cdiv(num_tiles, num_multiprocessors * programs)
    _packed_gemv_kernel[(triton.cdiv(num_tiles, rounds),)](
        x,
        column_order,
        weight,
        scales,
        zero_points,
        bias,
        norm_weight,
        eps,
        residual,
        out,
        out_size,
        ONE,
        T=tile,
        ACTIVATION=activation,
        num_warps=tile.warps,
        **pdl_options(),
    )
    return out
