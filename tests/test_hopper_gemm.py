"""What surrounds `hopper_gemm`: which products it is asked for, and how it reads a gate and an up
projection. The kernel itself needs a Hopper GPU (tests/gpu/test_hopper_gpu.py).
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.kernels import _gluon, gate_up_gemm, hopper_gemm
from nanovllm.kernels.fp8_weight import E4M3, FP8Weight
from nanovllm.kernels.gate_mul import gate_mul_torch
from nanovllm.kernels.hopper_consume import weight_row
from nanovllm.layers.activation import GateUpLinear
from nanovllm.quantization import fp8_matmul
from nanovllm.quantization.awq import AWQ
from nanovllm.quantization.fp8 import FP8Rows
from nanovllm.quantization.fp8_blocks import FP8Blocks
from nanovllm.quantization.weight_format import WeightFormat

pytestmark = pytest.mark.skipif(not _gluon.HAS_GLUON, reason="needs Triton 3.6")
INT4 = AWQ(group_size=32, is_symmetric=False)
FP8 = FP8Rows(has_row_scales=True)
FP8_SCALED = FP8Rows(has_row_scales=True, quantizes_input=True)
BLOCKS = FP8Blocks((128, 128), "weight_scale_inv")


class OnGPU(torch.Tensor):
    """An input for which kernels are chosen, though it is not on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has a Hopper GPU, as far as the choice of kernels knows."""
    for module in (hopper_gemm, gate_up_gemm):
        monkeypatch.setattr(module, "can_run_gluon", lambda: True)
    monkeypatch.setattr(fp8_matmul, "device_limits", lambda device: (132, 227 << 10))


def make_layer(weight_format: WeightFormat, size: int, in_size: int) -> GateUpLinear:
    layer = GateUpLinear(in_size, size)
    shards = [layer.shard(0), layer.shard(1)]
    layer.use_format(weight_format, shards)
    return layer


@pytest.mark.parametrize("weight_format", [INT4, FP8], ids=["int4", "fp8"])
def test_a_model_on_the_cpu_of_such_a_machine(hopper: None, weight_format: Any) -> None:
    torch.manual_seed(0)
    layer = make_layer(weight_format, 48, 64)
    for shard in layer.shard(0), layer.shard(1):
        weight_format.quantize(layer, torch.randn(48, 64), shard)
    x = torch.randn(5, 64).bfloat16()
    product = x.float() @ weight_format.dequantize(layer, torch.float32).t()
    out = layer(x).float()
    assert torch.allclose(out, gate_mul_torch(product), rtol=0.05, atol=0.5)


@pytest.mark.parametrize(
    "weight_format, size, fused, plain",
    [
        (INT4, 512, (1, 2, 16, 64, 65, 512, 2047, 8192), (2048, 8191)),
        (INT4, 24, (1, 2, 2047), (2048, 8192)),
        (INT4, 20, (1,), (2, 64, 2047, 8192)),  # groups of eight rows are not whole
        (FP8, 512, (1, 2, 64, 65, 2047, 8192), (2048, 8191)),
        (FP8, 20, (1,), (2, 64, 2047, 8192)),
        (FP8_SCALED, 512, (1, 2, 64), (65, 2047, 8192)),  # the rest is multiplied in FP8
        (BLOCKS, 512, (1, 2, 64, 65, 2047), (2048,)),
        (BLOCKS, 12288, (1, 65, 2047), (2, 64)),  # `fp8_gemm` is faster
    ],
)
def test_where_the_activation_is_applied(
    hopper: None, weight_format: Any, size: int, fused: tuple[int, ...], plain: tuple[int, ...]
) -> None:
    """Of one rank without a CUDA graph."""
    layer = make_layer(weight_format, size, 1024)
    for num_tokens in fused + plain:
        x = torch.empty(num_tokens, 1024, dtype=torch.bfloat16).as_subclass(OnGPU)
        applies = weight_format.applies_activation(layer, x)
        assert applies == (num_tokens in fused), num_tokens
        if num_tokens > 1:  # exact products are not for tensor cores
            exact = torch.empty(num_tokens, 1024).as_subclass(OnGPU)
            assert not weight_format.applies_activation(layer, exact)


@pytest.mark.parametrize("size", [8, 24, 520])
@pytest.mark.parametrize("tile_rows", [64, 128])
def test_tiles_of_a_gate_and_an_up_projection(
    size: int, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TMA reads the rows that `weight_row` names: those of the scales, of the bias and of x."""

    def describe(matrix: Any, shape: Any, strides: Any, block: Any, layout: Any) -> Any:
        assert block[0] * block[1] * block[2] == tile_rows
        return matrix.as_strided(shape, strides)

    monkeypatch.setattr(hopper_gemm, "GluonDescriptor", describe)
    matrix = torch.arange(2 * size * 64, dtype=torch.int16).view(2 * size, 64)
    seen = hopper_gemm.describe_gated(matrix, [tile_rows, 32]).reshape(2 * size, 64)
    work: Any = SimpleNamespace(out_size=2 * size)
    rows = weight_row.fn(torch.arange(2 * size), work, "silu")
    assert torch.equal(rows.sort().values, torch.arange(2 * size))
    assert torch.equal(seen, matrix[rows])
    pairs = rows.view(-1, 2, 8)
    assert torch.equal(pairs[:, 0].flatten(), torch.arange(size))  # outputs are in order
    assert torch.equal(pairs[:, 1], pairs[:, 0] + size)


class Launches:
    """Stands for the kernel, and counts how often it is launched."""

    def __init__(self) -> None:
        self.num = 0

    def __getitem__(self, grid: Any) -> Any:
        return self

    def __call__(self, *args: Any, **options: Any) -> None:
        self.num += 1


@pytest.mark.parametrize("num_tokens", [1, 2, 17, 130])
def test_an_activated_product_can_be_read_in_whole_tiles(
    num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The down projection reads it by TMA, which is slow where memory ends inside of a tile."""
    launches = Launches()
    monkeypatch.setattr(hopper_gemm, "_hopper_gemm_kernel", launches)
    weight = FP8Weight(torch.empty(64, 128, dtype=E4M3), torch.empty(64), 1, 128)
    x = torch.empty(num_tokens, 128, dtype=torch.bfloat16)
    out = hopper_gemm.hopper_gemm(x, weight, activation="silu")
    assert launches.num == 1
    assert out.shape == (1, num_tokens, 32) and out.is_contiguous()
    tile = 16
    while tile < min(num_tokens, 128):
        tile *= 2
    assert hopper_gemm.readable_rows(out[0], tile) == max(num_tokens, tile)
