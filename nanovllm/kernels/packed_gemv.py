"""A linear layer of FP8 or INT4 weights for one token, where nearly all the time goes into reading
them: the kernel of `fp8_gemv` and `int4_gemv`.

As in `gemv`, a program takes whole rows of the weight, and the RMSNorm before the product and the
addition after it are a part of the kernel. But these weights are read in half or a quarter of the
time, too short for programs that each start, wait for memory, multiply a few rows and end:

- Programs are *persistent*: there are as many as run at once. Each loads and norms x once, into
  registers, and goes through its tiles, a few rows each.
- Memory never waits for arithmetic. As soon as a tile has been multiplied, its registers are loaded
  with the next one, and only then are the sums of all threads added up. The first tile is on its
  way before a program waits for the kernel ahead.

The arithmetic is in packed_words.py, which columns a thread has in packed_tile.py.
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
    load_input,
    multiply_inputs,
    prepare_inputs,
    sum_of_squares,
)
from nanovllm.kernels.packed_tile import Tile
from nanovllm.kernels.packed_words import ONE, load_tile, multiply_words, sum_threads


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
    TILE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program p of P computes the tiles of outputs p, p + P, p + 2 P and so on."""
    ROWS: tl.constexpr = TILE.rows
    COUNT: tl.constexpr = TILE.rows * TILE.halves
    num_tiles = tl.cdiv(out_size, ROWS)
    num_programs = tl.num_programs(0)
    thread = tl.arange(0, TILE.threads)
    tile = tl.program_id(0)
    is_tile = tl.zeros(thread.shape, tl.int32) + tile < num_tiles
    weight = load_tile(
        weight_ptr, scales_ptr, zeros_ptr, tile * ROWS, out_size, thread, is_tile, TILE
    )
    if norm_ptr is not None:
        norm = load_input(norm_ptr, order_ptr, thread, TILE)
    launch_next(PDL)
    wait_for_previous(PDL)  # no earlier kernel writes the weights above, but one writes x
    columns = load_input(x_ptr, order_ptr, thread, TILE)
    factor = 1.0
    if norm_ptr is not None:
        # The norm divides all of x by the same number, so it is enough to scale the results.
        factor = tl.rsqrt(sum_of_squares(columns, TILE) / TILE.in_size + eps)
        columns = multiply_inputs(columns, norm, TILE)
    inputs = prepare_inputs(columns, TILE)
    while tile < num_tiles:
        output = tile * ROWS + tl.arange(0, ROWS)
        addend = tl.zeros([ROWS], tl.float32)
        if bias_ptr is not None:
            addend += tl.load(bias_ptr + output, mask=output < out_size, other=0.0).to(tl.float32)
        if residual_ptr is not None:
            ptrs = residual_ptr + output
            addend += tl.load(ptrs, mask=output < out_size, other=0.0).to(tl.float32)
        products = multiply_words(weight, inputs, one, TILE)
        # The next tile is loaded before this one's sums are finished, which takes a while.
        tile += num_programs
        is_tile = tl.zeros(thread.shape, tl.int32) + tile < num_tiles
        weight = load_tile(
            weight_ptr, scales_ptr, zeros_ptr, tile * ROWS, out_size, thread, is_tile, TILE
        )
        out = sum_threads(products, COUNT) * factor
        if ACTIVATION is not None:
            gate, up = tl.split(tl.reshape(out, [ROWS, 2]))
            out = gated(gate, up, ACTIVATION)
        out += addend
        tl.store(out_ptr + output, out.to(out_ptr.dtype.element_ty), mask=output < out_size)


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
) -> Tensor:
    """Return `residual + rms_norm(x) W^T + bias`, `[1, out]`: see `fp8_gemv` and `int4_gemv`.

    x: `[1, in]`. weight, scales, zero_points, column_order: those of `FP8Weight` or `Int4Weight`.
    programs: on a multiprocessor, as many as it runs at once.
    bias, norm_weight, eps, residual, activation: as for `gemv`.
    """
    out_size = len(weight) // tile.halves
    assert x.shape == (1, tile.in_size) and not (activation is not None and bias is not None)
    assert all(t is None or t.is_contiguous() for t in (x, weight, scales, residual))
    out = residual
    if out is None:
        out = torch.empty(1, out_size, dtype=x.dtype, device=x.device)
    num_multiprocessors, _ = device_limits(x.device)
    num_tiles = triton.cdiv(out_size, tile.rows)
    # As many programs as share the tiles evenly: none has a round more than another needs.
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
        TILE=tile,
        ACTIVATION=activation,
        num_warps=tile.warps,
        **pdl_options(),
    )
    return out
