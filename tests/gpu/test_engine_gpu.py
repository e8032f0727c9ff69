"""The whole engine on a GPU: backends, CUDA graphs and `transformers` agree, in float32 and in
bfloat16.

In float32 the tokens are equal. In bfloat16 a choice between two close logits may fall either way,
and all that follows differs then, so tokens cannot be compared with another run's. Instead every
chosen token is checked, given the tokens before it: `transformers`, in float32 and on the same
weights (they are all bfloat16 numbers), computes the logits of prompt and completion, and the
chosen token's logit must be within a tolerance of the largest. Sampled tokens are checked likewise,
with the noise of their seeds and positions.

Unless a test says otherwise the engine is as users have it: each step launched before the tokens of
the last one are read, CUDA graphs, fused kernels, and a matrix-vector kernel for steps of very few
tokens.
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
    check_step_loop,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from bench import write_shape
from nanovllm import LLM, SamplingParams
from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.kernels import flash_attention
from nanovllm.kernels.gumbel import gumbel_argmax_torch
from nanovllm.kernels.split_gemm import MAX_UNSPLIT_TOKENS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = "cuda"
VOCAB, NUM_TOKENS = 1000, 32
# In standard deviations of the logits. Rounding to 8 bits is an error of 0.2% at each of some ten
# results a layer that are rounded one after the other, so two layers make about 1%; over thousands
# of choices the worst was 0.04 on a CPU, and a GPU rounds a few results more. A token chosen by a
# wrong mask, position or slot is off by 2 to 4.
TOLERANCE = 0.2
# Around the gemv kernel's limit, the graph sizes, and the tiles and the limit of the GEMMs in one
# part.
BATCH_SIZES = [1, 2, 3, 4, 5, 16, 17, 33, 65]
LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300, 511, 512, 513, 700]
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-128": dict(
        architecture=QWEN3, num_attention_heads=8, num_key_value_heads=2, head_dim=128
    ),
    "qwen3-64-tied": dict(
        architecture=QWEN3, num_attention_heads=4, head_dim=64, tie_word_embeddings=True
    ),
    "qwen2-64": dict(architecture=QWEN2, num_attention_heads=4, num_key_value_heads=1),
    "qwen2-128": dict(
        architecture=QWEN2,
        hidden_size=512,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=128,
    ),  # wide enough that each GEMM is split
}
Case = tuple[Checkpoint, list[list[int]], list[list[int]]]


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, its `transformers` model on the GPU in float32; prompts; their greedy
    completions.
    """
    name = request.param
    # Weights of deviation 1 / sqrt(hidden_size) keep every result's spread near 1, as in a trained
    # model: larger ones make attention so peaked that the rounding of a score decides it.
    shape = dict(hidden_size=256, intermediate_size=512) | SHAPES[name]
    saved = make_checkpoint(
        tmp_path_factory.mktemp(name),
        seed=list(SHAPES).index(name),
        std=shape["hidden_size"] ** -0.5,
        vocab_size=VOCAB,
        **shape,
    )
    checkpoint = Checkpoint(saved.path, saved.model.to(DEVICE))
    prompts = random_prompts(0, LENGTHS, VOCAB)
    prompts += [
        prompts[15][:n] + tail
        for n, tail in zip((64, 256, 257), random_prompts(1, [3, 20, 1], VOCAB), strict=True)
    ]
    # float32 sums in another order differ by some 1e-6.
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS, min_margin=2e-5)


def make(checkpoint: Checkpoint, depth: int | None = None, **options: Any) -> LLM:
    defaults = dict(
        device=DEVICE, max_model_len=1024, kvcache_block_size=256, num_kvcache_blocks=200
    )
    return make_llm(checkpoint.path, depth, **{**defaults, **options})


