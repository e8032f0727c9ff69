"""On a GPU: all ways to rotate q and k, and the gated activations, at the shapes of real models."""

from typing import Any

import pytest
import torch

from nanovllm.kernels.gate_mul import gate_mul, gate_mul_torch
from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.rms_norm import rms_norm_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
BF16 = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def assert_near(ours: torch.Tensor, reference: torch.Tensor) -> None:
    difference = (ours.double() - reference.double()).abs().max()
    assert difference <= 1e-2 * reference.double().abs().max()


@pytest.mark.parametrize("num_tokens", [1, 33, 2000])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, rotary_size, interleaved, has_norm",
    [
        (32, 32, 96, 96, False, False),  # Phi-3-mini
        (24, 8, 128, 96, False, False),  # Phi-4-mini
        (32, 2, 128, 64, True, False),  # GLM-4-9B
        (16, 4, 128, 0, False, False),  # SmolLM3, in every fourth layer
        (8, 4, 256, 256, False, True),  # Gemma-3-4B, whose norms are in float32
    ],
)
def test_all_ways_to_rotate(
    num_tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_size: int,
    interleaved: bool,
    has_norm: bool,
) -> None:
    torch.manual_seed(0)
    slots = torch.randperm(4096, device="cuda")[:num_tokens].int()
    slots[::7] = -1
    qkv = randn(num_tokens, heads + 2 * kv_heads, head_dim)
    positions = torch.randint(0, 4096, (num_tokens,), device="cuda")
    cos = sin = None
    if rotary_size:
        angles = torch.rand(4096, rotary_size // 2, device="cuda") * 6
        cos, sin = angles.cos(), angles.sin()
    weights = [randn(head_dim, dtype=torch.float32) if has_norm else None for _ in range(2)]
    results: list[Any] = []
    for fused in (norm_rope_store, norm_rope_store_torch):
        caches = [torch.zeros(16, 256, kv_heads, head_dim, dtype=BF16, device="cuda") for _ in "kv"]
        out = fused(
            qkv.clone(), positions, cos, sin, *weights, 1e-6, *caches, slots, heads, interleaved
        )
        results.append((out, *caches))
    for ours, reference in zip(*results, strict=True):
        assert_near(ours, reference)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_activations(activation: str) -> None:
    """Those of Gemma-3-1B: 1152 hidden numbers, 6912 in the MLP."""
    torch.manual_seed(0)
    x, weight = randn(1, 1152), randn(2 * 6912, 1152) / 1152**0.5
    norm = 1 + randn(1152, dtype=torch.float32) / 10
    normed = rms_norm_torch(x, norm, 1e-6)
    fused = gemv(x, weight, None, norm, 1e-6, activation=activation)
    assert_near(fused, gate_mul_torch(normed.double() @ weight.double().T, activation))
    product = 3 * randn(100, 2 * 6912)
    assert_near(gate_mul(product, activation), gate_mul_torch(product.double(), activation))
