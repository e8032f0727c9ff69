"""The kernels that are for Hopper only, against their references."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._gluon import TILE_ROWS, can_run_gluon
from nanovllm.kernels.fp8_weight import FP8Weight, dequantize_fp8
from nanovllm.kernels.gate_mul import gate_mul_torch
from nanovllm.kernels.gate_up_gemm import can_fuse_gate, gate_up_gemm
from nanovllm.kernels.hopper_config import HopperGemmConfig
from nanovllm.kernels.hopper_gemm import hopper_gemm
from nanovllm.kernels.hopper_prefill import hopper_prefill
from nanovllm.kernels.int4_layout import Int4Weight, dequantize_int4, packed_width
from nanovllm.kernels.prefill_tiles import make_tiles, tiled_prefill_torch
from nanovllm.kernels.rms_norm import rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not can_run_gluon(), reason="needs a Hopper GPU"
    ),
]

BATCHES = {
    "mixed": [(17, 0), (1, 70), (400, 333), (5, 5), (1, 0), (129, 127), (128, 128), (300, 1000)],
    "fresh": [(1, 0), (64, 0), (65, 0), (127, 0), (128, 0), (129, 0), (1000, 0)],
    "one": [(700, 3000)],
    "many": [(1 + i * 37 % 300, i * 53 % 700) for i in range(64)],
}


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, dtype",
    [(16, 8, 128, torch.bfloat16), (14, 2, 64, torch.float16)],
    ids=["bf16", "fp16"],
)
@pytest.mark.parametrize("batch", BATCHES)
def test_hopper_prefill(
    batch: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """From the cache and, where all tokens are new, from the QKV output; what nobody has stored is
    NaN.
    """
    torch.manual_seed(0)
    block_size = 256
    num_padding = 40
    num_new = np.array([new for new, _ in BATCHES[batch]])
    num_total = np.array([sum(lengths) for lengths in BATCHES[batch]])
    num_tokens = int(num_new.sum())
    qkv = torch.randn(num_tokens + num_padding, heads + 2 * kv_heads, head_dim, device="cuda")
    q, k, v = qkv.to(dtype).split((heads, kv_heads, kv_heads), dim=1)
    width = -(-int(num_total.max()) // block_size)
    num_blocks = width * len(num_new)
    tables = torch.randperm(num_blocks).int().view(-1, width)
    cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), torch.nan).to("cuda", dtype)
    first_row = 0
    for seq, (new, total) in enumerate(zip(num_new, num_total, strict=True)):
        positions = torch.arange(total)
        blocks = tables[seq, positions // block_size].long().cuda()
        slots = positions.cuda() % block_size
        cache[:, blocks, slots] = torch.randn(2, total, kv_heads, head_dim).to("cuda", dtype)
        rows = slice(first_row, first_row + new)
        cache[0, blocks[-new:], slots[-new:]] = k[rows]
        cache[1, blocks[-new:], slots[-new:]] = v[rows]
        first_row += new
    made = make_tiles(num_new, num_total, num_tokens + num_padding, TILE_ROWS)
    tiles = torch.zeros(len(made) + 3, 4, dtype=torch.int32)
    tiles[: len(made)] = torch.from_numpy(made)
    expected = tiled_prefill_torch(q.float(), *cache.float(), tiles, tables.cuda(), 0.1)
    k_cache, v_cache = cache.flatten(1, 2)
    sources = [(k_cache, v_cache, tables.t().contiguous().cuda().t())]
    if batch == "fresh":
        k[num_tokens:] = torch.nan
        v[num_tokens:] = torch.nan
        sources.append((k, v, None))
    for keys, values, block_tables in sources:
        out = hopper_prefill(q, keys, values, tiles.cuda(), block_tables, block_size, 0.1)
        assert relative_error(out[:num_tokens], expected[:num_tokens]) < 5e-3
        assert not out[num_tokens:].any()  # padding


@pytest.mark.parametrize(
    "activation, dtype",
    [("silu", torch.bfloat16), ("gelu_tanh", torch.float16)],
    ids=["silu", "gelu_tanh"],
)
@pytest.mark.parametrize("num_tokens, inner, size", [(1024, 1024, 3072), (5000, 1000, 256)])
def test_gate_up_gemm(
    num_tokens: int, inner: int, size: int, activation: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(num_tokens, inner, device="cuda").to(dtype)
    weight = (torch.randn(2 * size, inner, device="cuda") * 2 * inner**-0.5).to(dtype)
    assert can_fuse_gate(x, weight, in_graph=True) == (num_tokens >= 2048)
    expected = gate_mul_torch(F.linear(x.double(), weight.double()), activation)
    out = gate_up_gemm(x, weight, activation)
    assert out.shape == (num_tokens, size)
    assert relative_error(out, expected) < (3e-3 if dtype == torch.bfloat16 else 1e-3)
    large = x * 10  # gates of up to 100: the power overflows
    expected = gate_mul_torch(F.linear(large.double(), weight.double()), activation)
    assert relative_error(gate_up_gemm(large, weight, activation), expected) < 3e-3


QUANTIZED = {
    "int4": lambda rows, columns: int4_weight(rows, columns, 128, has_zero_points=False),
    "int4, zeros": lambda rows, columns: int4_weight(rows, columns, 64, has_zero_points=True),
    "int4, small groups": lambda rows, columns: int4_weight(rows, columns, 32, True),
    "int4, rows": lambda rows, columns: int4_weight(rows, columns, columns, False),
    "int4, order": lambda rows, columns: int4_weight(rows, columns, 64, True)._replace(
        column_order=torch.randperm(columns, device="cuda").int()
    ),
    "fp8": lambda rows, columns: fp8_weight(rows, columns, 1, columns),
    "fp8, blocks": lambda rows, columns: fp8_weight(rows, columns, 16, 64),
}


def int4_weight(rows: int, columns: int, group_size: int, has_zero_points: bool) -> Int4Weight:
    """Its scales are those that bf16 has, so that the reference has the same."""
    groups = (rows, -(-columns // group_size))
    zero_points = None
    if has_zero_points:
        zero_points = torch.randint(0, 17, groups, device="cuda").to(torch.uint8)
    shape = (rows, packed_width(columns))
    scales = (torch.rand(groups, device="cuda") + 0.5).bfloat16().half() / 256
    packed = torch.randint(-(2**15), 2**15, shape, device="cuda").to(torch.int16)
    return Int4Weight(packed, scales, zero_points, columns, group_size)


def fp8_weight(rows: int, columns: int, row_grain: int, column_grain: int) -> FP8Weight:
    grains = (rows // row_grain, columns // column_grain)
    scales = torch.rand(grains, device="cuda") + 0.5
    values = torch.randn(rows, columns, device="cuda").to(torch.float8_e4m3fn)
    return FP8Weight(values, scales, row_grain, column_grain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", [(6144, 4096), (1040, 960)], ids=str)
def test_hopper_gemm(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    """Of every tile; of tokens and rows that fill no tile, and columns that fill no block."""
    torch.manual_seed(0)
    rows, columns = shape
    weight = QUANTIZED[name](rows, columns)
    dequantize = dequantize_fp8 if isinstance(weight, FP8Weight) else dequantize_int4
    matrix = dequantize(weight, torch.float64)
    bias = torch.randn(rows, device="cuda").to(dtype)
    for num_tokens in (2, 17, 64, 100, 300):
        x = torch.randn(num_tokens, columns, device="cuda").to(dtype)
        expected = F.linear(x.double(), matrix, bias.double())
        eps = torch.finfo(dtype).eps
        whole = hopper_gemm(x, weight, bias, reader_sums=False)
        assert len(whole) == 1
        assert relative_error(whole[0], expected) < eps
        for config in (
            HopperGemmConfig(16, 3, 8),
            HopperGemmConfig(16, 3, 7, rows=64),
            HopperGemmConfig(32, 3, 4, programs=2),
            HopperGemmConfig(64, 3, 5),
            HopperGemmConfig(64, 3, 3, programs=2),
            HopperGemmConfig(128, 3, 4),
            HopperGemmConfig(256, 3, 2),
        ):
            sums = hopper_gemm(x, weight, bias, config=config)
            assert len(sums) == 3
            assert relative_error(sums.double().sum(0), expected) < 2 * eps, config


@pytest.mark.parametrize("rows", [64, 128])
@pytest.mark.parametrize("columns", [64, 128, 320, 4096])
def test_hopper_gemm_of_few_blocks(columns: int, rows: int) -> None:
    """A program with fewer blocks than stages, or with one block only, and more tiles than
    programs: not all of the ring is filled early, and of the first tile only.
    """
    torch.manual_seed(0)
    weight = fp8_weight(40000, columns, 1, columns)
    x = torch.randn(16, columns, device="cuda").bfloat16()
    expected = F.linear(x.double(), dequantize_fp8(weight, torch.float64))
    for splits in (1, 2, 32):
        config = HopperGemmConfig(16, splits, 6, rows)
        for _ in range(3):
            sums = hopper_gemm(x, weight, config=config)
            assert relative_error(sums.double().sum(0), expected) < 0.02


@pytest.mark.parametrize(
    "name, rows, dtype",
    [
        *((name, 1040, torch.bfloat16) for name in QUANTIZED),
        ("fp8", 24576, torch.bfloat16),
        ("int4", 24576, torch.float16),
    ],
    ids=str,
)
def test_hopper_gemm_with_activation(name: str, rows: int, dtype: torch.dtype) -> None:
    """The gate and up projection of rows that fill no tile, by the tiles chosen and by others."""
    torch.manual_seed(0)
    columns = 960
    weight = QUANTIZED[name](rows, columns)
    dequantize = dequantize_fp8 if isinstance(weight, FP8Weight) else dequantize_int4
    matrix = dequantize(weight, torch.float64)
    bias = torch.randn(rows, device="cuda").to(dtype)
    for num_tokens, activation in ((2, "silu"), (16, "gelu_tanh"), (50, "silu"), (130, "silu")):
        x = torch.randn(num_tokens, columns, device="cuda")
        x = (x * 2 / F.linear(x[:2].double(), matrix).std()).to(dtype)
        expected = gate_mul_torch(F.linear(x.double(), matrix, bias.double()), activation)
        for config in (None, HopperGemmConfig(16, 1, 8, rows=64), HopperGemmConfig(64, 1, 3)):
            out = hopper_gemm(x, weight, bias, activation=activation, config=config)
            assert out.shape == (1, num_tokens, rows // 2)
            assert relative_error(out[0], expected) < 2 * torch.finfo(dtype).eps, config


@pytest.mark.parametrize("name", ["int4", "fp8, blocks"])
def test_hopper_gemm_in_a_graph(name: str) -> None:
    """Its launches overlap: each reads what the one before wrote."""
    torch.manual_seed(0)
    weight = QUANTIZED[name](1024, 1024)
    x = torch.randn(64, 1024, device="cuda").bfloat16()
    ones = torch.ones(1024, device="cuda").bfloat16()

    def run() -> torch.Tensor:
        out = x
        for _ in range(20):
            product = hopper_gemm(out, weight).sum(0)
            out = hopper_gemm(product / product.norm() * 256, weight, reader_sums=False)[0]
            out = rms_norm(out, ones, 1e-6)  # launched early, too, and starts the next one early
        return out

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(5):
        graph.replay()
        assert torch.equal(out, expected)
