"""The all-reduce kernel, one rank at a time, in memory where the other ranks' words lie already."""

import functools

import pytest
import torch

from nanovllm.kernels._triton import HAS_TRITON, next_power_of_2, tl
from nanovllm.kernels.all_reduce import EMPTY, MAX_BYTES, OTHER_NAN, _all_reduce_kernel
from nanovllm.kernels.rms_norm import rms_norm_torch

MAX_WORDS = MAX_BYTES // 4
ROW = 600  # numbers a row
ROUND = 2**31 - 1  # the next is negative: the counter wraps around
SENT = -(2**31)

pytestmark = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


def encode(x: torch.Tensor) -> torch.Tensor:
    words = x.view(torch.int32)
    return torch.where(words == EMPTY, OTHER_NAN, words)


@pytest.mark.parametrize("two_shot", [False, True], ids=["one-shot", "two-shot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "ranks, rank, numel, has_norm, num_splits",
    [(2, 1, 6000, True, 1), (4, 2, 9000, True, 1), (3, 0, 2, False, 1), (2, 0, 6000, True, 3)],
)
def test_sums_and_what_is_sent(
    ranks: int,
    rank: int,
    numel: int,
    has_norm: bool,
    num_splits: int,
    dtype: torch.dtype,
    two_shot: bool,
) -> None:
    torch.manual_seed(0)
    slice_words = ROW * dtype.itemsize // 4
    memories = [
        torch.full((2 * ranks * MAX_WORDS,), EMPTY, dtype=torch.int32) for _ in range(ranks)
    ]
    # This rank's: of a GEMM whose inner dimension was split.
    split_sums = torch.randn(num_splits, numel).to(dtype)
    parts = [torch.randn(numel).to(dtype) for _ in range(ranks)]
    parts[rank] = functools.reduce(torch.add, split_sums.float()).to(dtype)
    total = parts[0].float()
    for part in parts[1:]:  # in the order of the ranks
        total = total + part.float()
    total = total.to(dtype)
    num_words = numel * parts[0].itemsize // 4
    # This round's half.
    slots = [memory[: MAX_WORDS * ranks].view(ranks, MAX_WORDS) for memory in memories]
    owner = torch.arange(num_words) // slice_words % ranks
    for peer in range(ranks):
        if peer != rank:
            came = encode(parts[peer])
            if two_shot:
                # A peer sends its part to the owner of a slice, and the sum of its own slices to
                # all.
                came = torch.where(
                    owner == rank, came, torch.where(owner == peer, encode(total), EMPTY)
                )
            slots[rank][peer, :num_words] = came
    residual = torch.randn(numel).to(dtype)
    expected = (total.float() + residual.float()).to(dtype)
    rounds = torch.full((MAX_WORDS // slice_words,), ROUND, dtype=torch.int32)
    stop = torch.zeros(1, dtype=torch.int32)
    norm, normed = torch.randn(ROW).to(dtype), torch.full((numel,), torch.nan).to(dtype)
    words, out, *norm_words = (
        x.view(torch.int32) for x in (split_sums.flatten(), residual, norm, normed)
    )
    num_slices = -(-num_words // slice_words)
    _all_reduce_kernel[(num_slices,)](
        words,
        out,
        out,
        *(norm_words if has_norm else (None, None)),
        1e-3,
        torch.tensor([memory.data_ptr() for memory in [*memories, stop]]),
        rounds,
        num_words,
        rank,
        SPLITS=num_splits,
        RANKS=ranks,
        SLICE=slice_words,
        BLOCK=next_power_of_2(slice_words),
        MAX_WORDS=MAX_WORDS,
        DTYPE=getattr(tl, str(dtype).split(".")[1]),
        TWO_SHOT=two_shot,
        EMPTY=EMPTY,
        OTHER_NAN=OTHER_NAN,
        PDL=False,
    )
    if has_norm:
        torch.testing.assert_close(
            normed, rms_norm_torch(expected.view(-1, ROW), norm, 1e-3).flatten()
        )
    assert torch.equal(residual, expected)
    assert (rounds[:num_slices] == SENT).all() and (rounds[num_slices:] == ROUND).all()
    for peer in range(ranks):
        if peer != rank:
            mine = encode(parts[rank])
            if two_shot:
                mine = torch.where(
                    owner == peer, mine, torch.where(owner == rank, encode(total), EMPTY)
                )
            assert torch.equal(slots[peer][rank, :num_words], mine)
            # The other half is left alone.
            assert (memories[peer][ranks * MAX_WORDS :] == EMPTY).all()
    assert (slots[rank] == EMPTY).all()  # all that came was read
