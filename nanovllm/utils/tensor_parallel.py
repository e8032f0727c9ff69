"""Which rank of how many this process is.

Layers ask once, when they are built. torch.distributed's global state may be somebody else's: one rank uses none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class TensorParallel:
    rank: int = 0
    size: int = 1

    def shard(self, num: int) -> slice:
        """This rank's part of `num` things. They must divide evenly; the layers check that at build time."""
        return slice(num * self.rank // self.size, num * (self.rank + 1) // self.size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """`[...]` of each rank -> `[size, ...]` on every rank."""
        if self.size == 1:
            return x.unsqueeze(0)
        out = x.new_empty(self.size, *x.shape)
        dist.all_gather(list(out.unbind(0)), x.contiguous())
        return out


_current = TensorParallel()


def get_tensor_parallel() -> TensorParallel:
    return _current


@contextmanager
def tensor_parallel(rank: int, size: int) -> Iterator[TensorParallel]:
    """Layers built inside the `with` belong to this rank."""
    global _current
    before, _current = _current, TensorParallel(rank, size)
    try:
        yield _current
    finally:
        _current = before
