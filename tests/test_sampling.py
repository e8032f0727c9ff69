"""Sampling: the noise, the distribution it gives, and tokens that depend on the request alone."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_llm, make_sequence, random_prompts

from nanovllm import SamplingParams
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch, philox_torch

Draw = Callable[..., tuple[torch.Tensor, torch.Tensor]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
BACKENDS = [
    pytest.param(gumbel_argmax, marks=needs_triton, id="triton"),
    pytest.param(gumbel_argmax_torch, id="torch"),
]


# --- Philox ---------------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 as Salmon et al. (2011) give it, in plain integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 2**32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@pytest.mark.parametrize(
    "rounds, counter, key, result",
    [
        # Known answers of the authors' Random123 library (kat_vectors, philox4x32).
        (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            10,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
        (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            7,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_the_plain_integers_give_the_published_answers(
    rounds: int, counter: list[int], key: list[int], result: list[int]
) -> None:
    assert philox(counter, key, rounds) == result


def test_philox_torch_equals_the_plain_integers() -> None:
    generator = torch.Generator().manual_seed(0)
    seeds = [
        0,
        1,
        2**32 - 1,
        2**32,
        2**63 - 1,
        *torch.randint(2**63 - 1, (300,), generator=generator).tolist(),
    ]
    words = [
        0,
        1,
        2**31,
        2**32 - 1,
        2**32 - 1,
        *torch.randint(2**32, (300,), generator=generator).tolist(),
    ]
    c0, c1 = words, words[::-1]
    result = philox_torch(torch.tensor(seeds), torch.tensor(c0), torch.tensor(c1)).tolist()
    assert result == [
        philox([a, b, 0, 0], [s % 2**32, s >> 32], 7) for s, a, b in zip(seeds, c0, c1, strict=True)
    ]


@pytest.mark.parametrize("draw", BACKENDS)
@pytest.mark.parametrize("first_id", [0, 5, 75_970])
def test_the_noise_is_the_word_of_the_token_id_and_the_position(draw: Draw, first_id: int) -> None:
    """Word i of the call with counter (c, position) is for token id 4 c + i, whatever part a rank
    holds."""
    seeds, positions = [0, 7, 2**40 + 3, 2**63 - 1], [0, 1, 39_999, 12]
    words = {
        (row, token_id): philox([token_id // 4, position, 0, 0], [seed % 2**32, seed >> 32], 7)[
            token_id % 4
        ]
        for row, (seed, position) in enumerate(zip(seeds, positions, strict=True))
        for token_id in range(first_id, first_id + 21)
    }
    noise = {
        key: -math.log(-math.log1p(-((word >> 8) + 0.5) / 2**24)) for key, word in words.items()
    }
    tensors = torch.ones(4), torch.tensor(seeds), torch.tensor(positions)
    # One column at a time: the value is that column's noise.
    for column in range(21):
        logits = torch.full((4, 21), -1e9)
        logits[:, column] = 0
        values, ids = draw(logits.to(DEVICE), *(tensor.to(DEVICE) for tensor in tensors), first_id)
        assert ids.tolist() == [first_id + column] * 4
        expected = torch.tensor([noise[row, first_id + column] for row in range(4)])
        torch.testing.assert_close(values.cpu(), expected, rtol=1e-4, atol=1e-4)


# --- one draw -------------------------------------------------------------------------------------


def inputs(
    num_rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random logits, temperatures (each third one 0), seeds and positions."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, vocab, generator=generator)).to(dtype)
    temperatures = 0.2 + 1.8 * torch.rand(num_rows, generator=generator)
    temperatures[::3] = 0
    seeds = torch.randint(2**63 - 1, (num_rows,), generator=generator)
    positions = torch.randint(40_000, (num_rows,), generator=generator)
    return logits.to(DEVICE), temperatures.to(DEVICE), seeds.to(DEVICE), positions.to(DEVICE)


@pytest.mark.parametrize("vocab", [1, 2, 17, 127, 128, 1000, 4095, 4096, 4097, 9001])
@pytest.mark.parametrize("first_id", [0, 1, 75_968])
@needs_triton
def test_triton_equals_torch(vocab: int, first_id: int) -> None:
    arguments = inputs(7, vocab, seed=vocab)
    values, ids = gumbel_argmax(*arguments, first_id)
    expected_values, expected_ids = gumbel_argmax_torch(*arguments, first_id)
    assert ids.tolist() == expected_ids.tolist() and ids.dtype == torch.int64
    torch.testing.assert_close(values, expected_values, rtol=1e-5, atol=1e-5)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@needs_triton
def test_triton_equals_torch_in_every_dtype(dtype: torch.dtype) -> None:
    logits, *rest = inputs(64, 300, dtype)
    assert (
        gumbel_argmax(logits, *rest)[1].tolist() == gumbel_argmax_torch(logits, *rest)[1].tolist()
    )
    # A row stride that is not the vocabulary: columns cut from a wider matrix.
    part = logits[:, 20:220]
    assert (
        gumbel_argmax(part, *rest)[1].tolist()
        == gumbel_argmax_torch(part.contiguous(), *rest)[1].tolist()
    )


@pytest.mark.parametrize("draw", BACKENDS)
@pytest.mark.parametrize("vocab", [3, 127, 4099])
@pytest.mark.parametrize("first_id", [0, 1])
@pytest.mark.parametrize("has_thresholds", [False, True])
def test_logits_that_are_no_numbers_draw_no_token(
    draw: Draw, vocab: int, first_id: int, has_thresholds: bool
) -> None:
    logits, *rest = inputs(10, vocab, seed=vocab)
    thresholds = logits.float().min(dim=1).values if has_thresholds else None
    good = draw(logits, *rest, first_id, thresholds)[1].tolist()
    for row, (columns, value) in enumerate(
        [(slice(None), math.nan), (0, math.nan), (-1, math.nan), (1, math.inf)]
    ):
        logits[2 * row, columns] = value  # rows with a temperature and greedy ones
    logits[8] = -math.inf
    got = draw(logits, *rest, first_id, thresholds)[1].tolist()
    assert got == [-1 if row % 2 == 0 else good[row] for row in range(10)]


@pytest.mark.parametrize("draw", BACKENDS)
def test_the_parts_of_a_vocabulary_agree_with_the_whole(draw: Draw) -> None:
    """As tensor parallelism splits it: the best of the ranks' winners is the winner of all."""
    logits, *rest = inputs(50, 101)
    _, expected = draw(logits, *rest)
    parts = [draw(logits[:, start : start + 34], *rest, start) for start in (0, 34, 68)]
    values, ids = (torch.stack(results) for results in zip(*parts, strict=True))
    assert ids.gather(0, values.argmax(0, keepdim=True)).squeeze(0).tolist() == expected.tolist()


