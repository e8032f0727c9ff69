"""Mixtures of experts: the layer in the residual stream, loading and sharding, and the tokens of
`transformers`. (More of these are in test_families.py, the kernels in test_moe_kernels.py.)
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import generate_ids, greedy, make_checkpoint, make_llm, random_prompts
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanovllm.kernels import moe
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.moe import MoEWeights, moe_gemv, moe_partial_sums
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.residual import ResidualStream
from nanovllm.models import sparse_moe as moe_layer
from nanovllm.models.sparse_moe import SparseMoE
from nanovllm.utils.tensor_parallel import tensor_parallel

needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
QWEN3_MOE: dict[str, Any] = dict(
    architecture="Qwen3MoeForCausalLM",
    head_dim=16,
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=3,
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- the layer ------------------------------------------------------------------------------------


def fill(module: nn.Module) -> Any:
    for param in module.parameters():
        param.data.copy_(torch.randn(param.shape) * 0.2)
    return module


def make_layer() -> SparseMoE:
    return fill(SparseMoE(32, 24, num_experts=6, top_k=2, is_normalized=True))


class OnGPU(torch.Tensor):
    """A tensor for which the layers take the kernels. They run in the interpreter."""

    is_cuda = True  # type: ignore[assignment]


@needs_interpreter
@pytest.mark.parametrize("num_tokens", [1, 5, 20])  # the last in chunks
@pytest.mark.parametrize("kind", [torch.Tensor, OnGPU])
def test_the_residual_stream_takes_it_as_a_linear_layer(
    num_tokens: int, kind: type[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """h += moe(norm(h)); norm(h). A single token's norm is computed by the kernels of the layer."""
    layer, first, second = make_layer(), fill(RMSNorm(32, 1e-5)), fill(RMSNorm(32, 1e-3))
    hidden = torch.randn(num_tokens, 32)
    output = layer(first(hidden))
    expected = hidden + output
    expected_norm = second(expected)
    monkeypatch.setattr(moe, "CHUNK_TOKENS", 8)
    monkeypatch.setattr(moe_layer, "CHUNK_TOKENS", 8)
    if kind is OnGPU:
        monkeypatch.setattr(moe_layer, "moe_torch", None)  # it is not for a GPU
    calls: list[int] = []

    def on_normed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return out.as_subclass(kind)

    first.register_forward_hook(on_normed)
    stream = ResidualStream(hidden.clone().as_subclass(kind))
    stream.add(layer, stream.normed(first))
    out = stream.normed(second).values()
    torch.testing.assert_close(stream.hidden.as_subclass(Tensor), expected)
    torch.testing.assert_close(out.as_subclass(Tensor), expected_norm)
    is_fused = kind is OnGPU and num_tokens == 1
    assert len(calls) == (0 if is_fused else 1)
    complete = layer(first(hidden.as_subclass(kind)))
    torch.testing.assert_close(complete.as_subclass(Tensor), output)


def checkpoint_of(layer: SparseMoE, is_fused: bool) -> dict[str, Tensor]:
    """The layer's tensors, by the names that a checkpoint gives them."""
    experts = layer.experts
    if is_fused:
        return {
            "experts.gate_up_proj": experts.gate_up_proj,
            "experts.down_proj": experts.down_proj,
        }
    tensors = {}
    for expert, (gate_up, down) in enumerate(
        zip(experts.gate_up_proj, experts.down_proj, strict=True)
    ):
        gate, up = gate_up.chunk(2)
        tensors[f"experts.{expert}.gate_proj.weight"] = gate
        tensors[f"experts.{expert}.up_proj.weight"] = up
        tensors[f"experts.{expert}.down_proj.weight"] = down
    return tensors


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("is_fused", [True, False])
def test_the_ranks_shards_add_up(num_ranks: int, is_fused: bool) -> None:
    layer = make_layer()
    tensors, x = checkpoint_of(layer, is_fused), torch.randn(7, 32)
    total = torch.zeros(7, 32)
    for rank in range(num_ranks):
        with tensor_parallel(rank, num_ranks):
            shard = SparseMoE(32, 24, num_experts=6, top_k=2, is_normalized=True)
        shard.gate.weight.weight_loader(shard.gate.weight, layer.gate.weight)
        loaders = shard.experts.checkpoint_tensors("experts", tensors)
        assert loaders.keys() == tensors.keys()
        for name, load in loaders.items():
            load(tensors[name])
        assert shard.experts.down_proj.shape == (6, 32, 24 // num_ranks)
        total += shard(x)
    torch.testing.assert_close(total, layer(x))


def test_ranks_that_cannot_share_an_expert_are_refused() -> None:
    with (
        tensor_parallel(0, 5),
        pytest.raises(ValueError, match=r"moe_intermediate_size \(24\).*tensor_parallel_size 5"),
    ):
        make_layer()


# --- the model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A checkpoint as transformers saves it, prompts, and their completions."""
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("moe"), **QWEN3_MOE, seed=3)
    prompts = random_prompts(0, [1, 5, 17, 40])
    return checkpoint.path, prompts, checkpoint.complete(prompts, 12)


