"""INT4 weights on a GPU: the kernels at the sizes of Qwen3-8B, and the engine against
`transformers` with the dequantised weights.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import generate_ids, greedy, make_llm, random_prompts
from int4_checkpoints import awq, awq_config, gptq, gptq_config
from quantized import Quantize, quantize_checkpoint
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels.gate_mul import gate_mul_torch
from nanovllm.kernels.int4_config import Int4GemmConfig
from nanovllm.kernels.int4_dequantize import int4_dequantize
from nanovllm.kernels.int4_gemm import int4_gemm
from nanovllm.kernels.int4_gemv import int4_gemv
from nanovllm.kernels.int4_layout import Int4Weight, dequantize_int4, packed_width
from nanovllm.kernels.moe import MoEWeights, moe_gemv, moe_partial_sums, moe_torch
from nanovllm.kernels.rms_norm import rms_norm_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# qkv, o, down; rows of which a last block is not full; with zero points and without
SHAPES = [(6144, 4096, 128, False), (4096, 4096, 64, True), (4096, 12288, 128, True)]
SHAPES += [(1000, 3000, 3000, False), (2048, 768, 32, False)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_weight(rows: int, columns: int, group_size: int, has_zero_points: bool) -> Int4Weight:
    groups = (rows, -(-columns // group_size))
    zero_points = None
    if has_zero_points:
        zero_points = torch.randint(0, 17, groups, device="cuda").to(torch.uint8)
    shape = (rows, packed_width(columns))
    return Int4Weight(
        packed=torch.randint(-(2**15), 2**15, shape, device="cuda").to(torch.int16),
        scales=(torch.rand(groups, device="cuda") + 0.5).half() / 256,
        zero_points=zero_points,
        in_size=columns,
        group_size=group_size,
    )


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(out: Tensor, expected: Tensor, num_roundings: int = 1) -> None:
    """In float32 but for the roundings to the dtype: of the result, and of partial sums."""
    error = (out.double() - expected).norm() / expected.norm()
    assert error < num_roundings * torch.finfo(out.dtype).eps, error


@shapes
@both_dtypes
def test_gemv(shape: tuple[int, int, int, bool], dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    x, norm = randn(1, shape[1], dtype=dtype), randn(shape[1], dtype=dtype)
    residual = randn(1, shape[0], dtype=dtype)
    matrix = dequantize_int4(weight, torch.float64)
    check(int4_gemv(x, weight), F.linear(x.double(), matrix))
    normed = rms_norm_torch(x.double(), norm.double(), 1e-6)
    product = F.linear(normed, matrix)
    check(int4_gemv(x, weight, None, norm, 1e-6, residual.clone()), residual.double() + product)
    gated = int4_gemv(x, weight, None, norm, 1e-6, activation="silu")
    check(gated, gate_mul_torch(product))


@shapes
@both_dtypes
@pytest.mark.parametrize("num_tokens", [2, 17, 64, 200])
def test_gemm(shape: tuple[int, int, int, bool], num_tokens: int, dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    x, bias = randn(num_tokens, shape[1], dtype=dtype), randn(shape[0], dtype=dtype)
    expected = F.linear(x.double(), dequantize_int4(weight, torch.float64), bias.double())
    sums = int4_gemm(x, weight, bias)
    check(sums.double().sum(0).to(dtype), expected, num_roundings=3)
    check(int4_gemm(x, weight, bias, reader_sums=False)[0], expected)
    for tokens, rows in ((16, 128), (64, 64)):
        config = Int4GemmConfig(tokens, rows, splits=1, num_warps=4, num_stages=4)
        check(int4_gemm(x, weight, bias, config=config)[0], expected)


@shapes
@both_dtypes
def test_dequantize(shape: tuple[int, int, int, bool], dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    assert torch.equal(int4_dequantize(weight, dtype), dequantize_int4(weight, dtype))


@pytest.mark.parametrize("num_tokens", [1, 2, 40, 700])
def test_experts_of_qwen3_30b(num_tokens: int) -> None:
    """Against the same weights dequantised, whose router chooses alike."""
    weights = MoEWeights(
        router=randn(128, 2048, dtype=torch.bfloat16) * 0.05,
        gate_up=make_weight(128 * 2 * 768, 2048, 128, False),
        down=make_weight(128 * 2048, 768, 64, True),
        top_k=8,
        is_normalized=True,
    )
    assert isinstance(weights.gate_up, Int4Weight) and isinstance(weights.down, Int4Weight)
    exact = weights._replace(
        router=weights.router.float(),
        gate_up=dequantize_int4(weights.gate_up, torch.float32).unflatten(0, (128, -1)),
        down=dequantize_int4(weights.down, torch.float32).unflatten(0, (128, -1)),
    )
    x = randn(num_tokens, 2048, dtype=torch.bfloat16)
    if num_tokens == 1:
        out = moe_gemv(x, weights)
    else:
        out = moe_partial_sums(x, weights).float().sum(0)
    expected = moe_torch(x.float(), exact)
    errors = (out.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 0.01 and (errors < 0.02).float().mean() > 0.95, errors.sort().values


CHECKPOINTS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "awq": (awq(128), awq_config(128)),
    "gptq-desc-act": (gptq(64, desc_act=True), gptq_config(64, desc_act=True)),
}
SIZES: dict[str, Any] = dict(hidden_size=256, intermediate_size=512, head_dim=64, std=0.1)


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_engine(layout: str, tmp_path: Path) -> None:
    """In float32, so that tokens can be compared; with CUDA graphs and without. 8 requests at once
    and one alone take the GEMM's path, or its float32 substitute, and the GEMV's.
    """
    quantize, config = CHECKPOINTS[layout]
    checkpoint = quantize_checkpoint(tmp_path, quantize, config, **SIZES)
    prompts = random_prompts(5, [30, 9, 64, 100, 3, 40, 17, 80])
    expected = checkpoint.complete(prompts, 12)
    for enforce_eager in (True, False):
        options: dict[str, Any] = dict(device="cuda", dtype="float32", enforce_eager=enforce_eager)
        llm = make_llm(checkpoint.path, **options)
        try:
            assert generate_ids(llm, prompts, greedy(12)) == expected
            assert generate_ids(llm, prompts[:1], greedy(12)) == expected[:1]
        finally:
            llm.exit()


@pytest.mark.parametrize("layout", CHECKPOINTS)
def test_engine_in_bfloat16(layout: str, tmp_path: Path) -> None:
    """The first tokens, whose scores are far apart, are those of float32."""
    quantize, config = CHECKPOINTS[layout]
    checkpoint = quantize_checkpoint(tmp_path, quantize, config, **SIZES)
    prompts = random_prompts(5, [30, 9, 64, 100, 3, 40, 17, 80])
    expected = [ids[0] for ids in checkpoint.complete(prompts, 1)]
    llm = make_llm(checkpoint.path, device="cuda", dtype="bfloat16")
    try:
        together = [ids[0] for ids in generate_ids(llm, prompts, greedy(12))]
        alone = [generate_ids(llm, [prompt], greedy(12))[0][0] for prompt in prompts]
    finally:
        llm.exit()
    for found in (together, alone):
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        assert same >= 6, (found, expected)
