"""The all-reduce kernel, one rank at a time, in memory where the other ranks' words lie already."""

import pytest
import torch

from nanovllm.kernels._triton import HAS_TRITON, tl
from nanovllm.kernels.all_reduce import BLOCK, MAX_BYTES, _all_reduce_kernel

MAX_WORDS = MAX_BYTES // 4
ROUND = 2**31 - 1  # the next is negative: the counter wraps around
SENT = -(2**31)

pytestmark = pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter")


def encode(x: torch.Tensor, round_: int) -> torch.Tensor:
    return (round_ << 32) | (x.view(torch.int32).long() & 0xFFFFFFFF)


@pytest.mark.parametrize("two_shot", [False, True], ids=["one-shot", "two-shot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("ranks, rank, numel", [(2, 1, 6000), (4, 2, 9000), (3, 0, 2)])
def test_sums_and_what_is_sent(ranks: int, rank: int, numel: int, dtype: torch.dtype, two_shot: bool) -> None:
    torch.manual_seed(0)
    memories = [torch.zeros(2 * ranks * MAX_WORDS, dtype=torch.int64) for _ in range(ranks)]
    parts = [torch.randn(numel).to(dtype) for _ in range(ranks)]
    total = parts[0].float()
    for part in parts[1:]:  # in the order of the ranks
        total = total + part.float()
    total = total.to(dtype)
    num_words = numel * parts[0].itemsize // 4
    slots = [memory[:MAX_WORDS * ranks].view(ranks, MAX_WORDS) for memory in memories]  # this round's half
    owner = torch.arange(num_words) // BLOCK % ranks
    for peer in range(ranks):
        if peer != rank:
            came = encode(parts[peer], SENT)
            if two_shot:  # a peer sends its part to the owner of a slice, and the sum of its own slices to all
                came = torch.where(owner == rank, came, torch.where(owner == peer, encode(total, SENT), 0))
            slots[rank][peer, :num_words] = came
    residual = torch.randn(numel).to(dtype)
    expected = (total.float() + residual.float()).to(dtype)
    rounds = torch.full((MAX_WORDS // BLOCK,), ROUND, dtype=torch.int32)
    words, out = parts[rank].view(torch.int32), residual.view(torch.int32)
    num_slices = -(-num_words // BLOCK)
    _all_reduce_kernel[(num_slices,)](
        words, out, out, torch.tensor([memory.data_ptr() for memory in memories]), rounds,
        torch.zeros(1, dtype=torch.int32), num_words, rank, RANKS=ranks, BLOCK=BLOCK, MAX_WORDS=MAX_WORDS,
        DTYPE=getattr(tl, str(dtype).split(".")[1]), TWO_SHOT=two_shot, HAS_RESIDUAL=True, PDL=False,
    )  # fmt: skip
    assert torch.equal(residual, expected)
    assert (rounds[:num_slices] == SENT).all() and (rounds[num_slices:] == ROUND).all()
    for peer in range(ranks):
        if peer != rank:
            mine = encode(parts[rank], SENT)
            if two_shot:
                mine = torch.where(owner == peer, mine, torch.where(owner == rank, encode(total, SENT), 0))
            assert torch.equal(slots[peer][rank, :num_words], mine)
            assert not memories[peer][ranks * MAX_WORDS :].any()  # the other half is left alone