@pytest.fixture
def fused(case: tuple[str, Any, Any], tmp_path: Path) -> Iterator[Path]:
    """The same checkpoint with two tensors for all experts of a layer."""
    tensors = load_file(Path(case[0]) / "model.safetensors")
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in tensors
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        halves = {
            kind: torch.stack([tensors.pop(f"{prefix}.{i}.{kind}_proj.weight") for i in range(8)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((halves["gate"], halves["up"]), dim=1)
        tensors[f"{prefix}.down_proj"] = halves["down"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((Path(case[0]) / "config.json").read_bytes())
    yield tmp_path


def outputs_of(
    path: str | Path, prompts: list[list[int]], num_tokens: int, **options: Any
) -> list[list[int]]:
    llm = make_llm(str(path), **options)
    try:
        return generate_ids(llm, prompts, greedy(num_tokens))
    finally:
        llm.exit()


def test_experts_that_are_stored_in_one_tensor(case: tuple[str, Any, Any], fused: Path) -> None:
    _, prompts, expected = case
    assert outputs_of(fused, prompts, 12) == expected


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_tensor_of_all_experts_that_is_missing_or_of_another_shape(
    case: tuple[str, Any, Any], fused: Path, name: str
) -> None:
    file, full_name = fused / "model.safetensors", f"model.layers.0.mlp.experts.{name}"
    tensors = load_file(file)
    tensors[full_name] = tensors[full_name][:, :-1].contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"'{full_name}' has shape"):
        make_llm(str(fused))
    del tensors[full_name]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="missing: .*experts"):
        make_llm(str(fused))


def run_kernels(x: Tensor, weights: MoEWeights) -> Tensor:
    """The kernels, where a CPU would take the reference."""
    return moe_gemv(x, weights) if len(x) == 1 else moe_partial_sums(x, weights).sum(0)


@needs_interpreter
def test_the_kernels_give_the_tokens_of_transformers(
    case: tuple[str, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompts, expected = case
    monkeypatch.setattr(moe_layer, "moe_torch", run_kernels)
    assert outputs_of(path, prompts, 6) == [tokens[:6] for tokens in expected]


@pytest.mark.parametrize("are_all_tied", [True, False])
def test_tied_routing_scores(tmp_path: Path, are_all_tied: bool) -> None:
    """Pairs of experts tie, so that with three experts a token one of a pair is left out; or all
    experts tie. `transformers` breaks ties by torch.topk, and so must we.
    """
    checkpoint = make_checkpoint(tmp_path, **QWEN3_MOE, save=False, seed=4)
    for layer in checkpoint.model.model.layers:
        router = layer.mlp.gate.weight
        router[1::2] = router[::2]
        if are_all_tied:
            router.zero_()
    checkpoint.model.save_pretrained(tmp_path)
    prompts = random_prompts(1, [1, 9, 30, 55])
    expected = checkpoint.complete(prompts, 12)
    assert outputs_of(tmp_path, prompts, 12) == expected
    assert outputs_of(tmp_path, prompts, 12, max_num_batched_tokens=13) == expected
    # Ranks must choose alike.
    assert outputs_of(tmp_path, prompts, 12, tensor_parallel_size=2) == expected
    llm = make_llm(str(tmp_path), max_model_len=68, kvcache_block_size=4, num_kvcache_blocks=17)
    for _ in range(2):  # the second time with prefix hits
        assert generate_ids(llm, prompts, greedy(12)) == expected
    assert llm.scheduler.counters["preemptions"] > 1
