"""norm_rope_store in all ways to rotate (partly, interleaved, not at all), and the CPU's way."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.cpu_attention import CpuStep
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.rms_norm import rms_norm_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rotated64(x: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Each pair as a complex number times exp(i angle), element by element, in float64."""
    out = x.double().clone()
    if cos is None or sin is None:
        return out
    pairs = cos.shape[1]
    for pair in range(pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        number = torch.complex(x[..., first].double(), x[..., second].double())
        number = number * torch.complex(cos[:, pair].double(), sin[:, pair].double())[:, None]
        out[..., first] = number.real
        out[..., second] = number.imag
    return out


def assert_near(x: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(x.double(), expected, rtol=0.0, atol=TOLERANCE[dtype] * scale)


def in_a_cpu_step(qkv: Tensor, *arguments: Any) -> Tensor:
    return CpuStep([len(qkv)], [len(qkv)], None).norm_rope_store(qkv, *arguments)


@pytest.mark.parametrize(
    "fused",
    [norm_rope_store_torch, in_a_cpu_step, pytest.param(norm_rope_store, marks=needs_triton)],
)
@pytest.mark.parametrize(
    "head_dim, rotary_size, interleaved",
    [
        (16, 16, True),
        (16, 8, False),
        (16, 8, True),
        (24, 18, False),  # neither is a power of 2
        (24, 18, True),
        (80, 32, False),
        (16, 2, False),
        (16, 0, False),  # no RoPE
    ],
)
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("num_parts", [1, 3])
@both_dtypes
def test_all_ways_to_rotate(
    fused: Any,
    head_dim: int,
    rotary_size: int,
    interleaved: bool,
    has_norm: bool,
    num_parts: int,
    dtype: torch.dtype,
) -> None:
    heads, kv_heads, eps = 5, 2, 1e-3
    slots = torch.tensor([35, -1, 0, 7, 16], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([3, 0, 39, 7, 22], device=DEVICE)
    cos = sin = token_cos = token_sin = None
    if rotary_size:
        angles = torch.rand(40, rotary_size // 2, device=DEVICE) * 6
        cos, sin = 1.2 * angles.cos(), 1.2 * angles.sin()
        token_cos, token_sin = cos[positions], sin[positions]
    # As of a norm with an offset: its weight is float32, whatever the dtype of q and k.
    weights = [torch.randn(head_dim, device=DEVICE) if has_norm else None for _ in range(2)]
    shape = (num_parts, 5, heads + 2 * kv_heads, head_dim)
    qkv = torch.randn(shape).to(DEVICE, dtype)
    q, k, v = qkv.double().sum(0).split([heads, kv_heads, kv_heads], dim=1)
    if has_norm:
        q, k = (
            rms_norm_torch(x, weight.double(), eps)  # type: ignore[union-attr]
            for x, weight in zip((q, k), weights, strict=True)
        )
    q, k = (rotated64(x, token_cos, token_sin, interleaved) for x in (q, k))
    caches = [torch.randn(3, 16, kv_heads, head_dim).to(DEVICE, dtype) for _ in range(2)]
    expected = [cache.double().flatten(0, 1) for cache in caches]
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[0][slot] = k[token]
            expected[1][slot] = v[token]
    given = qkv[0] if num_parts == 1 else qkv
    out = fused(given, positions, cos, sin, *weights, eps, *caches, slots, heads, interleaved)
    assert_near(out, torch.cat((q, k, v), dim=1), dtype)
    for cache, wanted in zip(caches, expected, strict=True):
        assert_near(cache.flatten(0, 1), wanted, dtype)


def test_layers_of_a_step_may_have_different_tables() -> None:
    """The CPU's plan keeps what the layers share, and must not take one table for another."""
    positions = torch.arange(6)
    tables: list[tuple[Tensor | None, Tensor | None, bool]] = []
    for pairs, interleaved in ((8, False), (8, False), (8, True), (4, False)):
        angles = torch.rand(6, pairs) * 6
        tables.append((angles.cos(), angles.sin(), interleaved))
    tables.append((None, None, False))
    step = CpuStep([6], [6], None)
    slots = torch.arange(6, dtype=torch.int32)
    for cos, sin, interleaved in (*tables, *tables[::-1]):
        qkv = torch.randn(6, 8, 16)
        caches = [torch.zeros(1, 6, 2, 16) for _ in range(4)]
        arguments = (positions, cos, sin, None, None, 0.0)
        expected = norm_rope_store_torch(
            qkv.clone(), *arguments, *caches[:2], slots, 4, interleaved
        )
        out = step.norm_rope_store(qkv.clone(), *arguments, *caches[2:], slots, 4, interleaved)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(caches[2:], caches[:2])
