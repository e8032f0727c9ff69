"""The sampler's kernel on a GPU against its PyTorch reference, at the size of a real vocabulary."""

import pytest
import torch

from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size, first_id", [(151_936, 0), (75_968, 75_968), (5_001, 17)])
def test_draws_equal_the_references(vocab_size: int, first_id: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = 64
    logits = (torch.randn(rows, vocab_size, device="cuda") * 3).to(dtype)
    temperatures = torch.rand(rows, device="cuda") + 0.2
    temperatures[::5] = 0
    seeds = torch.randint(0, 2**62, (rows,), device="cuda")
    positions = torch.randint(0, 40_000, (rows,), device="cuda")
    scores, tokens = gumbel_argmax(logits, temperatures, seeds, positions, first_id)
    expected_scores, expected = gumbel_argmax_torch(logits, temperatures, seeds, positions, first_id)
    # The kernel's logarithms are approximate; that may turn a near tie, and no more.
    torch.testing.assert_close(scores, expected_scores, atol=1e-4, rtol=1e-5)
    assert (tokens == expected).sum() >= rows - 1
    greedy = temperatures == 0
    assert torch.equal(tokens[greedy], logits[greedy].float().argmax(1) + first_id)


def test_frequencies_follow_the_softmax() -> None:
    torch.manual_seed(0)
    draws, vocab_size = 200_000, 40
    logits = torch.randn(vocab_size, device="cuda") * 1.5
    rows = logits.expand(draws, vocab_size)
    seeds = torch.arange(draws, device="cuda")
    ones = torch.ones(draws, device="cuda")
    _, tokens = gumbel_argmax(rows, ones * 0.8, seeds, seeds % 7)
    expected = torch.softmax(logits / 0.8, dim=0) * draws
    counts = tokens.bincount(minlength=vocab_size)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 73  # of 39 degrees of freedom: exceeded by chance once in 1,000
