"""The sampler's options beyond temperature, against `transformers`, plain formulas and each other.

The engine takes no part here: these are the numbers that the device computes.
"""

import math
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sampling import chi_square
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch
from nanovllm.kernels.penalties import (
    MAX_COUNT,
    PROMPT_FLAG,
    Penalties,
    penalize,
    penalize_torch,
    set_counts,
)
from nanovllm.kernels.threshold import Filters, filter_thresholds, filter_thresholds_torch
from nanovllm.layers.sampler import Sampler
from nanovllm.sampling.extras import LogitBias, LogprobRequest, SamplingExtras
from nanovllm.sampling.stages import bias_and_penalize
from nanovllm.utils.tensor_parallel import tensor_parallel

# Triton's interpreter computes with NumPy, which warns of -inf * 0; what comes of it is not used.
pytestmark = pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="too many rows for Triton's interpreter")
FILTERS = [
    pytest.param(filter_thresholds, marks=needs_triton, id="triton"),
    pytest.param(filter_thresholds_torch, id="torch"),
]
PENALTIES = [
    pytest.param(penalize, marks=needs_triton, id="triton"),
    pytest.param(penalize_torch, id="torch"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Find = Callable[[Tensor, Tensor, Filters], Tensor]


def filters(top_k: list[int], top_p: list[float], min_p: list[float]) -> Filters:
    return Filters(
        top_k=torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        top_p=torch.tensor(top_p, device=DEVICE),
        min_p=torch.tensor(min_p, device=DEVICE),
    )


def kept(logits: Tensor, thresholds: Tensor) -> Tensor:
    """Which logits can be drawn; -inf cannot, whatever the threshold."""
    assert thresholds.shape == logits.shape[:1] and thresholds.dtype == torch.float32
    return (logits.float() >= thresholds.unsqueeze(1)) & (logits > -float("inf"))


def sample(
    logits: Tensor, temperatures: Tensor, extras: SamplingExtras | None, seed: int = 0
) -> tuple[Tensor, Any]:
    """One token a row by the real sampler, every row with a seed of its own."""
    seeds = torch.arange(len(logits), device=logits.device) + 1_000_000 * seed
    sampler = Sampler(0, logits.shape[1])
    return sampler(logits, temperatures, seeds, torch.full_like(seeds, 7), extras)


def new_counts(vocab: int, histories: list[tuple[list[int], list[int]]]) -> Tensor:
    """Counts of these (prompt, completion) pairs in rows 1, 2, ...; what is in a row before does
    not matter."""
    counts = torch.full((len(histories) + 2, vocab), 77, dtype=torch.int16, device=DEVICE)
    for row, (prompt, completion) in enumerate(histories, start=1):
        set_counts(counts, row, prompt, completion)
    assert (counts[0] == 77).all() and (counts[-1] == 77).all()
    return counts


# --- filters: top_k, top_p, min_p -----------------------------------------------------------------

COMBINATIONS = [
    (temperature, top_k, top_p, min_p)
    for temperature in (0.3, 1.0, 2.0)
    for top_k in (0, 1, 2, 20, 126, 500)
    for top_p in (1e-6, 0.3, 0.95, 0.9999, 1.0)
    for min_p in (0.0, 0.02, 0.5, 1.0)
]


def transformers_probs(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> Tensor:
    """`[vocab]` logits -> the probabilities from which `transformers` would draw."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(torch.empty(1, 0, dtype=torch.int64), logits[None])[0].softmax(0)


@pytest.mark.parametrize(
    "find", [filter_thresholds_torch, pytest.param(filter_thresholds, marks=on_a_gpu)]
)
@pytest.mark.parametrize("shape", ["random", "peaked", "flat", "forbidden"])
def test_the_distribution_is_that_of_transformers(find: Find, shape: str) -> None:
    """All combinations as the rows of one batch."""
    vocab = 127
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3))
    if shape == "peaked":
        logits[[5, 60, 126]] += torch.tensor([12.0, 10.5, 9.0])
    elif shape == "flat":
        logits *= 1e-3
    elif shape == "forbidden":
        logits[10:90] = -float("inf")
    temperature, *settings = (list(column) for column in zip(*COMBINATIONS, strict=True))
    rows, temperatures = (
        logits.expand(len(COMBINATIONS), -1).to(DEVICE),
        torch.tensor(temperature, device=DEVICE),
    )
    keep = kept(rows, find(rows, temperatures, filters(*settings)))
    probs = (rows.masked_fill(~keep, -float("inf")) / temperatures.unsqueeze(1)).softmax(1).cpu()
    numbers = set()
    for row, combination in enumerate(COMBINATIONS):
        expected = transformers_probs(logits, *combination)
        numbers.add(int((expected > 0).sum()))
        torch.testing.assert_close(
            probs[row],
            expected,
            rtol=2e-5,
            atol=1e-7,
            msg=lambda text, combination=combination: f"{combination}: {text}",
        )
    assert len(numbers) > 6  # the combinations differ in what they keep


def kernel_cases(vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Filters]:
    """Rows of every kind: usual, flat, all equal, half forbidden, one far above, one that can be
    drawn, greedy."""
    generator = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(14, vocab, generator=generator)
    logits[3] = 1.0
    logits[4, vocab // 2 + 1 :] = -float("inf")
    logits[5, 0] = 60
    logits[8] = (logits[8] * 2).round() / 2 - 20  # many equal ones, all negative
    logits[9] *= 1e-4
    logits[12, : vocab - 1] = -float("inf")
    top_k = [0, 5, 20, 20, 10**6, 3, 0, 1, 0, 50, 7, 0, 4, 0]
    top_p = [0.9, 1.0, 0.95, 0.5, 0.9, 0.3, 1e-6, 1.0, 0.9, 0.6, 1.0, 1.0, 0.5, 0.8]
    min_p = [0.0, 0.0, 0.0, 0.0, 0.0, 0.1, 0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0, 0.01]
    temperatures = [1.0, 0.7, 0.6, 1.0, 1.0, 2.0, 1.0, 1.0, 0.9, 1.5, 1.0, 1.0, 1.0, 0.0]
    return (
        logits.to(DEVICE, dtype),
        torch.tensor(temperatures, device=DEVICE),
        filters(top_k, top_p, min_p),
    )


@pytest.mark.parametrize("vocab", [1, 2, 129, 1001])
@pytest.mark.parametrize("dtype", DTYPES)
@needs_triton
def test_the_threshold_kernel_equals_its_reference(vocab: int, dtype: torch.dtype) -> None:
    logits, temperatures, settings = kernel_cases(vocab, dtype)
    thresholds = filter_thresholds(logits, temperatures, settings)
    expected = kept(logits, filter_thresholds_torch(logits, temperatures, settings))
    assert kept(logits, thresholds).tolist() == expected.tolist()
    assert expected.any(1).all() and thresholds[[11, 13]].tolist() == [-math.inf] * 2
    # A row stride that is not the vocabulary.
    wide = torch.cat((logits, logits), dim=1)[:, :vocab]
    assert torch.equal(filter_thresholds(wide, temperatures, settings), thresholds)


@needs_triton
def test_the_threshold_kernel_where_most_groups_are_left_out() -> None:
    """Enough groups that the coarse search decides, and a top_k of more logits than groups."""
    logits = torch.randn(6, 9001, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    settings = filters([1, 20, 60, 300, 0, 9000], [1.0, 0.95, 0.5, 0.9, 0.2, 1.0], [0.0] * 6)
    thresholds = filter_thresholds(logits, torch.ones(6, device=DEVICE), settings)
    expected = kept(logits, filter_thresholds_torch(logits, torch.ones(6, device=DEVICE), settings))
    assert kept(logits, thresholds).tolist() == expected.tolist()
    assert expected.sum(1).tolist()[:2] == [1, 19] and expected.sum(1)[5] == 9000


@pytest.mark.parametrize("find", FILTERS)
def test_equal_logits_at_the_border_are_all_kept(find: Find) -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 1.0]] * 4, device=DEVICE)
    settings = filters([2, 0, 4, 5], [1.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    keep = kept(logits, find(logits, torch.ones(4, device=DEVICE), settings))
    assert keep.sum(1).tolist() == [4, 4, 4, 6]


@needs_triton
@pytest.mark.parametrize("vocab, first_id", [(300, 0), (4097, 0), (301, 75_970)])
def test_draws_above_a_threshold_equal_the_references(vocab: int, first_id: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(9, vocab, generator=generator)).to(DEVICE)
    temperatures = torch.tensor([0.0, 0.5, 1.0, 0.0] + [2.0, 5.0] * 2 + [3.0], device=DEVICE)
    thresholds = torch.tensor([-math.inf] * 3 + [5.0, 4.0, 6.0, 3.0, 5.0, 6.5], device=DEVICE)
    rest = temperatures, torch.arange(9, device=DEVICE), torch.arange(9, device=DEVICE)
    scores, ids = gumbel_argmax(logits, *rest, first_id, thresholds)
    expected_scores, expected = gumbel_argmax_torch(logits, *rest, first_id, thresholds)
    assert ids.tolist() == expected.tolist()
    torch.testing.assert_close(scores, expected_scores, rtol=1e-5, atol=1e-5)
    drawn = logits.gather(1, (ids - first_id).unsqueeze(1)).squeeze(1)
    assert (drawn >= thresholds).all()
    for draw in (gumbel_argmax, gumbel_argmax_torch):  # a logit that equals its threshold is drawn
        assert torch.equal(
            draw(logits, *rest, first_id, logits.amax(1))[1], logits.argmax(1) + first_id
        )
    unfiltered = gumbel_argmax_torch(logits, *rest, first_id)[1]
    assert torch.equal(unfiltered[:3], ids[:3]) and not torch.equal(unfiltered, ids)


# --- many draws -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combination",
    [(0.8, 7, 1.0, 0.0), (1.5, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.15), (1.3, 9, 0.9, 0.05)],
    ids=str,
)
def test_100_000_draws_follow_the_filtered_distribution(
    combination: tuple[float, int, float, float],
) -> None:
    num_draws, (temperature, top_k, top_p, min_p) = 100_000, combination
    logits = torch.randn(14, generator=torch.Generator().manual_seed(1))
    settings = filters([top_k] * num_draws, [top_p] * num_draws, [min_p] * num_draws)
    rows, temperatures = (
        logits.expand(num_draws, -1).to(DEVICE),
        torch.full((num_draws,), temperature, device=DEVICE),
    )
    tokens, logprobs = sample(rows, temperatures, SamplingExtras(filters=settings))
    assert logprobs is None and tokens.dtype == torch.int64
    probs = transformers_probs(logits, *combination)
    support = probs.nonzero().squeeze(1).tolist()
    assert 3 <= len(support) < 14 and set(tokens.tolist()) == set(support)
    counts = Counter(support.index(token) for token in tokens.tolist())
    assert abs(chi_square(counts, probs[support].tolist(), num_draws)) < 3.5
    wrong = transformers_probs(logits, 1.1 * temperature, top_k, 1.0, 0.0)[support]
    assert chi_square(counts, (wrong / wrong.sum()).tolist(), num_draws) > 5  # the test can tell


# --- penalties and bias ---------------------------------------------------------------------------

VOCAB = 61
HISTORIES = [
    ([3, 3, 7, 60, 12], [7, 8, 8, 8, 20]),
    ([0, 1, 2], []),
    ([], [5, 5, 9]),
    ([30] * 10, [31] * 300 + [30]),
    ([4, 5], [6]),
]
STRENGTHS = torch.tensor(
    [[1.3, 0.0, 0.0], [2.0, 0.5, 0.5], [1.0, 0.7, -0.3], [0.8, -1.0, 0.01], [1.0, 0.0, 0.0]]
)


def penalties_of(strengths: Tensor) -> Penalties:
    return Penalties(*(column.contiguous().to(DEVICE) for column in strengths.unbind(1)))


def expected_penalties(
    logits: Tensor, histories: list[tuple[list[int], list[int]]], strengths: Tensor
) -> Tensor:
    """`transformers`' repetition penalty, then OpenAI's formula for the other two."""
    rows = []
    for row, (prompt, completion), (repetition, presence, frequency) in zip(
        logits, histories, strengths.tolist(), strict=True
    ):
        history = torch.tensor([prompt + completion], dtype=torch.int64)
        row = RepetitionPenaltyLogitsProcessor(repetition)(history, row[None].clone())[0]
        for token, times in Counter(completion).items():
            row[token] -= frequency * times + presence
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("apply", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties_are_those_of_transformers_and_openai(
    apply: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    logits = 3 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[0, 7] = -float("inf")
    expected = expected_penalties(logits.float(), HISTORIES, STRENGTHS)
    assert (expected != logits.float()).sum(1).tolist() == [5, 3, 2, 2, 0]
    order = [4, 0, 3, 1, 2]  # sequences are in any order in the step
    counts, rows = new_counts(VOCAB, HISTORIES), torch.tensor(order, device=DEVICE) + 1
    result = apply(logits[order].to(DEVICE), counts, rows, penalties_of(STRENGTHS[order]))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.cpu(), expected[order], rtol=1e-6, atol=1e-6)


@needs_triton
@pytest.mark.parametrize("vocab", [4096, 5001])
def test_the_penalty_kernel_equals_its_reference_over_several_tiles(vocab: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, vocab + 3, generator=generator).to(DEVICE)[:, :vocab]
    counts = (
        torch.randint(-1, 4, (3, vocab), generator=generator).clamp_(min=0).to(DEVICE, torch.int16)
    )
    counts[:, ::7] |= PROMPT_FLAG
    arguments = logits, counts, torch.tensor([2, 0], device=DEVICE), penalties_of(STRENGTHS[1:3])
    torch.testing.assert_close(
        penalize(*arguments), penalize_torch(*arguments), rtol=1e-6, atol=1e-6
    )


def test_counts_grow_by_what_is_sampled_and_stop_at_the_most_they_can_hold() -> None:
    counts = new_counts(VOCAB, HISTORIES)
    full = [9] * (MAX_COUNT + 5)
    set_counts(counts, 2, [9, 11], full)
    assert counts[2].nonzero().squeeze(1).tolist() == [9, 11]
    assert counts[2, 9] == PROMPT_FLAG + MAX_COUNT and counts[2, 11] == PROMPT_FLAG
    before = counts.clone()
    rows = torch.tensor([3, 2, 1], device=DEVICE)
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    logits[[0, 1, 2], [9, 9, 40]] = 1e6
    off = penalties_of(torch.tensor([[1.0, 0.0, 0.0]] * 3))
    extras = SamplingExtras(penalties=off, counts=counts, count_rows=rows)
    tokens, _ = sample(logits, torch.ones(3, device=DEVICE), extras)
    assert tokens.tolist() == [9, 9, 40]
    before[3, 9] += 1
    before[1, 40] += 1
    assert torch.equal(counts, before)


def test_queued_steps_see_the_tokens_of_the_steps_before() -> None:
    """Many greedy steps on one set of logits, nothing read back between them, against the plain
    formula."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    strengths = torch.tensor([[1.5, 0.0, 0.0], [1.0, 0.4, 0.0], [1.2, 0.1, 0.3]])
    histories: list[tuple[list[int], list[int]]] = [
        ([int(logits[0].argmax())], []),
        ([1, 2], []),
        ([3], [4]),
    ]
    rows = torch.tensor([1, 2, 3], device=DEVICE)
    extras = SamplingExtras(
        penalties=penalties_of(strengths), counts=new_counts(VOCAB, histories), count_rows=rows
    )
    zero = torch.zeros(3, device=DEVICE)
    steps = [sample(logits.to(DEVICE), zero, extras)[0] for _ in range(30)]
    for tokens in steps:
        assert (
            tokens.tolist() == expected_penalties(logits, histories, strengths).argmax(1).tolist()
        )
        for token, (_, completion) in zip(tokens.tolist(), histories, strict=True):
            completion.append(token)
    assert [len(set(completion)) > 1 for _, completion in histories] == [True] * 3
    assert sum(len(set(completion)) for _, completion in histories) > 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_added_before_penalties_and_the_argument_stays(dtype: torch.dtype) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    before = logits.clone()
    index = torch.tensor([0, 2, 2, 2], device=DEVICE)
    token_ids = torch.tensor([3, 60, 60, 3], device=DEVICE)
    values = torch.tensor([50.0, 30.0, 31.0, -math.inf], device=DEVICE)
    extras = SamplingExtras(bias=LogitBias(index, token_ids, values))
    changed = bias_and_penalize(logits, extras)
    expected = before.float().clone()
    expected[0, 3] += 50
    expected[2, 60] += 61  # the same pair twice: both count
    expected[2, 3] = -math.inf
    torch.testing.assert_close(changed, expected)
    assert changed.dtype == torch.float32
    assert sample(logits, torch.ones(3, device=DEVICE), extras)[0].tolist()[::2] == [3, 60]

    histories: list[tuple[list[int], list[int]]] = [([3], []), ([], []), ([], [60, 3])]
    strengths = torch.tensor([[2.0, 0.0, 0.0]] * 3)
    extras = SamplingExtras(
        bias=extras.bias,
        penalties=penalties_of(strengths),
        counts=new_counts(VOCAB, histories),
        count_rows=torch.tensor([1, 2, 3], device=DEVICE),
    )
    changed = bias_and_penalize(logits, extras)
    torch.testing.assert_close(
        changed.cpu(), expected_penalties(expected.cpu(), histories, strengths)
    )
    assert torch.equal(logits, before)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_forbidden_tokens_are_never_drawn(temperature: float) -> None:
    """As min_tokens forbids the end of a sequence; with filters that are asked to keep everything,
    too."""
    num_rows, forbidden = 500, [0, 5, 6]
    logits = torch.zeros(num_rows, 8, device=DEVICE)
    logits[:, 5] = 20
    index = torch.arange(num_rows, device=DEVICE).repeat_interleave(3)
    values = torch.full((3 * num_rows,), -math.inf, device=DEVICE)
    bias = LogitBias(index, torch.tensor(forbidden * num_rows, device=DEVICE), values)
    temperatures = torch.full((num_rows,), temperature, device=DEVICE)
    for settings in (None, filters([7] * num_rows, [0.999999] * num_rows, [0.0] * num_rows)):
        tokens = sample(logits, temperatures, SamplingExtras(filters=settings, bias=bias))[
            0
        ].tolist()
        assert set(tokens) == ({1, 2, 3, 4, 7} if temperature else {1})


def test_greedy_heeds_penalties_and_bias_but_no_filter() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0]] * 3, device=DEVICE)
    zero, rows = torch.zeros(3, device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    everything = filters([1, 2, 3], [0.1, 0.5, 0.9], [1.0, 0.5, 0.1])
    assert sample(logits, zero, SamplingExtras(filters=everything))[0].tolist() == [0, 0, 0]
    counts = new_counts(4, [([], []), ([], [0]), ([0], [])])
    strengths = penalties_of(torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [1.4, 2.0, 0.0]]))
    bias = LogitBias(
        torch.tensor([0], device=DEVICE),
        torch.tensor([2], device=DEVICE),
        torch.tensor([9.0], device=DEVICE),
    )
    extras = SamplingExtras(
        filters=everything, penalties=strengths, counts=counts, count_rows=rows, bias=bias
    )
    assert sample(logits, zero, extras)[0].tolist() == [2, 1, 1]