@pytest.mark.parametrize("draw", BACKENDS)
def test_temperature_zero_is_argmax_and_ties_go_to_the_lowest_id(draw: Draw) -> None:
    logits, temperatures, seeds, positions = inputs(8, 5000)
    temperatures.zero_()
    assert torch.equal(draw(logits, temperatures, seeds, positions)[1], logits.argmax(1))
    for first, second in [(0, 1), (3, 4999), (4095, 4096), (17, 18)]:
        logits[:, first] = logits[:, second] = 100
        assert draw(logits, temperatures, seeds, positions)[1].tolist() == [first] * 8
        assert draw(logits, temperatures, seeds, positions, 7)[1].tolist() == [first + 7] * 8
        logits[:, first] = logits[:, second] = 0


@pytest.mark.parametrize("draw", BACKENDS)
def test_a_row_does_not_depend_on_its_neighbours(draw: Draw) -> None:
    arguments = inputs(12, 90)
    _, together = draw(*arguments)
    alone = [draw(*(argument[i : i + 1] for argument in arguments))[1].item() for i in range(12)]
    assert alone == together.tolist()


def test_the_arguments_are_not_changed() -> None:
    arguments = inputs(6, 50)
    before = [argument.clone() for argument in arguments]
    gumbel_argmax_torch(*arguments)
    assert all(torch.equal(one, other) for one, other in zip(arguments, before, strict=True))


# --- many draws -----------------------------------------------------------------------------------


