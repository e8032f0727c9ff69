"""Gated activations, and norms whose weight has an offset: kernels and layers."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.gate_mul import gate_mul, gate_mul_in_place, gate_mul_torch
from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_torch
from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.utils.loader import fill_dummy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
activations = pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
IN_TRANSFORMERS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_near(x: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert x.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(x.double(), expected, rtol=0.0, atol=TOLERANCE[dtype] * scale)


def gated64(gate: Tensor, up: Tensor, name: str) -> Tensor:
    gate = gate.double()
    if name == "silu":
        return gate / (1 + torch.exp(-gate)) * up.double()
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
    return gate * 0.5 * (1 + torch.tanh(inner)) * up.double()


def norm64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


# --- activations ----------------------------------------------------------------------------------


@activations
@pytest.mark.parametrize(
    "multiply", [gate_mul_torch, gate_mul_in_place, pytest.param(gate_mul, marks=needs_triton)]
)
@pytest.mark.parametrize("rows, size", [(1, 16), (3, 100), (2, 1500)])
@both_dtypes
def test_gate_mul(multiply: Any, name: str, rows: int, size: int, dtype: torch.dtype) -> None:
    x = randn(rows, 2 * size, dtype=dtype) * 3
    expected = gated64(*x.chunk(2, dim=-1), name)
    assert_near(multiply(x, name), expected, dtype)


@activations
@pytest.mark.parametrize(
    "multiply", [gate_mul_torch, gate_mul_in_place, pytest.param(gate_mul, marks=needs_triton)]
)
def test_large_gates(multiply: Any, name: str) -> None:
    """The exponential overflows on one side; the result is 0 there, and the gate on the other."""
    gate = torch.tensor([[-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4]], device=DEVICE)
    out = multiply(torch.cat((gate, torch.ones_like(gate)), dim=1), name)
    torch.testing.assert_close(out, gate.clamp(min=0.0), rtol=1e-6, atol=1e-10)


@activations
def test_the_activation_is_that_of_transformers(name: str) -> None:
    gate, up = torch.randn(2, 5, 8) * 3
    expected = ACT2FN[IN_TRANSFORMERS[name]](gate) * up
    torch.testing.assert_close(gate_mul_torch(torch.cat((gate, up), dim=1), name), expected)


@activations
def test_gate_up_linear(name: str) -> None:
    layer = GateUpLinear(8, 12, name)
    layer.weight.data.normal_()
    x = torch.randn(5, 8)
    gate, up = F.linear(x, layer.weight).chunk(2, dim=-1)
    torch.testing.assert_close(layer(x), gated64(gate, up, name).float())


@needs_triton
@activations
@pytest.mark.parametrize("weight_dtype", ["of_x", "float32"])
@pytest.mark.parametrize("out_size, in_size", [(10, 48), (33, 1500)])
@both_dtypes
def test_gemv(
    name: str, weight_dtype: str, out_size: int, in_size: int, dtype: torch.dtype
) -> None:
    """With the norm before it, whose weight may be more precise, and the activation after it."""
    x = randn(1, in_size, dtype=dtype)
    weight = randn(2 * out_size, in_size, dtype=dtype) / in_size**0.5
    norm = 1 + 0.1 * randn(in_size)
    if weight_dtype == "of_x":
        norm = norm.to(dtype)
    gate, up = (norm64(x, norm, 1e-3) @ weight.double().T).chunk(2, dim=-1)
    out = gemv(x, weight, None, norm, 1e-3, activation=name)
    assert_near(out, gated64(gate, up, name), dtype)


# --- norms ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_offset_is_added_when_the_weight_is_loaded(dtype: torch.dtype) -> None:
    """As in Gemma, whose weights are so close to 0 that 1 + w in bfloat16 would lose them."""
    theirs = Gemma3RMSNorm(32, 1e-3).to(dtype)
    stored = (0.01 * torch.randn(32)).to(dtype)
    theirs.weight.data.copy_(stored)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        ours = RMSNorm(32, 1e-3, weight_offset=1.0)
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        ours.weight.weight_loader(ours.weight, stored)  # type: ignore[attr-defined]
    assert ours.weight.dtype == torch.float32
    assert torch.equal(ours.weight, 1.0 + stored.float())
    x = torch.randn(7, 32).to(dtype)
    assert ours(x).dtype == dtype
    torch.testing.assert_close(ours(x), theirs(x))


def test_dummy_weights_of_norms_are_1_with_their_offset() -> None:
    model = torch.nn.Module()
    model.plain_norm = RMSNorm(8, 1e-6)
    model.offset_layernorm = RMSNorm(8, 1e-6, weight_offset=1.0)
    fill_dummy(model, 0.02, seed=0)
    for weight in model.parameters():
        assert torch.equal(weight, torch.ones(8))


@pytest.mark.parametrize("norm", [rms_norm_torch, pytest.param(rms_norm, marks=needs_triton)])
@pytest.mark.parametrize("rows, size", [(1, 64), (5, 100)])
@both_dtypes
def test_a_weight_in_float32(norm: Any, rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, size, dtype=dtype), 1 + 0.1 * randn(size)
    assert_near(norm(x, weight, 1e-3), norm64(x, weight, 1e-3), dtype)


@needs_triton
@both_dtypes
def test_a_weight_in_float32_after_an_addition(dtype: torch.dtype) -> None:
    x, partial_sums = randn(5, 100, dtype=dtype), randn(3, 5, 100, dtype=dtype)
    weight = 1 + 0.1 * randn(100)
    expected = norm64(x.double() + partial_sums.double().sum(0), weight, 1e-3)
    out = add_rms_norm(x, partial_sums, weight, 1e-3)
    assert out is not None
    assert_near(out, expected, dtype)
