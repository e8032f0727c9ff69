"""Which rank of how many this process is, and what several exchange.

Layers ask once, when they are built. torch.distributed's global state may be somebody else's: one rank uses none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorParallel:
    rank: int = 0
    size: int = 1
    small_all_reduce: Any = (
        None  # kernels.all_reduce.SmallAllReduce, on GPUs that can read each other's memory
    )
    prefill_all_reduce: Any = None  # kernels.prefill_all_reduce.PrefillAllReduce, likewise

    def all_reduce(
        self, x: Tensor, residual: Tensor | None = None, norm: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """`residual` + the sum of x over the ranks, in place of residual, or else of x; and `norm` (an RMSNorm) of
        it, where it is to be had on the way. With a residual, x may be in parts, `[parts, n, hidden]`."""
        if self.small_all_reduce is not None and self.small_all_reduce.takes(
            x if residual is None else residual
        ):
            return self.small_all_reduce(
                x, residual, *((norm.weight, norm.eps) if norm is not None else ())
            )
        if residual is not None and x.dim() > residual.dim():
            x = x.sum(0)
        dist.all_reduce(x)
        return x if residual is None else residual.add_(x), None

    def sums_in_pieces(self, num_tokens: int) -> bool:
        return self.prefill_all_reduce is not None and self.prefill_all_reduce.takes(num_tokens)

    def all_reduce_in_pieces(
        self, compute: Callable[[slice], Tensor], residual: Tensor, norm: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """`all_reduce` of what `compute` yields for pieces of the rows, one being summed while the next is computed.

        The result must be waited for, and is valid until the next such sum. With a norm that is the norm, and a rank
        has only its own part of the rows of `residual`; without, it is the sum, and `residual` is left half done.
        """
        if norm is None:
            return self.prefill_all_reduce(compute, residual, None, 0.0), None
        return residual, self.prefill_all_reduce(compute, residual, norm.weight, norm.eps)

    def arriving(self, num_tokens: int) -> Iterator[slice]:
        """Rows of the last such sum, as they arrive."""
        return self.prefill_all_reduce.arriving(num_tokens)

    def wait_for_pieces(self) -> None:
        if self.prefill_all_reduce is not None:
            self.prefill_all_reduce.wait_for_all()

    def all_gather(self, x: Tensor) -> Tensor:
        """Floats `[...]` of each rank -> `[size, ...]` on every rank."""
        out = x.new_zeros(self.size, *x.shape)
        if self.small_all_reduce is not None and self.small_all_reduce.takes(out):
            out[self.rank] = x
            return self.small_all_reduce(out)[0]  # the sum of what is zero but on one rank
        dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out


_current = TensorParallel()


def get_tensor_parallel() -> TensorParallel:
    return _current


@contextmanager
def tensor_parallel(rank: int, size: int, *all_reduces: Any) -> Iterator[TensorParallel]:
    """Layers built inside the `with` belong to this rank."""
    global _current
    before, _current = _current, TensorParallel(rank, size, *all_reduces)
    try:
        yield _current
    finally:
        _current = before
