"""Which tensor-parallel rank this process is, of how many, and the sums over all of them.

A layer asks for its `TensorParallel` once, when it is built. With one rank nothing here uses
torch.distributed, whose global state may belong to somebody else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # utils import nothing of the package when they run
    from nanovllm.kernels.all_reduce import SmallAllReduce
    from nanovllm.kernels.prefill_all_reduce import PrefillAllReduce
    from nanovllm.quantization.weight_format import Norm, PartialSums


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """One rank's place among the others. The two kernels are there if the GPUs share memory."""

    rank: int = 0
    size: int = 1
    small_all_reduce: SmallAllReduce | None = None  # for up to 2 MiB
    prefill_all_reduce: PrefillAllReduce | None = None  # for steps of at least 4,096 tokens

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x, of any shape, over the ranks, in place."""
        if self.small_all_reduce is not None and self.small_all_reduce.takes(x):
            return self.small_all_reduce(x)[0]
        dist.all_reduce(x)
        return x

    def add_all_reduced(
        self, residual: Tensor, product: Tensor | PartialSums, norm: Norm | None
    ) -> Tensor | None:
        """Add the sum of the ranks' products to `residual` `[n, out]`, in place. Returns `norm` of
        the result where the kernel that adds computes it on the way, else None.
        """
        if self.small_all_reduce is not None and self.small_all_reduce.takes(residual):
            x = product if isinstance(product, Tensor) else product.values
            # Its kernel reads a weight in the words of the rows: two numbers each, if 16 bits wide.
            if norm is None or norm.weight.dtype != residual.dtype:
                return self.small_all_reduce(x, residual)[1]
            return self.small_all_reduce(x, residual, norm.weight, norm.eps)[1]
        residual.add_(self.all_reduce(product if isinstance(product, Tensor) else product.sum()))
        return None

    def sums_in_pieces(self, num_tokens: int) -> bool:
        """Whether products of so many tokens are to be summed by `add_in_pieces`."""
        return self.prefill_all_reduce is not None and self.prefill_all_reduce.takes(num_tokens)

    def add_in_pieces(
        self, compute: Callable[[slice], Tensor], residual: Tensor, norm: Norm
    ) -> Tensor:
        """Sum what `compute` returns for pieces of the rows, one piece while the next is computed.

        Each rank owns a share of the rows of every piece. It adds the sum to its own rows of
        `residual` `[n, out]`, and sends `norm` of them to the other ranks.

        Returns the norm of all rows, `[n, out]`. It is valid until the next sum in pieces, and
        must be waited for, by `arriving` or `wait_for_pieces`; `compute` may read a piece of it
        that the next sum in pieces has got to.
        """
        assert self.prefill_all_reduce is not None
        return self.prefill_all_reduce(compute, residual, norm.weight, norm.eps)

    def arriving(self, num_tokens: int) -> Iterator[slice]:
        """Yield the rows of the last sum in pieces, as they arrive."""
        assert self.prefill_all_reduce is not None
        return self.prefill_all_reduce.arriving(num_tokens)

    def wait_for_pieces(self) -> None:
        """Let the GPU wait until all of the last sum in pieces is there."""
        if self.prefill_all_reduce is not None:
            self.prefill_all_reduce.wait_for_all()

    def collect_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return the rows number `rows` `[m]` of hidden `[n, out]`, as their owners have them.

        Sums in pieces have left each row of `hidden` up to date on one rank only.
        """
        assert self.prefill_all_reduce is not None
        self.wait_for_pieces()
        is_owner = self.prefill_all_reduce.owns(rows, len(hidden))
        return self.all_reduce(hidden[rows].masked_fill(~is_owner.unsqueeze(1), 0.0))

    def all_gather(self, x: Tensor) -> Tensor:
        """Gather floats `[...]` of each rank: `[size, ...]` on every rank."""
        out = x.new_zeros(self.size, *x.shape)
        if self.small_all_reduce is not None and self.small_all_reduce.takes(out):
            out[self.rank] = x
            return self.small_all_reduce(out)[0]  # the sum of what is zero but on one rank
        dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out


_current = TensorParallel()


def get_tensor_parallel() -> TensorParallel:
    """Return the place that layers which are built now belong to."""
    return _current


@contextmanager
def tensor_parallel(
    rank: int,
    size: int,
    small_all_reduce: SmallAllReduce | None = None,
    prefill_all_reduce: PrefillAllReduce | None = None,
) -> Iterator[TensorParallel]:
    """Have the layers that are built inside the `with` belong to this rank."""
    global _current
    previous = _current
    _current = TensorParallel(rank, size, small_all_reduce, prefill_all_reduce)
    try:
        yield _current
    finally:
        _current = previous
