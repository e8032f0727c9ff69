"""Tokens that may not be drawn: allowed_token_ids, bad_words, thinking_token_budget, masks."""

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_idle, generate_ids, make_llm

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.token_mask import TokenMasks, mask_tokens, mask_tokens_torch
from nanovllm.sampling import rule_maker
from nanovllm.sampling.masks import StepMasks
from nanovllm.sampling.token_rules import ALL_BITS, BadWords, ThinkingBudget, mask_of

PROMPTS = [[5, 9, 40, 41], [300, 301], [7] * 20]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm(DEMO_MODEL)


# --- masks ----------------------------------------------------------------------------------------


def bits_of(mask: np.ndarray) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def test_a_mask_has_the_bits_of_its_tokens() -> None:
    r = random.Random(0)
    for _ in range(50):
        token_ids = r.choices(range(96), k=r.randint(1, 40))  # some twice
        assert bits_of(mask_of(token_ids, 3)) == set(token_ids)


@pytest.mark.parametrize("apply", [mask_tokens, mask_tokens_torch])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab_size, num_words", [(127, 4), (5_001, 160), (64, 2)])
def test_forbidden_tokens_and_no_others_get_minus_infinity(
    apply: Any, dtype: torch.dtype, vocab_size: int, num_words: int
) -> None:
    if apply is mask_tokens and not HAS_TRITON:
        pytest.skip("Triton is not installed")
    r = np.random.default_rng(0)
    words = r.integers(0, 2**32, (3, num_words), dtype=np.uint32)
    words[2] = 0
    rows = [4, 0, 3]
    # Of a wider tensor, as where several ranks pad their parts of the vocabulary.
    whole = torch.randn(6, vocab_size + 3).to(dtype)
    before = whole.clone()
    masks = TokenMasks(torch.tensor(rows), torch.from_numpy(words.view(np.int32)))
    apply(whole[:, :vocab_size], masks)
    for row in range(6):
        allowed = set(range(vocab_size))
        if row in rows:
            allowed &= bits_of(words[rows.index(row)])
        for column in range(vocab_size + 3):
            is_kept = column in allowed or column >= vocab_size
            expected = before[row, column] if is_kept else -float("inf")
            assert whole[row, column] == expected, (row, column)


def test_equal_masks_travel_to_other_ranks_once() -> None:
    r = np.random.default_rng(0)
    distinct = r.integers(0, 2**32, (3, 400), dtype=np.uint32)
    words = distinct[[0, 1, 0, 0, 2, 1, 0, 0, 0, 0]]
    masks = StepMasks(np.arange(10), words)
    sent = pickle.dumps(masks)
    received = pickle.loads(sent)
    assert np.array_equal(received.rows, masks.rows) and np.array_equal(received.words, words)
    assert len(sent) < distinct.nbytes + 1_000


# --- rules ----------------------------------------------------------------------------------------


def allowed_by(rule: Any, token_ids: list[int], start: int) -> set[int]:
    mask = np.full(2, ALL_BITS, np.uint32)
    rule.narrow(mask, token_ids, start)
    return bits_of(mask)


def test_bad_words_are_forbidden_where_they_would_end() -> None:
    rule = BadWords([(1, 2), (1, 1, 3), (63, 0)], num_words=2)
    everything = set(range(64))
    assert allowed_by(rule, [1, 1], start=2) == everything  # in the prompt they do not count
    assert allowed_by(rule, [1, 1], start=1) == everything - {2}
    assert allowed_by(rule, [1, 1], start=0) == everything - {2, 3}
    assert allowed_by(rule, [9, 9, 63], start=1) == everything - {0}
    assert allowed_by(rule, [1, 2], start=0) == everything


@pytest.mark.parametrize(
    "prompt, completion, is_forced",
    [
        ([5], [8, 8, 8, 8], False),  # never thought
        ([5], [30, 8, 8], False),
        ([5], [30, 8, 8, 8], True),  # three tokens are used up
        ([5], [30, 8, 8, 8, 31, 8, 8], False),  # it has ended
        ([5], [30, 8, 8, 31, 9, 30], False),
        ([5], [30, 8, 8, 31, 9, 30, 8], True),  # together with the first time
        ([30, 8, 8, 8, 8], [8, 8], False),  # the prompt's tokens do not count
        ([30, 8, 8, 8, 8], [8, 8, 8], True),
        ([30, 8, 31], [8, 8, 8], False),
    ],
)
def test_thinking_ends_when_its_budget_is_used_up(
    prompt: list[int], completion: list[int], is_forced: bool
) -> None:
    """Read at once, and token by token."""
    at_once = ThinkingBudget(3, start_id=30, end_id=31, num_words=2)
    step_by_step = ThinkingBudget(3, start_id=30, end_id=31, num_words=2)
    everything = set(range(64))
    expected = {31} if is_forced else everything
    assert allowed_by(at_once, prompt + completion, len(prompt)) == expected
    for length in range(len(completion) + 1):
        token_ids = prompt + completion[:length]
        allowed = allowed_by(step_by_step, token_ids, len(prompt))
    assert allowed == expected