def backend_options(backend: str, checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """Options that choose a backend; skips where it cannot serve."""
    if backend == "flash_attn":
        config = checkpoint.model.config
        head_dim = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        try:
            flash_attention.check_flash_attention(256, head_dim, getattr(torch, dtype))
        except ValueError as error:
            pytest.skip(str(error))
    return dict(attention_backend=backend, dtype=dtype)


def check_choices(
    checkpoint: Checkpoint, prompts: list[list[int]], completions: list[list[int]]
) -> None:
    """Teacher forcing, as the file's docstring says."""
    worst = 0.0
    for prompt, tokens in zip(prompts, completions, strict=False):  # of the first prompts
        logits = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(
            1
        )
        worst = max(worst, ((logits.max(dim=1).values - chosen) / logits.std(dim=1)).max().item())
    assert worst < TOLERANCE, (
        f"a chosen token's logit is {worst:.2f} standard deviations below the largest"
    )


def check_draws(
    checkpoint: Checkpoint,
    prompts: list[list[int]],
    params: list[SamplingParams],
    completions: list[list[int]],
    tolerance: float,
) -> None:
    """As `check_choices`, for sampled tokens: scores are logits plus noise times temperature."""
    worst = 0.0
    for prompt, param, tokens in zip(prompts, params, completions, strict=False):
        logits = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
        only_chosen = torch.full_like(logits, -float("inf")).scatter(
            1, chosen, logits.gather(1, chosen)
        )
        noise_of = (
            torch.full((len(tokens),), param.temperature, device=logits.device),
            torch.full((len(tokens),), param.seed, device=logits.device),
            torch.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1, device=logits.device),
        )
        best, _ = gumbel_argmax_torch(logits, *noise_of)
        score, _ = gumbel_argmax_torch(only_chosen, *noise_of)
        worst = max(worst, ((best - score) * param.temperature / logits.std(dim=1)).max().item())
    assert worst < tolerance, (
        f"a drawn token's score is {worst:.4f} standard deviations below the largest"
    )


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
        pytest.skip("the torch backend is the oracle, and tested without graphs only")
    checkpoint, prompts, _ = case
    llm = make(checkpoint, **backend_options(backend, checkpoint, dtype), enforce_eager=eager)
    try:
        assert llm._max_pending == 1 and bool(llm.model_runner.decode_graphs.sizes) != eager
        check(case, dtype, generate_ids(llm, prompts, greedy(NUM_TOKENS)))
        check(case, dtype, generate_ids(llm, prompts, greedy(NUM_TOKENS)))  # now with prefix hits
        assert llm.scheduler.counters["preemptions"] == 0
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
        dict(depth=0, kvcache_block_size=16, num_kvcache_blocks=64),
        dict(depth=3, kvcache_block_size=16, num_kvcache_blocks=64),
        dict(enforce_eager=True, kvcache_block_size=16, num_kvcache_blocks=64),
    ],
    ids=[
        "chunks",
        "tiny-cache",
        "tiny-cache-chunks-no-sharing",
        "block-48",
        "depth-0",
        "depth-3",
        "eager",
    ],
)
def test_however_the_work_is_cut(
    case: Case, options: dict[str, Any], dtype: str, record_hits: Any
) -> None:
    checkpoint, prompts, _ = case
    llm = make(checkpoint, dtype=dtype, attention_backend="triton", **options)
    try:
        for _ in range(2):
            check(case, dtype, generate_ids(llm, prompts, greedy(NUM_TOKENS)))
        assert (llm.scheduler.counters["preemptions"] > 2) == ("num_kvcache_blocks" in options)
        assert any(record_hits()) == options.get("enable_prefix_caching", True)
    finally:
        llm.exit()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    saved = make_checkpoint(
        tmp_path_factory.mktemp("small"),
        std=256**-0.5,
        vocab_size=VOCAB,
        hidden_size=256,
        head_dim=64,
        num_attention_heads=4,
        intermediate_size=512,
    )
    return Checkpoint(saved.path, saved.model.to(DEVICE))


def test_batches_around_every_graph_size(small: Checkpoint) -> None:
    """Padded batches and full ones; then fewer and fewer sequences, as requests end."""
    prompts = random_prompts(2, [3 + i % 40 for i in range(37)], VOCAB)
    expected = small.complete(prompts, 8, min_margin=2e-5)
    graphs = make(small, dtype="float32", max_num_seqs=37)
    try:
        sizes = graphs.model_runner.decode_graphs.sizes  # type: ignore[union-attr]
        assert {1, 2, 4, 8, 16, 24, 32, 37} == set(sizes)
        for n in sorted({n + d for n in sizes for d in (-1, 0, 1)} & set(range(1, 38))):
            assert generate_ids(graphs, prompts[:n], greedy(8)) == expected[:n], n
        params = [greedy(1 + i % 8) for i in range(37)]
        assert generate_ids(graphs, prompts, params) == [
            t[: p.max_tokens] for t, p in zip(expected, params, strict=True)
        ]
    finally:
        graphs.exit()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_every_batch_size(small: Checkpoint, eager: bool, dtype: str) -> None:
    """Few tokens take another path through the linear layers than many; prompts of one or two
    tokens too.
    """
    assert min(BATCH_SIZES) == 1 < MAX_UNSPLIT_TOKENS < max(BATCH_SIZES)
    prompts = random_prompts(6, [1 + i % 7 for i in range(65)], VOCAB)
    expected = small.complete(prompts, 12, min_margin=2e-5)
    llm = make(small, dtype=dtype, enforce_eager=eager, max_num_seqs=65)
    try:
        for n in BATCH_SIZES:
            # Ones that end early leave every smaller batch behind them, too.
            for params in ([greedy(12)] * n, [greedy(12 - i % 10) for i in range(n)]):
                completions = generate_ids(llm, prompts[:n], params)
                if dtype == "float32":
                    assert completions == [
                        t[: p.max_tokens] for t, p in zip(expected[:n], params, strict=True)
                    ], n
                else:
                    assert [len(tokens) for tokens in completions] == [p.max_tokens for p in params]
                    check_choices(small, prompts, completions)
    finally:
        llm.exit()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_eos_is_the_last_token(small: Checkpoint, depth: int) -> None:
    """The steps that were launched before it was known leave no trace, in the results or in the
    cache.
    """
    prompts = random_prompts(7, [5 + 9 * i for i in range(20)], VOCAB)
    full = small.complete(prompts, NUM_TOKENS, min_margin=2e-5)
    eos = full[0][9]
    stopped = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in full]
    llm = make(
        small,
        depth,
        dtype="float32",
        eos=eos,
        kvcache_block_size=4,
        max_model_len=256,
        max_num_seqs=7,
    )
    try:
        for _ in range(2):
            outputs = llm.generate(prompts, greedy(NUM_TOKENS, ignore_eos=False), use_tqdm=False)
            assert [output["token_ids"] for output in outputs] == stopped
            reasons = ["stop" if tokens[-1] == eos else "length" for tokens in stopped]
            assert [output["finish_reason"] for output in outputs] == reasons
            assert_idle(llm)
    finally:
        llm.exit()


