"""The sums of a prefill over several GPUs: how rows are cut, and the kernel that sums them."""

import pytest
import torch

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.prefill_all_reduce import MIN_ROWS, add_norm, pieces
from nanovllm.kernels.rms_norm import rms_norm_torch


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_pieces_cover_all_rows_once(ranks: int) -> None:
    assert pieces(2 * MIN_ROWS - 1, ranks) == []
    for num_rows in [*range(2 * MIN_ROWS, 2 * MIN_ROWS + 50), 5003, 6143, 16384, 100_000]:
        cut = pieces(num_rows, ranks)
        assert 1 < len(cut) <= 2 * ranks
        assert [row for rows in cut for row in range(rows.start, rows.stop)] == list(range(num_rows))
        assert all(rows.start % ranks == 0 for rows in cut)  # so no rank's parts of the pieces overlap in its inbox


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "ranks, rank, num_rows, has_norm", [(2, 0, 5, True), (4, 2, 3, True), (3, 1, 4, False), (2, 1, 0, True)]
)
def test_sum_and_norm(ranks: int, rank: int, num_rows: int, has_norm: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = torch.randn(ranks, num_rows, 200).to(dtype)
    residual, weight = torch.randn(num_rows, 200).to(dtype), torch.randn(200).to(dtype)
    expected = residual.float()
    for part in parts:
        expected = expected + part.float()
    expected = expected.to(dtype)
    inbox = torch.full((ranks, num_rows + 3, 200), torch.nan).to(dtype)  # a rank's own slot is not read
    for source in range(ranks):
        if source != rank:
            inbox[source, 1 : num_rows + 1] = parts[source]
    out = torch.full_like(residual, torch.nan)
    add_norm(parts[rank], inbox[:, 1 : num_rows + 1], residual, out, weight if has_norm else None, 1e-3, rank)
    assert torch.equal(residual, expected)
    torch.testing.assert_close(out, rms_norm_torch(expected, weight, 1e-3) if has_norm else expected)
