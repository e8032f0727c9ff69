"""The whole engine on a GPU: backends, CUDA graphs and `transformers` agree, in float32 and in bfloat16.

In float32 the tokens are equal. In bfloat16 a choice between two close logits may fall either way, and all
that follows differs then, so tokens cannot be compared with another run's. Instead every chosen token is
checked, given the tokens before it: `transformers`, in float32 and on the same weights (they are all bfloat16
numbers), computes the logits of prompt and completion, and the chosen token's logit must be within a
tolerance of the largest.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    QWEN2,
    QWEN3,
    Checkpoint,
    assert_idle,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import LLM, SamplingParams
from nanovllm.kernels import flash_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DEVICE = "cuda"
VOCAB, NUM_TOKENS = 1000, 32
# In standard deviations of the logits. Rounding to 8 bits is an error of 0.2% at each of some ten results a
# layer that are rounded one after the other, so two layers make about 1%; over thousands of choices the worst
# was 0.04 on a CPU, and a GPU rounds a few results more. A token chosen by a wrong mask, position or slot is
# off by 2 to 4.
TOLERANCE = 0.2
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 511, 512, 513, 700]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-128": dict(architecture=QWEN3, num_attention_heads=8, num_key_value_heads=2, head_dim=128),
    "qwen3-64-tied": dict(architecture=QWEN3, num_attention_heads=4, head_dim=64, tie_word_embeddings=True),
    "qwen2-64": dict(architecture=QWEN2, num_attention_heads=4, num_key_value_heads=1),
    "qwen2-128": dict(architecture=QWEN2, num_attention_heads=6, num_key_value_heads=6, head_dim=128),
}
Case = tuple[Checkpoint, list[list[int]], list[list[int]]]


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, its `transformers` model on the GPU in float32; prompts; their greedy completions."""
    name = request.param
    # Weights of deviation 1 / sqrt(hidden_size) keep every result's spread near 1, as in a trained model:
    # larger ones make attention so peaked that the rounding of a score decides it.
    saved = make_checkpoint(
        tmp_path_factory.mktemp(name), seed=list(SHAPES).index(name), std=256**-0.5, vocab_size=VOCAB,
        hidden_size=256, intermediate_size=512, **SHAPES[name],
    )  # fmt: skip
    checkpoint = Checkpoint(saved.path, saved.model.to(DEVICE))
    prompts = random_prompts(0, LENGTHS, VOCAB)
    prompts += [
        prompts[15][:n] + tail for n, tail in zip((64, 256, 257), random_prompts(1, [3, 20, 1], VOCAB))
    ]
    # float32 sums in another order differ by some 1e-6.
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS, min_margin=2e-5)


def make(checkpoint: Checkpoint, **options: Any) -> LLM:
    defaults = dict(device=DEVICE, max_model_len=1024, kvcache_block_size=256, num_kvcache_blocks=200)
    return make_llm(checkpoint.path, **{**defaults, **options})


def backend_options(backend: str, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Options that choose a backend; skips where it cannot serve."""
    if backend == "flash_attn":
        config = checkpoint.model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        try:
            flash_attention.check_flash_attention(256, head_dim, getattr(torch, dtype))
        except ValueError as error:
            pytest.skip(str(error))
    return dict(attention_backend=backend, dtype=dtype)


def check_choices(checkpoint: Checkpoint, prompts: list[list[int]], completions: list[list[int]]) -> None:
    """Teacher forcing, as the file's docstring says."""
    worst = 0.0
    for prompt, tokens in zip(prompts, completions):
        logits = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
        worst = max(worst, ((logits.max(dim=1).values - chosen) / logits.std(dim=1)).max().item())
    assert worst < TOLERANCE, f"a chosen token's logit is {worst:.2f} standard deviations below the largest"


def check(case: Case, dtype: str, completions: list[list[int]]) -> None:
    checkpoint, prompts, expected = case
    if dtype == "float32":
        assert completions == expected
    else:
        assert [len(tokens) for tokens in completions] == [NUM_TOKENS] * len(prompts)
        check_choices(checkpoint, prompts, completions)


def test_the_tolerance_can_tell(case: Case) -> None:
    """The second best tokens, and the right tokens after another prompt, are far outside it."""
    checkpoint, prompts, expected = case
    check_choices(checkpoint, prompts, expected)
    for wrong in (expected[1:] + expected[:1], [[0] * NUM_TOKENS] * len(prompts)):
        with pytest.raises(AssertionError, match="standard deviations below"):
            check_choices(checkpoint, prompts, wrong)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["torch", "triton", "flash_attn", "auto"])
def test_tokens_of_transformers(case: Case, backend: str, dtype: str, eager: bool) -> None:
    if backend == "torch" and not eager:
        pytest.skip("the torch backend is the oracle; its loops are not for graphs")
    checkpoint, prompts, _ = case
    llm = make(checkpoint, **backend_options(backend, checkpoint, dtype), enforce_eager=eager)
    try:
        check(case, dtype, generate_ids(llm, prompts, greedy(NUM_TOKENS)))
        check(case, dtype, generate_ids(llm, prompts, greedy(NUM_TOKENS)))  # now with prefix hits
        assert llm.scheduler.num_preemptions == 0
    finally:
        llm.exit()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        dict(max_num_batched_tokens=100),
        dict(kvcache_block_size=16, num_kvcache_blocks=64),
        dict(
            kvcache_block_size=16,
            num_kvcache_blocks=64,
            max_num_batched_tokens=333,
            enable_prefix_caching=False,
        ),
        dict(kvcache_block_size=48, max_num_seqs=3),
    ],
    ids=["chunks", "tiny-cache", "tiny-cache-chunks-no-sharing", "block-48"],
)
def test_however_the_work_is_cut(case: Case, options: dict[str, Any], dtype: str, record_hits: Any) -> None:
    checkpoint, prompts, _ = case
    llm = make(checkpoint, dtype=dtype, attention_backend="triton", **options)
    try:
        for _ in range(2):
            check(case, dtype, generate_ids(llm, prompts, greedy(NUM_TOKENS)))
        assert (llm.scheduler.num_preemptions > 2) == ("num_kvcache_blocks" in options)
        assert any(record_hits()) == options.get("enable_prefix_caching", True)
    finally:
        llm.exit()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    saved = make_checkpoint(
        tmp_path_factory.mktemp("small"), std=256**-0.5, vocab_size=VOCAB, hidden_size=256, head_dim=64,
        num_attention_heads=4, intermediate_size=512,
    )  # fmt: skip
    return Checkpoint(saved.path, saved.model.to(DEVICE))


