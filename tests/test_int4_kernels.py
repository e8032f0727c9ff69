"""The Triton kernels of INT4 weights against the float64 product with the dequantised weight.

Without a GPU they run in Triton's interpreter (tests/conftest.py turns it on).
"""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.gate_mul import gate_mul_torch
from nanovllm.kernels.hopper_config import hopper_gemm_config
from nanovllm.kernels.int4_config import (
    Int4GemmConfig,
    int4_gemm_config,
    int4_gemv_config,
)
from nanovllm.kernels.int4_dequantize import int4_dequantize
from nanovllm.kernels.int4_expert_gemv import int4_expert_down_gemv, int4_expert_gate_up_gemv
from nanovllm.kernels.int4_gemm import BFLOAT16, FLOAT16, int4_gemm
from nanovllm.kernels.int4_gemv import int4_gemv
from nanovllm.kernels.int4_layout import (
    Int4Weight,
    dequantize_int4,
    pack_int4,
    positions_per_group,
)
from nanovllm.kernels.moe import MoEWeights, moe_gemv, moe_partial_sums
from nanovllm.kernels.moe_routing import route, route_torch
from nanovllm.kernels.packed_config import PackedGemvConfig
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.quantization import int4_matmul
from nanovllm.quantization.int4_matmul import Int4Kernel, choose_int4_kernel, multiply_int4
from nanovllm.quantization.weight_format import Epilogue, PartialSums

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_weight(
    rows: int, columns: int, group_size: int, symmetric: bool = False, sorted_: bool = True
) -> Int4Weight:
    """Every number occurs, and among the zero points 0 and 16."""
    groups = -(-columns // group_size)
    weight = Int4Weight(
        packed=pack_int4(torch.randint(0, 16, (rows, columns))),
        scales=torch.rand(rows, groups).add_(0.5).half() / 64,
        zero_points=None if symmetric else torch.randint(0, 17, (rows, groups)).to(torch.uint8),
        in_size=columns,
        group_size=group_size,
        column_order=None if sorted_ else torch.randperm(columns).to(torch.int32),
    )
    parts = [part.to(DEVICE) if isinstance(part, Tensor) else part for part in weight]
    return Int4Weight(*parts)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == expected.shape
    error = (out.double() - expected).abs().max().item()
    assert error <= TOLERANCE[dtype] * expected.abs().max().item(), error


SHAPES = [  # rows, columns, group size: whole blocks and pieces, or not; groups of 1 to 4 positions
    (12, 1024, 128),
    (9, 320, 32),
    (5, 1216, 64),
    (6, 288, 96),
    (7, 200, 200),
    (3, 2304, 2304),
]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[1], torch.float16)],
    ids=str,
)
def test_gemv(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    x = randn(1, shape[1], dtype=dtype)
    expected = x.double() @ dequantize_int4(weight, torch.float64).t()
    assert_near(int4_gemv(x, weight), expected, dtype)


@pytest.mark.parametrize("config", [(2, 2, 1, 3), (8, 4, 4, 1)], ids=str)
def test_gemv_has_one_result_however_it_is_divided(config: tuple[int, int, int, int]) -> None:
    weight = make_weight(9, 2176, 64)
    x = randn(1, 2176)
    expected = x.double() @ dequantize_int4(weight, torch.float64).t()
    assert_near(int4_gemv(x, weight, config=PackedGemvConfig(*config)), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("symmetric", "sorted_"), [(False, True), (True, False)], ids=["zeros", "symmetric, order"]
)
def test_gemv_with_norm_and_addition(dtype: torch.dtype, symmetric: bool, sorted_: bool) -> None:
    weight = make_weight(10, 1100, 1100, symmetric, sorted_)
    x, norm = randn(1, 1100, dtype=dtype), randn(1100)
    bias, residual = randn(10, dtype=dtype), randn(1, 10, dtype=dtype)
    normed = rms_norm_torch(x.double(), norm.double(), 1e-6)
    matrix = dequantize_int4(weight, torch.float64)
    expected = residual.double() + F.linear(normed, matrix, bias.double())
    out = int4_gemv(x, weight, bias, norm, 1e-6, residual)
    assert out is residual
    assert_near(out, expected, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gemv_with_activation(activation: str) -> None:
    weight = make_weight(14, 384, 128)
    x, norm = randn(1, 384), randn(384)
    normed = rms_norm_torch(x.double(), norm.double(), 1e-6)
    product = F.linear(normed, dequantize_int4(weight, torch.float64))
    out = int4_gemv(x, weight, None, norm, 1e-6, activation=activation)
    assert_near(out, gate_mul_torch(product, activation), torch.float32)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "dtype"),
    [
        *((shape, 2, torch.float32) for shape in SHAPES),
        (SHAPES[1], 33, torch.float32),
        (SHAPES[2], 17, torch.float16),
    ],
    ids=str,
)
def test_gemm(shape: tuple[int, int, int], num_tokens: int, dtype: torch.dtype) -> None:
    rows, columns, _ = shape
    weight = make_weight(*shape)
    x, bias = randn(num_tokens, columns, dtype=dtype), randn(rows, dtype=dtype)
    expected = F.linear(x.double(), dequantize_int4(weight, torch.float64), bias.double())
    for splits in (1, 3):
        config = Int4GemmConfig(tokens=16, rows=16, splits=splits, num_warps=4, num_stages=3)
        sums = int4_gemm(x, weight, bias, config=config)
        blocks = -(-columns // 128)
        assert len(sums) == -(-blocks // -(-blocks // splits))
        assert_near(sums.double().sum(0), expected, dtype)


@pytest.mark.parametrize("symmetric", [False, True], ids=["zeros", "symmetric"])
def test_gemm_of_columns_out_of_order(symmetric: bool) -> None:
    weight = make_weight(20, 384, 64, symmetric, sorted_=False)
    x = randn(5, 384)
    expected = x.double() @ dequantize_int4(weight, torch.float64).t()
    assert_near(int4_gemm(x, weight).sum(0), expected, torch.float32)


@pytest.mark.parametrize("symmetric", [False, True], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize(shape: tuple[int, int, int], symmetric: bool) -> None:
    weight = make_weight(*shape, symmetric)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(int4_dequantize(weight, dtype), dequantize_int4(weight, dtype))


@pytest.mark.parametrize(
    ("how", "dtype"), [(BFLOAT16, torch.bfloat16), (FLOAT16, torch.float16)], ids=["bf16", "fp16"]
)
def test_the_assembly_computes_differences(how: object, dtype: torch.dtype) -> None:
    """Its constants, taken at their word: the interpreter cannot run it."""
    assembly = how.assembly  # type: ignore[attr-defined]
    mask, offset, one = (int(text, 16) for text in re.findall(r"0x(\w{8})", assembly))
    numbers = torch.arange(0, 2**16, dtype=torch.int32)
    zero_points = torch.arange(17)
    for position in range(4):
        bits = numbers >> 4 * position & (mask & 0xFFFF) | (offset & 0xFFFF)
        assert one == 0x10001 * torch.ones(1, dtype=dtype).view(torch.int16).item()
        assert mask == 0xF * 0x10001 and offset >> 16 == offset & 0xFFFF
        large = bits.to(torch.int16).view(dtype).float()
        minus_zero = (-how.offset - zero_points).to(dtype).float()  # type: ignore[attr-defined]
        difference = (large[:, None] + minus_zero).to(dtype)
        expected = (numbers >> 4 * position & 15)[:, None] - zero_points
        assert torch.equal(difference, expected.to(dtype))


def test_positions_of_a_group() -> None:
    assert [positions_per_group(size, 4096) for size in (32, 64, 96, 128, 192, 256, 384)] == [
        1,
        2,
        1,
        4,
        2,
        4,
        4,
    ]
    assert positions_per_group(200, 200) == 4


def test_configurations_are_within_their_limits() -> None:
    for in_size in (128, 768, 1024, 2560, 4096, 12288, 53248):
        for is_gated in (False, True):
            gemv = int4_gemv_config(in_size, is_gated)
            assert gemv.rows * (2 if is_gated else 1) in (2, 4, 8)
            assert gemv.words in (2, 4) and gemv.warps * gemv.programs == 16
    for out_size in (256, 1024, 6144, 24576):
        for in_size in (128, 768, 1024, 2560, 4096, 12288):
            for num_tokens in (2, 16, 17, 64, 200, 256):
                gemm = int4_gemm_config(num_tokens, out_size, in_size, 132)
                assert 16 <= gemm.tokens <= 128 and gemm.rows in (64, 128)
                whole = int4_gemm_config(num_tokens, out_size, in_size, 132, reader_sums=False)
                assert whole.splits == 1
                assert 1 <= gemm.splits <= max(1, in_size // 128)


@pytest.mark.parametrize("weight_bits", [4, 8])
def test_tiles_for_hopper_are_within_their_limits(weight_bits: int) -> None:
    shared_memory = 227 << 10
    for out_size, in_size in ((256, 128), (1024, 2048), (6144, 4096), (24576, 4096), (4096, 12288)):
        for num_tokens in (2, 16, 17, 64, 96, 200, 256, 2000):
            sizes = (num_tokens, out_size, in_size, weight_bits, 132, shared_memory)
            config = hopper_gemm_config(*sizes)
            for chosen in (config, hopper_gemm_config(*sizes, is_gated=True)):
                stage_bytes = 128 * (2 * chosen.tokens + chosen.rows * weight_bits // 8)
                assert chosen.num_stages >= 3
                assert stage_bytes * chosen.num_stages * chosen.programs < shared_memory
            assert 16 <= config.tokens <= 256 and config.tokens < 4 * num_tokens + 16
            assert 1 <= config.splits <= in_size // 128
            assert hopper_gemm_config(*sizes, reader_sums=False).splits == 1
            assert hopper_gemm_config(*sizes, is_gated=True).splits == 1
    # Measured: of o nearly as many programs as run at once, two on a multiprocessor, in one round;
    # of gate_up two rounds of tiles of 128 tokens.
    for num_tokens in (2, 64):
        config = hopper_gemm_config(num_tokens, 4096, 4096, weight_bits, 132, shared_memory)
        assert config.programs == 2
        assert 180 <= 32 * config.splits <= 264
    assert hopper_gemm_config(128, 24576, 4096, weight_bits, 132, shared_memory).tokens == 128


# --- which kernel, and what becomes of its product ------------------------------------------------


def test_choice() -> None:
    half = torch.empty(2, 128, dtype=torch.float16)
    assert choose_int4_kernel(half) is Int4Kernel.GEMM
    assert choose_int4_kernel(half.float()) is Int4Kernel.DEQUANTIZE
    assert choose_int4_kernel(half.expand(2, 128).repeat(500, 1)) is Int4Kernel.DEQUANTIZE


@pytest.mark.parametrize("kernel", list(Int4Kernel))
@pytest.mark.parametrize("sorted_", [False, True], ids=["order", "in order"])
def test_every_epilogue(kernel: Int4Kernel, sorted_: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4_matmul, "choose_int4_kernel", lambda x: kernel)
    weight = make_weight(20, 256, 64, sorted_=sorted_)
    num_tokens = 1 if kernel is Int4Kernel.GEMV else 5
    x, bias, residual = randn(num_tokens, 256), randn(20), randn(num_tokens, 20)
    product = F.linear(x.double(), dequantize_int4(weight, torch.float64), bias.double())

    plain = multiply_int4(weight, x, bias, Epilogue(), None)
    assert isinstance(plain, Tensor)
    assert_near(plain, product, torch.float32)

    for epilogue, added in (
        (Epilogue(reader_sums=True), product),
        (Epilogue(add_to=residual), product + residual.double()),
    ):
        out = multiply_int4(weight, x, bias, epilogue, None)
        if isinstance(out, PartialSums):
            assert kernel is Int4Kernel.GEMM
            out = out.sum()
            added = product
        assert_near(out, added, torch.float32)
    if kernel is not Int4Kernel.GEMV:
        rows = torch.empty(num_tokens, 20, device=DEVICE)
        assert multiply_int4(weight, x, bias, Epilogue(out=rows), None) is rows
        assert_near(rows, product, torch.float32)


# --- experts --------------------------------------------------------------------------------------


def make_experts(
    shape: tuple[int, int, int], sorted_: bool = True
) -> tuple[MoEWeights, MoEWeights]:
    """Experts in INT4, and the same dequantised in float64.

    shape: how many, hidden and intermediate size.
    """
    num_experts, hidden, intermediate = shape
    router = randn(num_experts, hidden)
    group_size = 64 if hidden % 64 == 0 else hidden
    gate_up = make_weight(num_experts * 2 * intermediate, hidden, group_size, sorted_=sorted_)
    down = make_weight(num_experts * hidden, intermediate, intermediate, sorted_=sorted_)
    matrices = [
        dequantize_int4(weight, torch.float64).unflatten(0, (num_experts, -1))
        for weight in (gate_up, down)
    ]
    return (
        MoEWeights(router, gate_up, down, top_k=2, is_normalized=True),
        MoEWeights(router.double(), *matrices, top_k=2, is_normalized=True),
    )


def expected_moe(x: Tensor, weights: MoEWeights) -> Tensor:
    """Token by token and expert by expert, in float64."""
    x = x.double()
    experts, scores = route_torch(x, weights.router, weights.top_k, weights.is_normalized)
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for slot in range(weights.top_k):
            expert = experts[token, slot]
            gate, up = (weights.gate_up[expert] @ x[token]).chunk(2)
            output = weights.down[expert] @ (F.silu(gate) * up)
            out[token] += scores[token, slot] * output
    return out


def test_experts_of_one_token() -> None:
    weights, exact = make_experts((3, 64, 40), sorted_=False)
    x, residual, norm = randn(1, 64), randn(1, 64), randn(64)
    normed = rms_norm_torch(x.double(), norm.double(), 1e-6)
    expected = residual.double() + expected_moe(normed, exact)
    out = moe_gemv(x, weights, residual, norm, 1e-6)
    assert out is residual
    assert_near(out, expected, torch.float32)


def test_experts_of_one_token_in_several_pieces() -> None:
    """Of gate and up, and of down, with few outputs each: the interpreter takes long."""
    weights, exact = make_experts((3, 520, 8))
    x = randn(1, 520)
    assert isinstance(weights.gate_up, Int4Weight) and isinstance(exact.gate_up, Tensor)
    routing = route(x, weights.router, weights.top_k, weights.is_normalized)
    experts = routing.experts[0].long()
    config = PackedGemvConfig(rows=4, words=2, warps=1, programs=1)
    activation = int4_expert_gate_up_gemv(x, weights.gate_up, routing, config=config)
    gate, up = (exact.gate_up[experts] @ x[0].double()).chunk(2, dim=1)
    assert_near(activation, F.silu(gate) * up, torch.float32)
    weights, exact = make_experts((3, 16, 1032))
    inputs = randn(2, 1032)
    assert isinstance(weights.down, Int4Weight) and isinstance(exact.down, Tensor)
    out = int4_expert_down_gemv(inputs, weights.down, routing, rows=8)
    products = exact.down[experts] @ inputs.double()[:, :, None]
    expected = (routing.weights[0].double()[:, None] * products[:, :, 0]).sum(0, keepdim=True)
    assert_near(out, expected, torch.float32)


@pytest.mark.parametrize("sorted_", [False, True], ids=["order", "in order"])
@pytest.mark.parametrize("num_tokens", [2, 40])
def test_experts_of_several_tokens(num_tokens: int, sorted_: bool) -> None:
    weights, exact = make_experts((4, 192, 72), sorted_)
    x = randn(num_tokens, 192)
    assert_near(moe_partial_sums(x, weights).sum(0), expected_moe(x, exact), torch.float32)


def test_experts_in_half_precision() -> None:
    weights, exact = make_experts((4, 128, 64))
    router = weights.router.half()
    weights, exact = weights._replace(router=router), exact._replace(router=router.double())
    x = randn(9, 128, dtype=torch.float16)
    out = moe_partial_sums(x, weights).double().sum(0)
    assert_near(out, expected_moe(x, exact), torch.float16)