# --- in the engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
def test_only_allowed_tokens_are_drawn(llm: LLM, monkeypatch: Any, depth: int) -> None:
    monkeypatch.setattr(llm, "_max_pending", depth)
    allowed = [3, 31, 32, 700, 1023]
    options: dict[str, Any] = dict(max_tokens=30, ignore_eos=True, temperature=2.0)
    plain = SamplingParams(seed=1, **options)
    some = SamplingParams(seed=2, allowed_token_ids=allowed, **options)
    alone = generate_ids(llm, PROMPTS[:1], plain)
    together = generate_ids(llm, PROMPTS, [plain, some, some])
    assert together[0] == alone[0]
    assert set(together[1]) == set(together[2]) == set(allowed)


@pytest.mark.parametrize("depth", [0, 1])
def test_bad_words_do_not_occur(llm: LLM, monkeypatch: Any, depth: int) -> None:
    """Of one token and of several, and what else the model says stays as likely as before."""
    monkeypatch.setattr(llm, "_max_pending", depth)
    prompts = ["Tell me about the village.", "Who lives there?"]
    options: dict[str, Any] = dict(max_tokens=30, ignore_eos=True, temperature=0)
    free = [output["text"] for output in llm.generate(prompts, SamplingParams(**options), False)]
    words = sorted({word for text in free for word in text.split() if word.isalpha()})[:12]
    spelled = [len(llm.tokenizer.encode(f" {word}", add_special_tokens=False)) for word in words]
    assert min(spelled) == 1 < max(spelled)
    params = SamplingParams(**options, bad_words=words)
    texts = [output["text"] for output in llm.generate(prompts, params, False)]
    assert_idle(llm)
    for text in texts:
        assert text not in free
        assert not {*words} & {*text.split()}, text


@pytest.mark.parametrize("depth", [0, 1])
def test_a_thinking_budget(llm: LLM, monkeypatch: Any, depth: int) -> None:
    """With other tokens for the two of a thinking model, which the demo checkpoint lacks."""
    monkeypatch.setattr(llm, "_max_pending", depth)
    start_id, end_id = 400, 401
    vocab = {number: token for token, number in llm.tokenizer.get_vocab().items()}
    monkeypatch.setattr(rule_maker, "THINK_START", vocab[start_id])
    monkeypatch.setattr(rule_maker, "THINK_END", vocab[end_id])
    # The end is never drawn of the model's own accord.
    options: dict[str, Any] = dict(max_tokens=20, ignore_eos=True, logit_bias={end_id: -100})
    params = [
        SamplingParams(seed=i, thinking_token_budget=i * 3, **options) for i in range(len(PROMPTS))
    ]
    outputs = generate_ids(llm, [[*prompt, start_id] for prompt in PROMPTS], params)
    assert [output.index(end_id) for output in outputs] == [0, 3, 6]
    assert all(output.count(end_id) == 1 for output in outputs)
    assert all(end_id not in output for output in generate_ids(llm, PROMPTS, params))


def test_wrong_values(llm: LLM, checkpoint: Any) -> None:
    for name, value, error, message in [
        ("allowed_token_ids", [], ValueError, "at least one token id; None allows all"),
        ("allowed_token_ids", [True], TypeError, "list of integers"),
        ("allowed_token_ids", 5, TypeError, "list of integers or None, not 5"),
        ("bad_words", "bad", TypeError, "list of strings or None, not 'bad'"),
        ("bad_words", [" "], ValueError, "more than blanks"),
        ("thinking_token_budget", -1, ValueError, "at least 0"),
    ]:
        with pytest.raises(error, match=message):
            SamplingParams(**{name: value})
    assert SamplingParams(bad_words=[]).is_plain
    for params, message in [
        (SamplingParams(allowed_token_ids=[1024]), "token id 1024; the vocabulary is 0 to 1023"),
        (SamplingParams(thinking_token_budget=5), "prompt 0.*'<think>' as one token"),
    ]:
        with pytest.raises(ValueError, match=message):
            llm.generate([[1, 2]], params)
    with pytest.raises(ValueError, match="has bad_words, and .* has no tokenizer"):
        make_llm(checkpoint.path).generate([[1, 2]], SamplingParams(bad_words=["a"]))
