"""The activation of a gated MLP, `act(gate) * up`, in one pass."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.fp8_quantize import empty_input, store_rounded
from nanovllm.kernels.fp8_weight import FP8Input, Rounding


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """Return `act(gate) * up` of two float32 tiles."""
    exponent = gate
    if ACTIVATION == "gelu_tanh":
        # GELU by tanh is `g (1 + tanh(u)) / 2` with u = sqrt(2 / pi) (g + 0.044715 g^3), and that
        # is g sigmoid(2 u).
        exponent = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-exponent)) * up


@triton.jit
def _gate_mul_kernel(
    x_ptr,
    out_ptr,
    out_scales_ptr,
    num_out_rows,
    SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK columns of one row. With `out_scales_ptr` these are all of them, and
    the result is rounded to FP8 in groups of GROUP_SIZE columns.
    """
    launch_next(PDL)
    wait_for_previous(PDL)
    # The last row first: after a long GEMM the L2 cache still holds the rows written last.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + column, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + column, mask=mask).to(tl.float32)
    out = gated(gate, up, ACTIVATION)
    if out_scales_ptr is not None:
        out = out.to(x_ptr.dtype.element_ty).to(tl.float32)  # as if it was written and read
        out = tl.where(mask, out, 0.0)
        store_rounded(out, out_ptr, out_scales_ptr, num_out_rows, row, SIZE, GROUP_SIZE, BLOCK)
    else:
        tl.store(out_ptr + row * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def gate_mul(x: Tensor, activation: str = "silu") -> Tensor:
    """Return `act(gate) * up`, a new tensor `[n, size]`, computed in float32.

    x: `[n, 2 * size]`, contiguous; the gate is its first half of columns, up the second.
    activation: "silu", or "gelu_tanh" (GELU in its approximation by tanh).
    """
    num_rows, size = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous()
    out = padded_empty(num_rows, size, x)
    grid = (num_rows, triton.cdiv(size, 1024))
    _gate_mul_kernel[grid](
        x,
        out,
        None,
        0,
        SIZE=size,
        GROUP_SIZE=size,
        ACTIVATION=activation,
        BLOCK=1024,
        **pdl_options(),
    )
    return out


def gate_mul_rounded(x: Tensor, activation: str, rounding: Rounding) -> FP8Input:
    """`gate_mul`, rounded to FP8 for the layer that reads it."""
    num_rows, size = x.shape[0], x.shape[1] // 2
    assert x.is_contiguous()
    out = empty_input(num_rows, size, x, rounding)
    block = next_power_of_2(size)
    _gate_mul_kernel[(num_rows,)](
        x,
        out.values,
        out.scales,
        rounding.num_rows,
        SIZE=size,
        GROUP_SIZE=rounding.group_size,
        ACTIVATION=activation,
        BLOCK=block,
        num_warps=min(16, max(1, block // 1024)),
        **pdl_options(),
    )
    return out


def gate_mul_torch(x: Tensor, activation: str = "silu") -> Tensor:
    """`gate_mul` in PyTorch: the reference."""
    gate, up = x.chunk(2, dim=-1)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    return F.silu(gate) * up


def gate_mul_in_place(x: Tensor, activation: str = "silu") -> Tensor:
    """`gate_mul` on a CPU: written over the gate, since new memory would cost most of the time."""
    gate, up = x.chunk(2, dim=-1)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_(gate, approximate="tanh").mul_(up)
    return F.silu(gate, inplace=True).mul_(up)