# --- logprobs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_top", [0, 1, 5])
def test_logprobs_are_of_the_models_own_logits(num_top: int, dtype: torch.dtype) -> None:
    """Whatever else changes what is drawn: bias, penalties, temperature and filters."""
    logits = 4 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    extras = SamplingExtras(
        filters=filters([3] * 5, [0.9] * 5, [0.1] * 5),
        penalties=penalties_of(STRENGTHS),
        counts=new_counts(VOCAB, HISTORIES),
        count_rows=torch.arange(1, 6, device=DEVICE),
        bias=LogitBias(
            torch.tensor([4], device=DEVICE),
            torch.tensor([17], device=DEVICE),
            torch.tensor([100.0], device=DEVICE),
        ),
        logprobs=LogprobRequest(torch.tensor([4, 1, 2], device=DEVICE), num_top),
    )
    tokens, logprobs = sample(logits, torch.full((5,), 0.7, device=DEVICE), extras)
    ids, values, ranks = logprobs
    assert ids.dtype == torch.int64 and values.dtype == torch.float32
    assert ids.shape == values.shape == (3, 1 + num_top)
    expected = logits.float().log_softmax(1)[[4, 1, 2]]
    assert tokens[4] == 17 and ids[:, 0].tolist() == tokens[[4, 1, 2]].tolist()
    torch.testing.assert_close(values, expected.gather(1, ids), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(values[:, 1:], expected.topk(num_top).values, rtol=1e-6, atol=1e-6)
    assert all(len(set(row)) == num_top for row in ids[:, 1:].tolist())
    for row, drawn, rank in zip(expected.tolist(), ids[:, 0].tolist(), ranks.tolist(), strict=True):
        assert sorted(row, reverse=True).index(row[drawn]) + 1 == rank  # tied tokens share the best


@pytest.mark.parametrize("dtype", DTYPES)
def test_processed_logprobs_are_of_what_is_drawn_from(dtype: torch.dtype) -> None:
    """Each row has another temperature and filter, of the logits with bias and penalties; the last
    but one is greedy, which counts as temperature 1.
    """
    temperatures = [0.7, 1.5, 1.0, 0.0, 0.4]
    top_k, top_p, min_p = [7, 0, 0, 0, 9], [1.0, 0.8, 1.0, 1.0, 0.9], [0.0, 0.0, 0.05, 0.0, 0.0]
    logits = 2 * torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    before = logits.clone()
    rows = torch.tensor([4, 1, 2, 3, 0], device=DEVICE)
    extras = SamplingExtras(
        filters=filters(top_k, top_p, min_p),
        penalties=penalties_of(STRENGTHS),
        counts=new_counts(VOCAB, HISTORIES),
        count_rows=torch.arange(1, 6, device=DEVICE),
        bias=LogitBias(rows[:2], rows[:2] + 7, torch.full((2,), 3.0, device=DEVICE)),
        logprobs=LogprobRequest(rows, VOCAB, is_processed=True),
    )
    changed = bias_and_penalize(logits, extras).cpu()
    expected = torch.stack(
        [
            transformers_probs(
                changed[row].float(), temperatures[row] or 1.0, top_k[row], top_p[row], min_p[row]
            )
            for row in rows.tolist()
        ]
    )
    tokens, (ids, values, _) = sample(logits, torch.tensor(temperatures, device=DEVICE), extras)
    assert torch.equal(logits, before)
    assert ids[:, 0].tolist() == tokens[rows].tolist()
    assert sorted(ids[0, 1:].tolist()) == list(range(VOCAB))
    # Where tokens are tied at a filter's edge, transformers may keep fewer of them.
    probs = values.exp().cpu()
    torch.testing.assert_close(probs[:, 1:].sum(1), torch.ones(5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probs, expected.gather(1, ids.cpu()), rtol=1e-4, atol=1e-6)
    assert (probs[:, 0] > 0).all()  # what was drawn is never left out
    assert (expected == 0).sum(1).tolist()[3] == 0 and (expected == 0).any()


# --- neighbours and ranks -------------------------------------------------------------------------


def one_of_each(num_rows: int) -> tuple[Tensor, Tensor, SamplingExtras]:
    """A step in which every option is in use, by some rows."""
    generator = torch.Generator().manual_seed(8)
    logits = (2 * torch.randn(num_rows, VOCAB, generator=generator)).to(DEVICE)
    numbers = range(num_rows)
    strengths = torch.tensor(
        [[1 + 0.5 * (i % 3 == 1), 0.3 * (i % 2), 0.1 * (i % 4)] for i in numbers]
    )
    strengths[0] = torch.tensor([1.0, 0.0, 0.0])
    histories = [([i, i + 1, 2 * i % VOCAB], [i, 3 * i % VOCAB]) for i in numbers]
    biased = torch.arange(1, num_rows, 2, device=DEVICE)
    extras = SamplingExtras(
        filters=filters(
            [0, 4, 0, 9] * (num_rows // 4), [1.0, 1.0, 0.7, 0.9] * (num_rows // 4), [0.0] * num_rows
        ),
        penalties=penalties_of(strengths),
        counts=new_counts(VOCAB, histories),
        count_rows=torch.arange(1, num_rows + 1, device=DEVICE),
        bias=LogitBias(biased, biased * 3 % VOCAB, torch.full_like(biased, 2, dtype=torch.float32)),
        logprobs=LogprobRequest(torch.arange(num_rows, device=DEVICE), 3),
    )
    return logits, torch.tensor([1.0, 0.8, 1.2, 0.0] * (num_rows // 4), device=DEVICE), extras


def test_a_row_that_asks_for_nothing_is_not_touched_by_its_neighbours() -> None:
    logits, temperatures, extras = one_of_each(16)
    tokens, _ = sample(logits, temperatures, extras)
    plain, logprobs = sample(logits, temperatures, None)
    assert logprobs is None and tokens[0] == plain[0] and not torch.equal(tokens, plain)


def run_rank(rank: int, num_ranks: int, path: str, results: Any) -> None:
    """What rank `rank` of `num_ranks` samples of its part of the logits of `one_of_each`."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=num_ranks
    )
    logits, temperatures, extras = one_of_each(8)
    part = -(-VOCAB // num_ranks)
    with tensor_parallel(rank, num_ranks):
        sampler = Sampler(part * rank, VOCAB)
    seeds = torch.arange(8)
    tokens, logprobs = sampler(
        logits[:, part * rank : part * (rank + 1)],
        temperatures,
        seeds,
        torch.full_like(seeds, 7),
        extras,
    )
    results.put((rank, tokens.tolist(), *(tensor.tolist() for tensor in logprobs)))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cuda", reason="forks, which a process that uses CUDA cannot")
def test_ranks_with_unequal_parts_of_the_vocabulary_sample_as_one(tmp_path: Path) -> None:
    logits, temperatures, extras = one_of_each(8)
    tokens, logprobs = sample(logits, temperatures, extras)
    context = multiprocessing.get_context("fork")  # quick: nothing is imported again
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=run_rank, args=(rank, 2, str(tmp_path / "store"), results))
        for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=60)
        assert process.exitcode == 0
    expected = tokens.tolist(), *(tensor.tolist() for tensor in logprobs)
    assert sorted(results.get() for _ in ranks) == [(0, *expected), (1, *expected)]


@pytest.mark.parametrize("num_ranks", [2, 4, 7])
def test_gathering_takes_the_padding_out(num_ranks: int) -> None:
    """Also where the last rank holds nothing; the exchange itself is replaced."""
    vocab = 5 if num_ranks == 4 else VOCAB
    logits, part = torch.randn(3, vocab, device=DEVICE), -(-vocab // num_ranks)
    parts = [logits[:, part * rank : part * (rank + 1)] for rank in range(num_ranks)]
    sent: list[Tensor] = []
    for rank in range(num_ranks):
        with tensor_parallel(rank, num_ranks):
            sampler = Sampler(part * rank, vocab)
        exchange = type(
            "Exchange",
            (),
            {"size": num_ranks, "all_gather": lambda self, x: sent.append(x) or x[None]},
        )
        sampler.tp = exchange()
        sampler.gather_vocabulary(parts[rank])
    exchange = type(
        "Exchange", (), {"size": num_ranks, "all_gather": lambda self, x: torch.stack(sent)}
    )
    sampler.tp = exchange()
    assert torch.equal(sampler.gather_vocabulary(parts[-1]), logits)