def test_step_loop_and_the_sign_of_num_tokens(small: Checkpoint) -> None:
    prompts = random_prompts(8, [5, 40, 17, 100], VOCAB)
    expected = small.complete(prompts, 20, min_margin=2e-5)
    llm = make(small, dtype="float32")
    try:
        check_step_loop(llm, prompts, expected, [1, 5, 10, 20])
    finally:
        llm.exit()


@pytest.mark.parametrize("where", ["launch", "wait"])
@pytest.mark.parametrize("call", [1, 4])
def test_an_interrupt_leaves_the_engine_empty_and_usable(
    small: Checkpoint, where: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps may be running on the device at that moment; what they still write must not be seen."""
    prompts = random_prompts(9, [600, 300, 5], VOCAB)
    expected = small.complete(prompts, 12, min_margin=2e-5)
    llm = make(small, dtype="float32", max_num_batched_tokens=512)
    try:
        for _ in range(3):
            calls = 0
            target: Any = llm.model_runner if where == "launch" else PendingTokens
            original = getattr(target, where)

            def interrupted(*args: Any, original: Any = original) -> Any:
                nonlocal calls
                calls += 1
                if calls == call:
                    raise KeyboardInterrupt
                return original(*args)

            with monkeypatch.context() as patch:
                patch.setattr(target, where, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    llm.generate(prompts[::-1], greedy(12), use_tqdm=False)
            assert calls == call
            assert generate_ids(llm, prompts, greedy(12)) == expected
    finally:
        llm.exit()


def test_ten_thousand_requests_leave_no_memory_behind(small: Checkpoint) -> None:
    llm = make(small, dtype="bfloat16", max_num_seqs=256)
    try:
        for count in (1000, 10_000):  # the first call makes the libraries allocate their workspaces
            prompts = random_prompts(count, [1 + i % 13 for i in range(count)], VOCAB)
            params = [
                SamplingParams(temperature=0.6 * (i % 2), max_tokens=1 + i % 5)
                for i in range(count)
            ]
            before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            llm.generate(prompts, params, use_tqdm=False)
            assert_idle(llm)
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == (before, reserved)
    finally:
        llm.exit()


def test_seeds_repeat_with_graphs_and_without(small: Checkpoint) -> None:
    prompts = random_prompts(3, [5, 40, 17, 100, 64, 9], VOCAB)
    params = [
        SamplingParams(temperature=0.8, max_tokens=24, ignore_eos=True, seed=seed)
        for seed in range(5)
    ]
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
        alone = [
            generate_ids(llm, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)
        ]
        llm.exit()
        assert alone == results[-1]
    assert all(result == results[0] for result in results)
    assert len({tuple(tokens) for tokens in results[0]}) == 6


def seeded(num: int) -> list[SamplingParams]:
    temperatures = (0.8, 0.3, 1.5)
    return [
        SamplingParams(temperature=temperatures[i % 3], max_tokens=24, ignore_eos=True, seed=i)
        for i in range(num)
    ]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_seeds_give_the_tokens_of_the_cpu_alone_and_in_every_batch(
    small: Checkpoint, eager: bool
) -> None:
    """The same noise, from another implementation of the sampler and of everything before it."""
    prompts, params = random_prompts(4, [5, 40, 17, 1, 2, *range(20, 80)], VOCAB), seeded(65)
    cpu = make(small, dtype="float32", device="cpu")
    expected = generate_ids(cpu, prompts, params)
    cpu.exit()
    with pytest.raises(AssertionError, match="below the largest"):  # another request's noise shows
        check_draws(small, prompts, params[1:] + params[:1], expected, tolerance=TOLERANCE)

    def check_same(rows: list[int], completions: list[list[int]]) -> None:
        """Every draw is right given the tokens before it; and all but a few, turned by rounding,
        are the CPU's.
        """
        check_draws(
            small,
            [prompts[i] for i in rows],
            [params[i] for i in rows],
            completions,
            tolerance=1e-3,
        )
        same = sum(
            completion == expected[i] for i, completion in zip(rows, completions, strict=True)
        )
        assert same >= len(rows) - len(rows) // 10

    llm = make(small, dtype="float32", enforce_eager=eager, max_num_seqs=65)
    try:
        for n in BATCH_SIZES:
            check_same(list(range(n)), generate_ids(llm, prompts[:n], params[:n]))
        check_same(
            list(range(5)),
            [
                generate_ids(llm, [p], one)[0]
                for p, one in zip(prompts[:5], params[:5], strict=True)
            ],
        )
        # Neighbours that come, go and differ.
        neighbours = [greedy(1 + i % 9) if i % 3 else params[i] for i in range(65)]
        mixed = generate_ids(llm, prompts[::-1], neighbours[::-1])[::-1]
        check_same(list(range(0, 65, 3)), mixed[::3])
    finally:
        llm.exit()


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_draws_in_bfloat16(small: Checkpoint, eager: bool) -> None:
    """Rounding turns some draws, so each is checked given the tokens before it."""
    prompts, params = random_prompts(4, [5, 40, 17, 1, 2, *range(20, 80)], VOCAB), seeded(65)
    llm = make(small, dtype="bfloat16", enforce_eager=eager, max_num_seqs=65)
    try:
        for n in BATCH_SIZES:
            check_draws(
                small,
                prompts,
                params,
                generate_ids(llm, prompts[:n], params[:n]),
                tolerance=TOLERANCE,
            )
    finally:
        llm.exit()


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_a_seed_gives_the_same_tokens_alone_and_among_256_neighbours(
    small: Checkpoint, eager: bool
) -> None:
    prompts, params = random_prompts(12, [1 + i % 40 for i in range(257)], VOCAB), seeded(257)
    llm = make(small, dtype="float32", enforce_eager=eager, max_num_seqs=257)
    try:
        together, chosen = generate_ids(llm, prompts, params), range(0, 257, 16)
        alone = [generate_ids(llm, [prompts[i]], params[i])[0] for i in chosen]
        # Other GEMM kernels run at other batch sizes; in float32 their rounding turns hardly any
        # draw.
        assert (
            sum(together[i] == tokens for i, tokens in zip(chosen, alone, strict=True))
            >= len(chosen) - 1
        )
        assert len({tuple(tokens) for tokens in together}) > 250
    finally:
        llm.exit()


@pytest.mark.parametrize("utilization", [0.3, 0.95])
def test_gpu_memory_utilization(tmp_path: Path, utilization: float) -> None:
    gc.collect()  # other tests' engines
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    path = write_shape("qwen3-0.6b", str(tmp_path))
    llm = LLM(path, load_format="dummy", gpu_memory_utilization=utilization)
    try:
        num_blocks = llm.config.num_kvcache_blocks
        block_bytes = (
            2 * 28 * 256 * 8 * 128 * 2
        )  # K and V, layers, slots, heads, head size, bytes of a bfloat16
        assert llm.model_runner.kv_cache.nbytes == num_blocks * block_bytes
        llm.generate(random_prompts(5, [900] * 40, 10_000), greedy(8), use_tqdm=False)
        assert_idle(llm)
        free, _ = torch.cuda.mem_get_info()
        # Libraries' workspaces come after the cache is sized: some slack, 2% of the card.
        assert total - free < (utilization + 0.02) * total
        assert num_blocks * block_bytes > (utilization - 0.1) * total
    finally:
        llm.exit()


def test_no_more_blocks_than_can_be_of_use(small: Checkpoint) -> None:
    llm = make(small, dtype="bfloat16", num_kvcache_blocks=-1)
    try:
        blocks_per_seq = -(-llm.config.max_model_len // llm.config.kvcache_block_size)
        assert llm.config.num_kvcache_blocks == 2 * llm.config.max_num_seqs * blocks_per_seq
    finally:
        llm.exit()


def test_exit_gives_the_memory_back_at_once(small: Checkpoint) -> None:
    """Not when Python's cycle collector comes round; else the second engine finds no room for its
    cache.
    """
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
        assert llm.config.dtype == llm.model_runner.kv_cache.dtype == dtype
        llm.exit()
