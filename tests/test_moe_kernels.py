"""The kernels of mixtures of experts, and their PyTorch reference, against a loop over experts in
float64.

Without a GPU the Triton kernels run in Triton's interpreter (tests/conftest.py turns it on).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nanovllm.kernels import grouped_gemm, moe
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.expert_gemv import ExpertGemvConfig, expert_down_gemv, expert_gate_up_gemv
from nanovllm.kernels.grouped_gemm import GroupedConfig, expert_down, expert_gate_up, grouped_config
from nanovllm.kernels.moe import (
    MoEWeights,
    moe_gemv,
    moe_in_chunks,
    moe_partial_sums,
    moe_torch,
)
from nanovllm.kernels.moe_routing import Routing, route, route_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN, or a large integer, so that whoever reads what nobody wrote shows."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else 1 << 30)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def randn(*shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * std).to(DEVICE, dtype)


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# --- routing --------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 2, 19, 130])
@pytest.mark.parametrize("num_experts, top_k, hidden", [(8, 2, 32), (60, 4, 50), (128, 8, 300)])
@pytest.mark.parametrize("is_normalized", [True, False])
@both_dtypes
def test_routing(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    is_normalized: bool,
    dtype: torch.dtype,
) -> None:
    x = randn(num_tokens, hidden, dtype=dtype)
    router = randn(num_experts, hidden, dtype=dtype, std=0.2)
    scores = (x.double() @ router.double().t()).softmax(-1)
    weights, experts = scores.topk(top_k)
    if is_normalized:
        weights /= weights.sum(-1, keepdim=True)
    routing = route(x, router, top_k, is_normalized)
    assert torch.equal(routing.experts.long(), experts)
    assert_near(routing.weights, weights, torch.float32)
    torch_experts, torch_weights = route_torch(x, router, top_k, is_normalized)
    assert torch.equal(torch_experts, experts)
    assert_near(torch_weights, weights, torch.float32)
    if num_tokens > 1:
        check_buckets(routing)


def check_buckets(routing: Routing) -> None:
    """Every pair of a token and one of its experts is in the expert's bucket, and once."""
    chosen = routing.experts.flatten()
    for expert, count in enumerate(routing.counts.tolist()):
        pairs = routing.buckets[expert, :count].sort().values
        assert pairs.tolist() == (chosen == expert).nonzero().flatten().tolist()


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_of_tied_experts_the_first_are_chosen(num_tokens: int) -> None:
    """Experts 1, 4 and 6 tie for the second and third place; all others have no chance."""
    router = torch.zeros(8, 16, device=DEVICE)
    router[[1, 4, 6]] = 1.0
    router[5] = 2.0
    x = torch.ones(num_tokens, 16, device=DEVICE)
    routing = route(x, router, 3, True)
    assert routing.experts.tolist() == [[5, 1, 4]] * num_tokens
    everything_tied = route(x, torch.zeros_like(router), 3, True)
    assert everything_tied.experts.tolist() == [[0, 1, 2]] * num_tokens
    assert_near(everything_tied.weights, torch.full_like(x[:, :3], 1 / 3).double(), torch.float32)


