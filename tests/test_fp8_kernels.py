"""The Triton kernels of FP8 weights against the float64 product with the dequantised weight.

Without a GPU they run in Triton's interpreter, where e4m3.py converts.
"""

import math

import pytest
import torch
from e4m3 import convert_e4m3_by_torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels import grouped_gemm
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.fp8_config import (
    FP8GemmConfig,
    FP8ScaledGemmConfig,
    fp8_gemm_config,
    fp8_gemv_config,
    fp8_scaled_gemm_config,
)
from nanovllm.kernels.fp8_dequantize import fp8_dequantize
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_gemv import fp8_gemv
from nanovllm.kernels.fp8_quantize import quantize_input
from nanovllm.kernels.fp8_scaled_gemm import fp8_scaled_gemm
from nanovllm.kernels.fp8_weight import (
    E4M3,
    LARGEST,
    FP8Input,
    FP8Weight,
    Rounding,
    dequantize_fp8,
    dequantize_input,
    quantize_input_torch,
    to_e4m3,
)
from nanovllm.kernels.gate_mul import gate_mul, gate_mul_rounded, gate_mul_torch
from nanovllm.kernels.moe import MoEWeights, moe_gemv, moe_partial_sums, moe_torch
from nanovllm.kernels.packed_config import PackedGemvConfig
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm_torch
from nanovllm.quantization import fp8_matmul
from nanovllm.quantization.fp8_matmul import FP8Kernel, choose_fp8_kernel, multiply_fp8
from nanovllm.quantization.weight_format import Epilogue, PartialSums

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
WHOLE_ROW = 0


@pytest.fixture(autouse=True)
def right_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    convert_e4m3_by_torch(monkeypatch)


