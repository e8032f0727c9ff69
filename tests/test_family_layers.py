"""What single families have of their own: layers cut over ranks without any process, and kernels
against their references.
"""

from typing import Any

import pytest
import torch
from test_layers import empty, load, on_ranks
from torch import Tensor, nn
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.projection_norm import (
    projection_norm,
    projection_norm_torch,
    sums_of_squares,
    sums_of_squares_torch,
)
from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.linear import QKVParallelLinear
from nanovllm.models.olmo2 import ProjectionNorm
from nanovllm.models.phi3 import Phi3GateUpLinear, Phi3QKVLinear
from nanovllm.utils.loader import expected_tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
HIDDEN, HEAD_DIM = 10, 6
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
all_sizes = pytest.mark.parametrize("size", [1, 2, 4])
all_kv_heads = pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- Phi: what is merged in the checkpoint, too ---------------------------------------------------


class FileSlice:
    """A tensor in a file, as safetensors shows it; counts the rows that are read."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.rows_read = 0

    def get_shape(self) -> list[int]:
        return list(self.values.shape)

    def __getitem__(self, index: Any) -> Tensor:
        read = self.values[index]
        self.rows_read += len(read)
        return read


def load_stacked(layer: nn.Module, stacked: Tensor) -> None:
    """Each rank reads its own rows of the tensor, and no others."""
    file_slice = FileSlice(stacked)
    load(layer.weight, file_slice)
    assert file_slice.rows_read == len(layer.weight)
    assert not layer.weight.isnan().any()


@all_sizes
@all_kv_heads
def test_stacked_qkv_is_that_of_three_tensors(size: int, kv_heads: int) -> None:
    heads = 8
    full = {"q": torch.randn(heads * HEAD_DIM, HIDDEN)}
    full |= {name: torch.randn(kv_heads * HEAD_DIM, HIDDEN) for name in "kv"}

    def make(kind: type[QKVParallelLinear]) -> QKVParallelLinear:
        return empty(kind(HIDDEN, HEAD_DIM, heads, kv_heads, False))

    stacked_layers = on_ranks(size, lambda: make(Phi3QKVLinear))
    layers = on_ranks(size, lambda: make(QKVParallelLinear))
    for stacked, layer in zip(stacked_layers, layers, strict=True):
        load_stacked(stacked, torch.cat([full[name] for name in "qkv"]))
        for name in "qkv":
            load(layer.weight, full[name], name)
        assert torch.equal(stacked.weight, layer.weight)


@all_sizes
def test_stacked_gate_and_up_are_those_of_two_tensors(size: int) -> None:
    gate, up = torch.randn(16, HIDDEN), torch.randn(16, HIDDEN)
    stacked_layers = on_ranks(size, lambda: empty(Phi3GateUpLinear(HIDDEN, 16)))
    layers = on_ranks(size, lambda: empty(GateUpLinear(HIDDEN, 16)))
    for stacked, layer in zip(stacked_layers, layers, strict=True):
        load_stacked(stacked, torch.cat((gate, up)))
        load(layer.weight, gate, 0)
        load(layer.weight, up, 1)
        assert torch.equal(stacked.weight, layer.weight)


def test_a_stacked_tensor_has_one_name_and_one_shape() -> None:
    layer = Phi3GateUpLinear(HIDDEN, 16)
    names = expected_tensors(nn.ModuleDict({"gate_up_proj": layer}), names=())
    assert list(names) == ["gate_up_proj.weight"]
    for shape in ((16, HIDDEN), (32, HIDDEN + 1)):
        with pytest.raises(ValueError, match="asks for"):
            load(layer.weight, torch.zeros(shape))


# --- OLMo: a norm over the heads of all ranks -----------------------------------------------------


@all_sizes
@all_kv_heads
def test_projections_are_normalised_over_all_ranks(size: int, kv_heads: int) -> None:
    """Also where several ranks hold the same KV head, which must count once."""
    heads = 8
    eps = 1e-2
    full = {"q": torch.randn(5, heads * HEAD_DIM), "k": 3 * torch.randn(5, kv_heads * HEAD_DIM)}
    expected = {}
    weights = {}
    for name, x in full.items():
        theirs = Olmo2RMSNorm(x.shape[1], eps).requires_grad_(False)
        theirs.weight.copy_(torch.randn(x.shape[1]))
        weights[name] = theirs.weight
        expected[name] = theirs(x)

    local_sizes = {
        "q": heads // size * HEAD_DIM,
        "k": max(kv_heads // size, 1) * HEAD_DIM,
    }
    norms = {
        name: on_ranks(
            size,
            lambda name=name: empty(
                ProjectionNorm(QKVParallelLinear(8, HEAD_DIM, heads, kv_heads, False).shard(name))
            ),
        )
        for name in full
    }
    rows = []
    for rank in range(size):
        kv_first = (rank * kv_heads // size) * HEAD_DIM
        q = full["q"][:, rank * local_sizes["q"] :][:, : local_sizes["q"]]
        k = full["k"][:, kv_first : kv_first + local_sizes["k"]]
        rows.append(torch.cat((q, k, k), dim=1))  # k again, as v: it is left as it is
        for name in full:
            load(norms[name][rank].weight, weights[name])
    sizes = tuple(local_sizes.values())
    sums = torch.stack([sums_of_squares_torch(qkv, *sizes) for qkv in rows]).sum(0)
    for rank, qkv in enumerate(rows):
        q_weight, k_weight = (norms[name][rank].weight for name in "qk")
        projection_norm_torch(qkv, q_weight, k_weight, eps, sums if size > 1 else None, size)
        kv_first = (rank * kv_heads // size) * HEAD_DIM
        q, k, v = qkv.split((*sizes, sizes[1]), dim=1)
        wanted_q = expected["q"][:, rank * sizes[0] : (rank + 1) * sizes[0]]
        torch.testing.assert_close(q, wanted_q)
        torch.testing.assert_close(k, expected["k"][:, kv_first : kv_first + sizes[1]])
        assert torch.equal(v, full["k"][:, kv_first : kv_first + sizes[1]])


@needs_triton
@both_dtypes
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_rows, q_size, k_size", [(1, 48, 12), (5, 96, 96), (3, 1500, 300)])
def test_projection_norm_kernel(
    num_rows: int, q_size: int, k_size: int, num_ranks: int, dtype: torch.dtype
) -> None:
    qkv = torch.randn(num_rows, q_size + 2 * k_size + 4).to(DEVICE, dtype)[:, :-4]
    weights = [torch.randn(n).to(DEVICE, dtype) for n in (q_size, k_size)]
    expected = qkv.clone()
    sums = None
    if num_ranks > 1:
        sums = sums_of_squares(qkv, q_size, k_size)
        wanted_sums = sums_of_squares_torch(qkv, q_size, k_size)
        torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-5)
        sums = sums * num_ranks * torch.rand_like(sums)  # the others have other heads
    projection_norm_torch(expected, *weights, 1e-3, sums, num_ranks)
    projection_norm(qkv, *weights, 1e-3, sums, num_ranks)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(qkv, expected, rtol=tolerance, atol=tolerance)