def test_batches_around_every_graph_size(small: Checkpoint) -> None:
    """Padded batches and full ones; then fewer and fewer sequences, as requests end."""
    prompts = random_prompts(2, [3 + i % 40 for i in range(37)], VOCAB)
    expected = small.complete(prompts, 8, min_margin=2e-5)
    graphs = make(small, dtype="float32", max_num_seqs=37)
    try:
        sizes = graphs.model_runner.graph_sizes  # type: ignore[union-attr]
        assert {1, 2, 4, 8, 16, 24, 32, 37} == set(sizes)
        for n in sorted({n + d for n in sizes for d in (-1, 0, 1)} & set(range(1, 38))):
            assert generate_ids(graphs, prompts[:n], greedy(8)) == expected[:n], n
        params = [greedy(1 + i % 8) for i in range(37)]
        assert generate_ids(graphs, prompts, params) == [t[: p.max_tokens] for t, p in zip(expected, params)]
    finally:
        graphs.exit()


def test_seeds_repeat_with_graphs_and_without(small: Checkpoint) -> None:
    prompts = random_prompts(3, [5, 40, 17, 100, 64, 9], VOCAB)
    params = [SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True, seed=seed) for seed in range(5)]
    params.append(greedy(24))
    results = []
    for options in (
        dict(enforce_eager=True),
        dict(enforce_eager=False),
        dict(enforce_eager=False, kvcache_block_size=16, max_model_len=128, num_kvcache_blocks=10),
        dict(enforce_eager=True, attention_backend="torch", max_num_batched_tokens=50),
    ):
        llm = make(small, dtype="float32", **options)
        results.append(generate_ids(llm, prompts, params))
        alone = [generate_ids(llm, [prompt], one)[0] for prompt, one in zip(prompts, params)]
        llm.exit()
        assert alone == results[-1]
    assert all(result == results[0] for result in results)
    assert len({tuple(tokens) for tokens in results[0]}) == 6


def test_seeds_give_the_tokens_of_the_cpu(small: Checkpoint) -> None:
    """The same noise, from another implementation of the sampler and of everything before it."""
    prompts = random_prompts(4, [5, 40, 17], VOCAB)
    params = [SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True, seed=seed) for seed in range(3)]
    results = []
    for device in (DEVICE, "cpu"):
        llm = make(small, dtype="float32", device=device)
        results.append(generate_ids(llm, prompts, params))
        llm.exit()
    assert results[0] == results[1]


@pytest.mark.parametrize("utilization", [0.3, 0.6])
def test_gpu_memory_utilization(small: Checkpoint, utilization: float) -> None:
    gc.collect()  # other tests' engines
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    llm = make(small, dtype="bfloat16", gpu_memory_utilization=utilization, num_kvcache_blocks=-1)
    try:
        num_blocks = llm.config.num_kvcache_blocks
        block_bytes = (
            2 * 2 * 256 * 2 * 64 * 2
        )  # K and V, layers, slots, heads, head size, bytes of a bfloat16
        assert llm.model_runner.kv_cache.nbytes == num_blocks * block_bytes  # type: ignore[union-attr]
        prompts = random_prompts(5, [900] * 20, VOCAB)
        torch.cuda.reset_peak_memory_stats()
        llm.generate(prompts, greedy(8), use_tqdm=False)
        assert_idle(llm.scheduler)
        free, _ = torch.cuda.mem_get_info()
        # Graphs and libraries' workspaces come after the cache is sized: some slack, 2% of the card.
        assert total - free < (utilization + 0.02) * total
        assert num_blocks * block_bytes > (utilization - 0.1) * total
    finally:
        llm.exit()


def test_exit_gives_the_memory_back_at_once(small: Checkpoint) -> None:
    """Not when Python's cycle collector comes round; else the second engine finds no room for its cache."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        for _ in range(2):
            llm = make(small, gpu_memory_utilization=0.6, num_kvcache_blocks=-1)
            llm.generate([[1, 2, 3]], greedy(4), use_tqdm=False)
            llm.exit()
            assert torch.cuda.memory_allocated() - before < 64 << 20
    finally:
        gc.enable()


def test_the_checkpoints_dtype_is_the_default(small: Checkpoint, tmp_path: Path) -> None:
    """conftest saves float32; a bfloat16 copy runs in bfloat16."""
    small.model.to(torch.bfloat16).save_pretrained(tmp_path)
    small.model.to(torch.float32)
    for path, dtype in ((small.path, torch.float32), (str(tmp_path), torch.bfloat16)):
        llm = make(Checkpoint(path, small.model))
        assert llm.config.dtype == llm.model_runner.kv_cache.dtype == dtype  # type: ignore[union-attr]
        llm.exit()