def chi_square(counts: Counter[int], probabilities: list[float], num_draws: int) -> float:
    """In standard deviations from what is expected; Wilson and Hilferty's cube root makes it
    normal."""
    freedom = len(probabilities) - 1
    x = sum((counts[i] - num_draws * p) ** 2 / (num_draws * p) for i, p in enumerate(probabilities))
    return ((x / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("vary", ["position", "seed", "high seed"])
def test_draws_follow_the_softmax(temperature: float, vary: str) -> None:
    num_draws = 40_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    numbers = torch.arange(num_draws)
    seeds = {"position": torch.full_like(numbers, 99), "seed": numbers, "high seed": numbers << 32}[
        vary
    ]
    positions = numbers if vary == "position" else torch.full_like(numbers, 5)
    _, ids = gumbel_argmax_torch(
        logits.expand(num_draws, -1), torch.full((num_draws,), temperature), seeds, positions
    )
    probabilities = (logits.double() / temperature).softmax(0).tolist()
    assert abs(chi_square(Counter(ids.tolist()), probabilities, num_draws)) < 3.5
    # The same draws are far from another temperature's softmax: the test can tell.
    wrong = (logits.double() / (1.2 * temperature)).softmax(0).tolist()
    assert chi_square(Counter(ids.tolist()), wrong, num_draws) > 5


def test_successive_draws_are_independent() -> None:
    """Pairs of tokens, at neighbouring positions and of neighbouring seeds, against the softmax's
    product."""
    num_draws, vocab = 40_000, 5
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(2))
    probabilities = logits.double().softmax(0)
    pairs = torch.outer(probabilities, probabilities).flatten().tolist()
    numbers = torch.arange(2 * num_draws)
    ones = torch.ones(2 * num_draws)
    for seeds, positions in [(numbers // 50_000, numbers), (numbers, numbers * 0 + 3)]:
        _, ids = gumbel_argmax_torch(logits.expand(2 * num_draws, -1), ones, seeds, positions)
        counts = Counter((vocab * ids[0::2] + ids[1::2]).tolist())
        assert abs(chi_square(counts, pairs, num_draws)) < 3.5


# --- through the engine ---------------------------------------------------------------------------

PROMPTS = random_prompts(0, [20, 3, 33, 16, 50, 9])


def sampled(seed: int | None, temperature: float = 0.8) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=20, ignore_eos=True, seed=seed)


def test_a_seeded_request_does_not_depend_on_how_it_was_served(checkpoint: Checkpoint) -> None:
    params = [
        sampled(1),
        greedy(20),
        sampled(2, 1.5),
        sampled(1),
        sampled(7, 0.3),
        sampled(2**63 - 1),
    ]
    llm = make_llm(checkpoint.path)
    alone = [
        generate_ids(llm, [prompt], one)[0] for prompt, one in zip(PROMPTS, params, strict=True)
    ]
    assert alone[1] == checkpoint.complete(PROMPTS[1:2], 20)[0]
    assert generate_ids(llm, PROMPTS, params) == alone
    assert generate_ids(llm, PROMPTS[::-1], params[::-1]) == alone[::-1]
    llm.exit()
    for options in (
        dict(max_num_batched_tokens=7),
        dict(kvcache_block_size=4, max_model_len=72, num_kvcache_blocks=18),
        dict(enable_prefix_caching=False, max_num_seqs=2),
        dict(depth=1),
        dict(
            depth=1,
            kvcache_block_size=4,
            max_model_len=72,
            num_kvcache_blocks=18,
            max_num_batched_tokens=30,
        ),
    ):
        llm = make_llm(checkpoint.path, seed=12345, **options)
        assert generate_ids(llm, PROMPTS, params) == alone
        assert ("num_kvcache_blocks" in options) == (llm.scheduler.counters["preemptions"] > 0)
        llm.exit()


def test_seeds_temperatures_and_positions_make_a_difference(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    prompts = [PROMPTS[0]] * 6
    params = [sampled(1), sampled(2), sampled(2**32 + 1), sampled(1, 5.0), sampled(1), greedy(20)]
    outputs = generate_ids(llm, prompts, params)
    assert outputs[0] == outputs[4]
    assert len({tuple(tokens) for tokens in outputs}) == 5
    llm.exit()


def test_every_position_has_noise_of_its_own(checkpoint: Checkpoint) -> None:
    """At a temperature so high that the noise alone decides, 200 draws meet some 100 of the 127
    tokens."""
    llm = make_llm(checkpoint.path)
    hot = SamplingParams(temperature=1e6, max_tokens=200, ignore_eos=True, seed=1)
    assert 85 < len(set(generate_ids(llm, [PROMPTS[0]], hot)[0])) < 115
    llm.exit()


def test_a_temperature_near_zero_is_greedy(checkpoint: Checkpoint) -> None:
    """Also one so small that the logits overflow when they are divided by it."""
    llm = make_llm(checkpoint.path)
    expected = checkpoint.complete(PROMPTS, 20)
    assert make_sequence([1]).temperature == 0
    for temperature, kept in ((1e-5, 1e-5), (0.99e-5, 0.0), (1e-300, 0.0)):
        assert Sequence([1], sampled(1, temperature)).temperature == kept
    for temperature in (1e-5, 1e-20, 1e-37, 1e-40, 1e-300):
        assert generate_ids(llm, PROMPTS, sampled(1, temperature)) == expected, temperature
    llm.exit()


def test_the_engines_seed_repeats_and_its_requests_differ(checkpoint: Checkpoint) -> None:
    def run(seed: int) -> list[list[list[int]]]:
        llm = make_llm(checkpoint.path, seed=seed)
        calls = [generate_ids(llm, [PROMPTS[0]] * 3, sampled(None)) for _ in range(2)]
        llm.exit()
        return calls

    first = run(5)
    assert run(5) == first != run(6)
    assert len({tuple(tokens) for call in first for tokens in call}) == 6


def test_tokens_of_the_engine_follow_the_models_softmax(checkpoint: Checkpoint) -> None:
    """One token of many requests with the same prompt and different seeds."""
    num_draws = 4000
    (prompt,) = random_prompts(1, [6])
    llm = make_llm(checkpoint.path, max_num_seqs=500)
    params = [SamplingParams(temperature=1.3, max_tokens=1, seed=seed) for seed in range(num_draws)]
    tokens = [ids[0] for ids in generate_ids(llm, [prompt] * num_draws, params)]
    llm.exit()
    probabilities = (checkpoint.logits(prompt)[-1].double() / 1.3).softmax(0)
    likely = [i for i, p in enumerate(probabilities.tolist()) if p * num_draws > 10]
    counts = Counter(likely.index(token) if token in likely else len(likely) for token in tokens)
    expected = [probabilities[i].item() for i in likely]
    assert abs(chi_square(counts, expected + [1 - sum(expected)], num_draws)) < 3.5
