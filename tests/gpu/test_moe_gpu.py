"""Mixtures of experts on a GPU: the kernels at the size of Qwen3-30B-A3B, and the engine against
`transformers`.
"""

from typing import Any

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, make_llm, random_prompts
from torch import Tensor

from nanovllm.kernels.moe import (
    CHUNK_TOKENS,
    MoEWeights,
    moe_gemv,
    moe_in_chunks,
    moe_partial_sums,
    moe_torch,
)
from nanovllm.kernels.moe_routing import route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

HIDDEN, INTERMEDIATE, NUM_EXPERTS, TOP_K = 2048, 768, 128, 8
VOCAB, NUM_TOKENS = 1000, 32


def randn(*shape: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * std


@pytest.fixture(scope="module")
def weights() -> MoEWeights:
    torch.manual_seed(0)
    return MoEWeights(
        router=randn(NUM_EXPERTS, HIDDEN, std=0.05),
        gate_up=randn(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN, std=HIDDEN**-0.5),
        down=randn(NUM_EXPERTS, HIDDEN, INTERMEDIATE, std=INTERMEDIATE**-0.5),
        top_k=TOP_K,
        is_normalized=True,
    )


def run_kernels(x: Tensor, weights: MoEWeights) -> Tensor:
    if len(x) == 1:
        return moe_gemv(x, weights)
    if len(x) > CHUNK_TOKENS:
        return moe_in_chunks(x, weights)
    return moe_partial_sums(x, weights).sum(0)


def check(out: Tensor, x: Tensor, weights: MoEWeights) -> None:
    """Rounding to bfloat16 is an error of 0.2% at each of three results; another choice of experts,
    which only two nearly equal scores excuse, is one of 30% and more.
    """
    expected = moe_torch(x.float(), weights)
    errors = (out.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.median() < 0.01
    assert (errors > 0.02).sum() <= 0.002 * len(x)


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 64, 129, 300, 1000, 5000])
def test_kernels_at_the_size_of_a_real_model(num_tokens: int, weights: MoEWeights) -> None:
    exact = weights._replace(
        router=weights.router.float(), gate_up=weights.gate_up.float(), down=weights.down.float()
    )
    x = randn(num_tokens, HIDDEN)
    check(run_kernels(x, weights), x, exact)
    x[1:] = x[0]  # all tokens go to the same experts
    check(run_kernels(x, weights), x, exact)


@pytest.mark.parametrize("num_tokens", [2, 64, 300])
def test_a_graph_follows_the_routing(num_tokens: int, weights: MoEWeights) -> None:
    """What is launched is recorded once; where the tokens go is decided at each replay. The bits
    are those of an ordinary launch, although the order of an expert's tokens is by chance.
    """
    x = randn(num_tokens, HIDDEN)
    run_kernels(x, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_kernels(x, weights)
    for inputs in (randn(num_tokens, HIDDEN), randn(1, HIDDEN).expand(num_tokens, -1)):
        x.copy_(inputs)
        graph.replay()
        assert torch.equal(out, run_kernels(x, weights))


@pytest.mark.parametrize("num_tokens", [1, 64, 1000])
def test_ties_are_broken_as_by_topk(num_tokens: int) -> None:
    """Logits are whole numbers from -4 to 4: nearly every choice is one among equals."""
    x = torch.randint(-1, 2, (num_tokens, 4), device="cuda").bfloat16()
    router = torch.randint(-1, 2, (NUM_EXPERTS, 4), device="cuda").bfloat16()
    x, router = (torch.nn.functional.pad(t, (0, 60)) for t in (x, router))
    scores = (x.float() @ router.float().t()).softmax(-1)
    expected = scores.topk(TOP_K).indices.sort().values
    assert torch.equal(route(x, router, TOP_K, True).experts.long().sort().values, expected)


# --- the engine -----------------------------------------------------------------------------------

Case = tuple[Checkpoint, list[list[int]], list[list[int]]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Qwen3-MoE with a dense layer, its `transformers` model on the GPU in float32; prompts; their
    completions.
    """
    saved = make_checkpoint(
        tmp_path_factory.mktemp("moe"),
        architecture="Qwen3MoeForCausalLM",
        std=256**-0.5,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        head_dim=64,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        moe_intermediate_size=96,
        num_experts=32,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    checkpoint = Checkpoint(saved.path, saved.model.to("cuda"))
    prompts = random_prompts(0, [1, 2, 17, 63, 129, 256, 300, 513], VOCAB)
    tails = random_prompts(1, [3, 20], VOCAB)
    prompts += [prompts[6][:64] + tails[0], prompts[6][:256] + tails[1]]
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS, min_margin=2e-5)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_transformers(case: Case, dtype: str, eager: bool) -> None:
    checkpoint, prompts, expected = case
    options: dict[str, Any] = dict(
        device="cuda", max_model_len=1024, kvcache_block_size=256, num_kvcache_blocks=100
    )
    llm = make_llm(checkpoint.path, dtype=dtype, enforce_eager=eager, **options)
    try:
        assert bool(llm.model_runner.decode_graphs.sizes) != eager
        runs = [
            generate_ids(llm, prompts, greedy(NUM_TOKENS)),
            generate_ids(llm, prompts, greedy(NUM_TOKENS)),  # with prefix hits
            # One at a time: one token in a step.
            [generate_ids(llm, [prompt], greedy(NUM_TOKENS))[0] for prompt in prompts],
        ]
    finally:
        llm.exit()
    for completions in runs:
        if dtype == "float32":
            assert completions == expected
        else:
            assert share_of_good_choices(checkpoint, prompts, completions) > 0.98


def share_of_good_choices(
    checkpoint: Checkpoint, prompts: list[list[int]], completions: list[list[int]]
) -> float:
    """Of the chosen tokens, each given the tokens before it, how many have a logit near the largest
    in float32. Not all: where two experts score nearly alike, rounding may choose the other one.
    """
    good = []
    for prompt, tokens in zip(prompts, completions, strict=True):
        logits = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1)
        good.append((logits.max(dim=1).values - chosen) / logits.std(dim=1) < 0.2)
    return torch.cat(good).float().mean().item()


def test_the_share_of_good_choices_can_tell(case: Case) -> None:
    """The right tokens after another prompt are nearly all bad."""
    checkpoint, prompts, expected = case
    assert share_of_good_choices(checkpoint, prompts, expected) == 1
    assert share_of_good_choices(checkpoint, prompts, expected[1:] + expected[:1]) < 0.3