@needs_triton
def test_a_token_of_nan_gets_experts_and_changes_no_other() -> None:
    x, router = randn(5, 16), randn(6, 16)
    expected = route(x, router, 3, True)
    x[2] = float("nan")
    routing = route(x, router, 3, True)
    assert sorted(routing.experts[2].tolist()) == [0, 1, 2]
    assert routing.weights[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(routing.experts[others], expected.experts[others])
    assert torch.equal(routing.weights[others], expected.weights[others])
    check_buckets(routing)


# --- the experts ----------------------------------------------------------------------------------


def make_routing(experts: Tensor, num_experts: int) -> Routing:
    """A routing to `experts` `[n, top_k]`; a bucket's order is random, as on a GPU."""
    num_tokens, top_k = experts.shape
    counts = torch.zeros(num_experts, dtype=torch.int32)
    buckets = torch.full((num_experts, num_tokens), 1 << 30, dtype=torch.int32)
    for pair in torch.randperm(num_tokens * top_k).tolist():
        expert = experts.flatten()[pair]
        buckets[expert, counts[expert]] = pair
        counts[expert] += 1
    weights = torch.rand(num_tokens, top_k)
    return Routing(*(t.to(DEVICE) for t in (experts.int(), weights, counts, buckets)))


def random_experts(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    return torch.rand(num_tokens, num_experts).argsort(-1)[:, :top_k]


def skewed_experts(num_tokens: int, num_experts: int, top_k: int) -> Tensor:
    """Nearly all tokens have the same experts, and half of all experts no token."""
    experts = torch.arange(top_k).expand(num_tokens, -1).clone()
    experts[::5] = random_experts(len(experts[::5]), num_experts // 2, top_k)
    return experts


ROUTINGS: dict[str, Callable[[int, int, int], Tensor]] = {
    "random": random_experts,
    "skewed": skewed_experts,
    "one-expert": lambda num_tokens, num_experts, top_k: torch.full((num_tokens, 1), 3),
    "last-experts": lambda num_tokens, num_experts, top_k: torch.arange(
        num_experts - top_k, num_experts
    ).expand(num_tokens, -1),
}


def gate_up64(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
    """`silu(gate) * up` for each pair, `[n * top_k, intermediate]`, one pair after the other."""
    out = []
    for token, chosen in enumerate(experts.tolist()):
        for expert in chosen:
            gate, up = (weight[expert].double() @ x[token].double()).chunk(2)
            out.append(gate / (1 + torch.exp(-gate)) * up)
    return torch.stack(out)


def down64(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """Partial sums `[top_k, n, hidden]`, one pair after the other."""
    num_tokens, top_k = routing.experts.shape
    out = torch.zeros(top_k, num_tokens, weight.shape[1], dtype=torch.float64, device=x.device)
    for token in range(num_tokens):
        for slot in range(top_k):
            product = (
                weight[routing.experts[token, slot]].double() @ x.double()[token * top_k + slot]
            )
            out[slot, token] = product * routing.weights[token, slot].double()
    return out


@needs_triton
@pytest.mark.parametrize("kind", ROUTINGS)
@pytest.mark.parametrize("num_tokens", [2, 37])
@pytest.mark.parametrize(
    "num_experts, top_k, hidden, intermediate", [(8, 2, 64, 32), (10, 3, 40, 72), (5, 2, 33, 25)]
)
@both_dtypes
def test_grouped_gemms(
    kind: str,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype,
) -> None:
    routing = make_routing(ROUTINGS[kind](num_tokens, num_experts, top_k), num_experts)
    num_pairs = routing.experts.numel()
    gate_up = randn(num_experts, 2 * intermediate, hidden, dtype=dtype, std=0.3)
    down = randn(num_experts, hidden, intermediate, dtype=dtype, std=0.3)
    x, activation = randn(num_tokens, hidden, dtype=dtype), randn(num_pairs, intermediate).to(dtype)
    assert_near(expert_gate_up(x, gate_up, routing), gate_up64(x, gate_up, routing.experts), dtype)
    assert_near(expert_down(activation, down, routing), down64(activation, down, routing), dtype)


CONFIGS = [
    GroupedConfig(16, 32, 16, 4, 2),
    GroupedConfig(32, 64, 32, 4, 2),
    GroupedConfig(64, 64, 64, 4, 2),
]


@needs_triton
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("has_tma", [True, False])
def test_grouped_gemms_of_other_tiles_and_without_tma(
    config: GroupedConfig, has_tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if has_tma and not grouped_gemm.has_tma():
        pytest.skip("this GPU has no TMA")
    monkeypatch.setattr(grouped_gemm, "has_tma", lambda: has_tma)
    routing = make_routing(skewed_experts(90, 8, 3), 8)
    gate_up, down = randn(8, 2 * 40, 48, std=0.3), randn(8, 48, 40, std=0.3)
    x, activation = randn(90, 48), randn(270, 40)
    assert_near(
        expert_gate_up(x, gate_up, routing, config),
        gate_up64(x, gate_up, routing.experts),
        torch.float32,
    )
    assert_near(
        expert_down(activation, down, routing, config),
        down64(activation, down, routing),
        torch.float32,
    )


def test_tiles_grow_with_the_tokens_of_an_expert() -> None:
    """Up to the size at which a tile has as many rows of x as of the weight."""

    def tokens(num_tokens: int, dtype: torch.dtype) -> int:
        return grouped_config(num_tokens * 8, 128, True, dtype, torch.device("cpu")).tokens

    sizes = (2, 64, 128, 256, 512, 5000)
    assert [tokens(size, torch.bfloat16) for size in sizes] == [16, 16, 16, 32, 64, 128]
    assert [tokens(size, torch.float32) for size in sizes] == [16, 16, 16, 32, 32, 32]


@pytest.mark.parametrize("kibibytes", [227, 99, 48])
@pytest.mark.parametrize("is_gated", [True, False])
def test_tiles_fit_the_shared_memory(
    kibibytes: int, is_gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped_gemm, "device_limits", lambda device: (100, kibibytes << 10))
    for num_tokens in (2, 200, 500, 5000):
        config = grouped_config(num_tokens * 8, 128, is_gated, torch.bfloat16, torch.device("cpu"))
        weight_rows = (2 if is_gated else 1) * config.rows
        stage_bytes = 2 * config.chunk * (weight_rows + config.tokens)
        assert config.num_stages >= 1 and config.num_stages * stage_bytes <= kibibytes << 10


@needs_triton
@pytest.mark.parametrize(
    "num_experts, top_k, hidden, intermediate", [(8, 2, 64, 32), (5, 3, 300, 264), (4, 1, 33, 25)]
)
@pytest.mark.parametrize("rows", [2, 8])
@both_dtypes
def test_one_token(
    num_experts: int, top_k: int, hidden: int, intermediate: int, rows: int, dtype: torch.dtype
) -> None:
    routing = make_routing(random_experts(1, num_experts, top_k), num_experts)
    gate_up = randn(num_experts, 2 * intermediate, hidden, dtype=dtype, std=0.1)
    down = randn(num_experts, hidden, intermediate, dtype=dtype, std=0.1)
    x, activation = randn(1, hidden, dtype=dtype), randn(top_k, intermediate, dtype=dtype)
    config = ExpertGemvConfig(rows, 4)
    out = expert_gate_up_gemv(x, gate_up, routing, config=config)
    assert_near(out, gate_up64(x, gate_up, routing.experts), dtype)
    norm = randn(hidden, dtype=dtype)
    normed = x.double() * (x.double().square().mean() + 0.1).rsqrt() * norm.double()
    out = expert_gate_up_gemv(x, gate_up, routing, norm, 0.1, config)
    assert_near(out, gate_up64(normed, gate_up, routing.experts), dtype)
    expected = down64(activation, down, routing).sum(0)
    assert_near(expert_down_gemv(activation, down, routing, config=config), expected, dtype)
    residual = randn(1, hidden, dtype=dtype)
    expected += residual.double()
    assert expert_down_gemv(activation, down, routing, residual, config) is residual
    assert_near(residual, expected, dtype)


# --- all of it ------------------------------------------------------------------------------------


def make_weights(
    num_experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    dtype: torch.dtype = torch.float32,
    is_normalized: bool = True,
) -> MoEWeights:
    return MoEWeights(
        router=randn(num_experts, hidden, dtype=dtype, std=0.3),
        gate_up=randn(num_experts, 2 * intermediate, hidden, dtype=dtype, std=0.2),
        down=randn(num_experts, hidden, intermediate, dtype=dtype, std=0.2),
        top_k=top_k,
        is_normalized=is_normalized,
    )


def moe64(x: Tensor, weights: MoEWeights) -> Tensor:
    """A loop over tokens and their experts, in float64."""
    scores = (x.double() @ weights.router.double().t()).softmax(-1)
    best, experts = scores.topk(weights.top_k)
    if weights.is_normalized:
        best /= best.sum(-1, keepdim=True)
    activation = gate_up64(x, weights.gate_up, experts)
    out = torch.zeros_like(x, dtype=torch.float64)
    for pair, expert in enumerate(experts.flatten().tolist()):
        product = weights.down[expert].double() @ activation[pair]
        out[pair // weights.top_k] += product * best.flatten()[pair]
    return out


def run_kernels(x: Tensor, weights: MoEWeights) -> Tensor:
    """The kernels, where a CPU would take the reference."""
    return moe_gemv(x, weights) if len(x) == 1 else moe_partial_sums(x, weights).sum(0)


@pytest.mark.parametrize("run", [moe_torch, pytest.param(run_kernels, marks=needs_triton)])
@pytest.mark.parametrize("num_tokens", [1, 2, 23])
@pytest.mark.parametrize("sizes", [(11, 4, 40, 24), (3, 3, 33, 17)], ids=str)
@pytest.mark.parametrize("is_normalized", [True, False])
@both_dtypes
def test_mixture_of_experts(
    run: Callable[[Tensor, MoEWeights], Tensor],
    num_tokens: int,
    sizes: tuple[int, int, int, int],
    is_normalized: bool,
    dtype: torch.dtype,
) -> None:
    weights = make_weights(*sizes, dtype=dtype, is_normalized=is_normalized)
    x = randn(num_tokens, sizes[2], dtype=dtype)
    assert_near(run(x, weights), moe64(x, weights), dtype)


@needs_triton
def test_the_norm_of_one_token_is_computed_on_the_way() -> None:
    """The residual is what is normalised."""
    weights, norm, hidden = make_weights(6, 2, 32, 24), randn(32), randn(1, 32)
    x = hidden.double() * (hidden.double().square().mean() + 0.1).rsqrt() * norm.double()
    expected = hidden.double() + moe64(x, weights)
    assert moe_gemv(hidden, weights, hidden, norm, 0.1) is hidden
    assert_near(hidden, expected, torch.float32)


@needs_triton
@pytest.mark.parametrize("num_tokens", [8, 9, 29])
@pytest.mark.parametrize("has_residual", [True, False])
def test_large_prefills_in_chunks(
    num_tokens: int, has_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe, "CHUNK_TOKENS", 8)
    weights = make_weights(6, 2, 32, 24)
    x = randn(num_tokens, 32)
    expected = moe64(x, weights)
    residual = randn(num_tokens, 32) if has_residual else None
    if residual is not None:
        expected += residual.double()
    out = moe_in_chunks(x, weights, residual)
    assert residual is None or out is residual
    assert_near(out, expected, torch.float32)


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 4])
def test_only_the_chosen_experts_are_read(num_tokens: int) -> None:
    """0 times NaN is NaN: an expert's weight that is read into any sum would show."""
    x = randn(num_tokens, 32)
    weights = MoEWeights(
        router=randn(12, 32),
        gate_up=randn(12, 2 * 24, 32, std=0.2),
        down=randn(12, 32, 24, std=0.2),
        top_k=2,
        is_normalized=True,
    )
    expected = moe_torch(x, weights)
    chosen, _ = route_torch(x, weights.router, 2, True)
    others = torch.ones(12, dtype=torch.bool, device=DEVICE)
    others[chosen.flatten()] = False
    assert others.sum() >= 4
    weights.gate_up[others] = float("nan")
    weights.down[others] = float("nan")
    out = moe_gemv(x, weights) if num_tokens == 1 else moe_partial_sums(x, weights).sum(0)
    assert_near(out, expected.double(), torch.float32)
