"""The activation of a gated MLP, `act(gate) * up`, in one pass."""

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    launch_next,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)


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
    SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program takes BLOCK columns of one row."""
    launch_next(PDL)
    wait_for_previous(PDL)
    # The last row first: after a long GEMM the L2 cache still holds the rows written last.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(x_ptr + row * 2 * SIZE + column, mask=mask).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * SIZE + SIZE + column, mask=mask).to(tl.float32)
    out = gated(gate, up, ACTIVATION)
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
    _gate_mul_kernel[grid](x, out, SIZE=size, ACTIVATION=activation, BLOCK=1024, **pdl_options())
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