def make_weight(rows: int, columns: int, row_grain: int, column_grain: int) -> FP8Weight:
    """Scales that differ by up to 16 times, so that a wrong one is seen."""
    column_grain = column_grain or columns
    grains = (rows // row_grain, columns // column_grain)
    values = to_e4m3(torch.randn(rows, columns) * 100).to(DEVICE)
    scales = torch.exp2(torch.rand(grains) * 4).div_(2048).to(DEVICE)
    return FP8Weight(values, scales, row_grain, column_grain)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def exact(weight: FP8Weight) -> Tensor:
    """The matrix, put together grain by grain."""
    scales = weight.scales.double().view(-1, weight.in_size // weight.column_grain)
    scales = scales.repeat_interleave(weight.row_grain, 0)
    return weight.values.double() * scales.repeat_interleave(weight.column_grain, 1)


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.shape == expected.shape
    error = (out.double() - expected).abs().max().item()
    assert error <= TOLERANCE[dtype] * expected.abs().max().item(), error


# Rows, columns, rows and columns of a grain: one scale a row, or one a block, which is larger or
# smaller than a tile; rows and columns that fill no tile.
SHAPES = [
    (12, 1024, 1, WHOLE_ROW),
    (9, 336, 1, WHOLE_ROW),
    (16, 384, 16, 128),
    (24, 320, 4, 64),
    (20, 288, 10, 96),
    (6, 608, 2, 32),
    (32, 160, 32, WHOLE_ROW),
]


@both_dtypes
@pytest.mark.parametrize("shape", [*SHAPES, (5, 1003, 1, WHOLE_ROW), (6, 24, 3, 8)], ids=str)
def test_gemv(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    x = randn(1, shape[1], dtype=dtype)
    assert_near(fp8_gemv(x, weight), x.double() @ exact(weight).t(), dtype)


@pytest.mark.parametrize("config", [(1, 2, 1, 5), (4, 4, 2, 1), (8, 2, 4, 2)], ids=str)
@pytest.mark.parametrize("shape", [(18, 640, 1, WHOLE_ROW), (18, 640, 2, 128)], ids=str)
def test_gemv_has_one_result_however_it_is_divided(
    shape: tuple[int, int, int, int], config: tuple[int, int, int, int]
) -> None:
    weight = make_weight(*shape)
    x = randn(1, 640)
    expected = x.double() @ exact(weight).t()
    assert_near(fp8_gemv(x, weight, config=PackedGemvConfig(*config)), expected, torch.float32)


@both_dtypes
@pytest.mark.parametrize("shape", [(10, 1100, 1, WHOLE_ROW), (10, 1088, 5, 64)], ids=str)
def test_gemv_with_norm_and_addition(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    weight = make_weight(*shape)
    x, norm = randn(1, shape[1], dtype=dtype), randn(shape[1])
    bias, residual = randn(10, dtype=dtype), randn(1, 10, dtype=dtype)
    normed = rms_norm_torch(x.double(), norm.double(), 1e-6)
    product = F.linear(normed, exact(weight), bias.double())
    out = fp8_gemv(x, weight, bias, norm, 1e-6)
    # As exact as float32, but for the one rounding at the end.
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    bound = product.abs() * rounding + TOLERANCE[torch.float32] * product.abs().max()
    assert ((out.double() - product).abs() <= bound).all()
    expected = residual.double() + product
    out = fp8_gemv(x, weight, bias, norm, 1e-6, residual)
    assert out is residual
    assert_near(out, expected, dtype)


@both_dtypes
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(16, 384, 1, WHOLE_ROW), (16, 384, 8, 128)], ids=str)
def test_gemv_with_activation(
    shape: tuple[int, int, int, int], activation: str, dtype: torch.dtype
) -> None:
    weight = make_weight(*shape)
    x, norm = randn(1, 384, dtype=dtype), randn(384, dtype=dtype)
    normed = rms_norm_torch(x.double(), norm.double(), 1e-6)
    product = F.linear(normed, exact(weight))
    out = fp8_gemv(x, weight, None, norm, 1e-6, activation=activation)
    assert_near(out, gate_mul_torch(product, activation), dtype)


@both_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [2, 33])
def test_gemm(shape: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype) -> None:
    rows, columns, _, column_grain = shape
    weight = make_weight(*shape)
    x, bias = randn(num_tokens, columns, dtype=dtype), randn(rows, dtype=dtype)
    expected = F.linear(x.double(), exact(weight), bias.double())
    chunk = math.gcd(column_grain, 128) or 128
    for splits in (1, 3):
        config = FP8GemmConfig(16, 16, chunk, splits, num_warps=4, num_stages=3)
        sums = fp8_gemm(x, weight, bias, config=config)
        chunks = -(-columns // chunk)
        assert len(sums) == -(-chunks // -(-chunks // splits))
        assert_near(sums.double().sum(0), expected, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize(shape: tuple[int, int, int, int]) -> None:
    weight = make_weight(*shape)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        expected = exact(weight).float().to(dtype)
        assert torch.equal(dequantize_fp8(weight, dtype), expected)
        if dtype == torch.bfloat16 and DEVICE == "cpu":
            continue  # the interpreter rounds it towards zero
        assert torch.equal(fp8_dequantize(weight, dtype), expected)


@both_dtypes
@pytest.mark.parametrize("group_size", [320, 64, 32])
def test_quantized_input(group_size: int, dtype: torch.dtype) -> None:
    x = randn(5, 320, dtype=dtype) * torch.exp2(randn(5, 1) * 4).to(dtype)
    x[3] = 0.0
    out = quantize_input(x, Rounding(group_size, num_rows=5))
    expected = quantize_input_torch(x, group_size)
    assert torch.equal(out.scales, expected.scales)
    assert torch.equal(out.values.float(), expected.values.float())
    padded = quantize_input(x, Rounding(group_size, num_rows=8))
    assert (padded.num_tokens, padded.dtype) == (5, dtype)
    assert len(padded.values) == 8 and torch.equal(padded.scales[:, :5], expected.scales)
    assert torch.equal(padded.values[:5].float(), expected.values.float())
    # Three bits of mantissa; 2^-10 of the largest is half of the smallest step.
    largest = x.float().abs().unflatten(1, (-1, group_size)).amax(2)
    bound = x.float().abs() / 16 + largest.repeat_interleave(group_size, 1) / LARGEST / 2**10
    assert ((dequantize_input(out) - x.float()).abs() <= bound * 1.001).all()
    assert (out.values[:3].float().abs().amax(1) == LARGEST).all()
    assert (out.values[3].float() == 0).all()


def assert_rounded(out: FP8Input, computed: Tensor, rounding: Rounding) -> None:
    """The same bits as of the tensor in 16 or 32 bits, if that was rounded by itself."""
    expected = quantize_input_torch(computed, rounding.group_size)
    assert len(out.values) == rounding.num_rows and out.num_tokens == len(computed)
    assert torch.equal(out.scales[:, : len(computed)], expected.scales)
    assert torch.equal(out.values[: len(computed)].float(), expected.values.float())


@both_dtypes
@pytest.mark.parametrize("group_size, num_rows", [(320, 5), (64, 8), (32, 5)])
def test_inputs_that_are_rounded_as_they_are_computed(
    group_size: int, num_rows: int, dtype: torch.dtype
) -> None:
    rounding = Rounding(group_size, num_rows)
    x, weight, sums = randn(5, 320, dtype=dtype), randn(320, dtype=dtype), randn(3, 5, 320)
    sums[:, 2] *= 100.0
    for post_weight, scale in ((None, 1.0), (randn(320, dtype=dtype), 0.5)):
        arguments = (sums.to(dtype), weight, 1e-3, post_weight, 1e-2, scale)
        plain, rounded = x.clone(), x.clone()
        normed = add_rms_norm(plain, *arguments)
        out = add_rms_norm(rounded, *arguments, rounding=rounding)
        assert isinstance(normed, Tensor) and isinstance(out, FP8Input)
        assert_rounded(out, normed, rounding)
        assert torch.equal(plain, rounded)
    gate_up = randn(5, 640, dtype=dtype)
    for activation in ("silu", "gelu_tanh"):
        product = gate_mul(gate_up, activation)
        assert_rounded(gate_mul_rounded(gate_up, activation, rounding), product, rounding)


SCALED_SHAPES = [
    (48, 256, 16, 128),
    (40, 192, 4, 64),
    (9, 96, 3, 32),
    (21, 400, 1, WHOLE_ROW),
    (16, 384, 16, WHOLE_ROW),
]


@pytest.mark.parametrize("shape", SCALED_SHAPES, ids=str)
@pytest.mark.parametrize("num_tokens", [3, 40])
def test_scaled_gemm(shape: tuple[int, int, int, int], num_tokens: int) -> None:
    rows, columns, _, column_grain = shape
    weight = make_weight(*shape)
    bias = randn(rows)
    x = quantize_input_torch(randn(num_tokens, columns), column_grain or columns)
    expected = F.linear(dequantize_input(x).double(), exact(weight), bias.double())
    chunks = -(-columns // (column_grain or 128))
    for splits in (1, 3):
        config = FP8ScaledGemmConfig(16, 16, splits, num_warps=4, num_stages=3)
        sums = fp8_scaled_gemm(x, weight, bias, config=config)
        assert len(sums) == -(-chunks // -(-chunks // splits))
        assert_near(sums.double().sum(0), expected, torch.float32)
    out = torch.full((num_tokens, rows), torch.nan, device=DEVICE)
    product = fp8_scaled_gemm(x, weight, bias, out=out)
    assert product.data_ptr() == out.data_ptr() and len(product) == 1
    assert_near(out, expected, torch.float32)


MIXTURES = {  # grains of gate and up, and of down: rows, columns
    "rows": ((1, WHOLE_ROW), (1, WHOLE_ROW)),
    "blocks": ((8, 64), (16, 32)),
}


def make_experts(grains: str, dtype: torch.dtype) -> tuple[MoEWeights, MoEWeights]:
    """6 experts, of which a token uses 3, in FP8, and the same dequantised."""
    num_experts, hidden, intermediate = 6, 320, 24 if grains == "rows" else 96
    gate_up_grains, down_grains = MIXTURES[grains]
    gate_up = make_weight(num_experts * 2 * intermediate, hidden, *gate_up_grains)
    down = make_weight(num_experts * hidden, intermediate, *down_grains)
    stacked = []
    for weight in (gate_up, down):
        stacked.append(weight._replace(values=weight.values.unflatten(0, (num_experts, -1))))
    router = randn(num_experts, hidden, dtype=dtype) * hidden**-0.5
    reference = [exact(w).float().unflatten(0, (num_experts, -1)) for w in (gate_up, down)]
    return (
        MoEWeights(router, *stacked, top_k=3, is_normalized=True),
        MoEWeights(router.float(), *reference, top_k=3, is_normalized=True),
    )


@both_dtypes
@pytest.mark.parametrize("grains", MIXTURES)
def test_experts(grains: str, dtype: torch.dtype) -> None:
    weights, reference = make_experts(grains, dtype)
    x = randn(19, 320, dtype=dtype)
    expected = moe_torch(x.float(), reference).double()
    assert_near(moe_partial_sums(x, weights).double().sum(0), expected, dtype)
    norm = randn(320)
    normed = rms_norm_torch(x[:1].float(), norm, 1e-6)
    hidden = x[:1].clone()
    added = hidden.double() + moe_torch(normed, reference).double()
    assert moe_gemv(hidden, weights, hidden, norm, 1e-6) is hidden
    assert_near(hidden, added, dtype)


def test_experts_without_tma(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_gemm, "has_tma", lambda: False)
    weights, reference = make_experts("blocks", torch.float32)
    x = randn(5, 320)
    expected = moe_torch(x, reference).double()
    assert_near(moe_partial_sums(x, weights).double().sum(0), expected, torch.float32)


def test_configurations_are_within_their_limits() -> None:
    for out_size in (256, 1024, 6144, 24576):
        for in_size in (96, 768, 1024, 2560, 4096, 12288):
            for grain in (in_size, 128, 96, 32):
                for num_tokens in (2, 16, 17, 64, 200, 512):
                    gemm = fp8_gemm_config(num_tokens, out_size, in_size, grain, 132)
                    assert 16 <= gemm.tokens <= 128 and gemm.rows in (64, 128)
                    assert gemm.chunk in (32, 64, 128)
                    assert grain == in_size or grain % gemm.chunk == 0
                    assert 1 <= gemm.splits <= max(1, in_size // 512)
                    whole = fp8_gemm_config(num_tokens, out_size, in_size, grain, 132, False)
                    assert whole.splits == 1
    for in_size in (24, 96, 768, 1024, 2560, 4096, 12288, 53248):
        for grain, is_gated in ((in_size, False), (in_size, True), (8, False), (128, True)):
            gemv = fp8_gemv_config(in_size, grain, is_gated)
            assert gemv.rows * (2 if is_gated else 1) in (2, 4, 8)
            assert grain % (4 * gemv.words) == 0 or grain == in_size
            assert gemv.warps * gemv.programs == 16
    for limits in ((132, 227 << 10), (170, 99 << 10)):
        for out_size, in_size in ((1024, 3072), (4096, 12288), (24576, 4096), (128, 96)):
            for grain in (in_size, 128, 32):
                for num_tokens in (65, 100, 256, 1000, 4096):
                    sizes = (num_tokens, out_size, in_size, grain, *limits)
                    scaled = fp8_scaled_gemm_config(*sizes, reader_sums=True)
                    assert 1 <= scaled.splits <= max(1, in_size // 512)
                    stage_bytes = 128 * (scaled.tokens + scaled.rows)
                    assert 2 <= scaled.num_stages <= limits[1] // stage_bytes
                    assert fp8_scaled_gemm_config(*sizes, reader_sums=False).splits == 1
    # Of 64 tiles of 128 x 128, each multiprocessor has one half.
    down = fp8_scaled_gemm_config(256, 4096, 12288, 12288, 132, 227 << 10, True)
    assert down.tokens == 128 and down.splits == 2


# --- which kernel, and what becomes of its product ------------------------------------------------


def test_choice() -> None:
    """`uses_gemv` asks for a GPU."""
    rows = make_weight(16, 256, 1, WHOLE_ROW)
    blocks = make_weight(16, 256, 8, 64)
    for weight in (rows, blocks):
        few, some, many = (torch.empty(n, 256, dtype=torch.bfloat16) for n in (2, 65, 513))
        for quantizes_input in (False, True):
            assert choose_fp8_kernel(few, weight, quantizes_input) is FP8Kernel.GEMM
            exact_input = choose_fp8_kernel(many.float(), weight, quantizes_input)
            assert exact_input is FP8Kernel.DEQUANTIZE
        assert choose_fp8_kernel(some, weight, False) is FP8Kernel.GEMM
        assert choose_fp8_kernel(many, weight, False) is FP8Kernel.DEQUANTIZE
        assert choose_fp8_kernel(some, weight, True) is FP8Kernel.SCALED
    assert choose_fp8_kernel(many.half(), rows, True) is FP8Kernel.DEQUANTIZE  # PyTorch writes bf16
    assert choose_fp8_kernel(many.half(), blocks, True) is FP8Kernel.SCALED
    odd = make_weight(9, 256, 1, WHOLE_ROW)
    assert choose_fp8_kernel(many, odd, True) is FP8Kernel.DEQUANTIZE
    for shape in ((16, 24, 1, WHOLE_ROW), (16, 96, 8, 24)):
        x = torch.empty(2, shape[1], dtype=torch.bfloat16)
        assert choose_fp8_kernel(x, make_weight(*shape), True) is FP8Kernel.DEQUANTIZE


@pytest.mark.parametrize("kernel", list(FP8Kernel))
@pytest.mark.parametrize("shape", [(32, 256, 1, WHOLE_ROW), (32, 256, 16, 64)], ids=str)
def test_every_epilogue(
    kernel: FP8Kernel, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_matmul, "choose_fp8_kernel", lambda *_: kernel)
    is_scaled = kernel is FP8Kernel.SCALED
    dtype = torch.bfloat16 if is_scaled and shape[3] == WHOLE_ROW else torch.float32
    weight = make_weight(*shape)
    num_tokens = 1 if kernel is FP8Kernel.GEMV else 5
    x, bias = randn(num_tokens, 256, dtype=dtype), randn(32, dtype=dtype)
    rounded = quantize_input_torch(x, shape[3] or 256)
    seen = dequantize_input(rounded) if is_scaled else x
    product = F.linear(seen.double(), exact(weight), bias.double())

    def multiply(epilogue: Epilogue) -> Tensor | PartialSums:
        return multiply_fp8(weight, x, bias, epilogue, None, is_scaled)

    plain = multiply(Epilogue())
    assert isinstance(plain, Tensor)
    assert_near(plain, product, dtype)
    if is_scaled:  # whoever computed the input has rounded it
        again = multiply_fp8(weight, rounded, bias, Epilogue(), None, is_scaled)
        assert isinstance(again, Tensor) and torch.equal(again, plain)

    residual = randn(num_tokens, 32, dtype=dtype)
    total = product + residual.double()
    for epilogue, added in (
        (Epilogue(reader_sums=True), product),
        (Epilogue(add_to=residual), total),
    ):
        out = multiply(epilogue)
        if isinstance(out, PartialSums):
            assert kernel in (FP8Kernel.GEMM, FP8Kernel.SCALED)
            out, added = out.sum(), product
        assert_near(out, added, dtype)
    if kernel is not FP8Kernel.GEMV:
        rows = torch.empty(num_tokens, 32, dtype=dtype, device=DEVICE)
        assert multiply(Epilogue(out=rows)) is rows
        assert_near(rows, product, dtype)


def test_a_token_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large token beside it does not make the scale of another one larger."""
    monkeypatch.setattr(fp8_matmul, "choose_fp8_kernel", lambda *_: FP8Kernel.SCALED)
    weight = make_weight(32, 256, 16, 64)
    x = randn(3, 256)
    alone = multiply_fp8(weight, x[1:2].clone(), None, Epilogue(), None, True)
    x[0] *= 1000.0
    together = multiply_fp8(weight, x, None, Epilogue(), None, True)
    assert isinstance(alone, Tensor) and isinstance(together, Tensor)
    assert torch.equal(together[1:2], alone)
    assert weight.values.dtype == E4M3
