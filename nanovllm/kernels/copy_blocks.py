"""Copies of the beginnings of KV-cache blocks, in all layers, as copy-on-write needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nanovllm.kernels._triton import tl, triton
from nanovllm.kernels.fp8_cache import as_bytes

if TYPE_CHECKING:
    from nanovllm.sharing.copy_on_write import BlockCopy

TILE = 4096  # numbers that a program copies


@triton.jit
def _copy_blocks_kernel(
    cache_ptr, copies_ptr, plane_size, block_size, token_size, TILE: tl.constexpr
):
    """A program copies TILE numbers of one block's keys, or values, of one layer."""
    copy_ptr = copies_ptr + tl.program_id(1) * 3
    source = tl.load(copy_ptr).to(tl.int64)  # a cache has more than 2^31 numbers
    target = tl.load(copy_ptr + 1).to(tl.int64)
    num_tokens = tl.load(copy_ptr + 2)
    offset = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = offset < num_tokens * token_size
    plane_ptr = cache_ptr + tl.program_id(2).to(tl.int64) * plane_size
    numbers = tl.load(plane_ptr + source * block_size + offset, mask=mask)
    tl.store(plane_ptr + target * block_size + offset, numbers, mask=mask)


def copy_blocks(
    kv_cache: Tensor, copies: list[BlockCopy], to_device: Callable[..., Tensor]
) -> None:
    """Copy the first tokens of blocks to other blocks, in all layers, as if one after the other.

    kv_cache: `[2, layers, num_blocks, block_size, kv_heads, head_dim]`, contiguous.
    to_device: copies an array there as a tensor, without waiting.
    """
    kv_cache = as_bytes(kv_cache)
    if kv_cache.is_cuda:
        copy_blocks_triton(kv_cache, copies, to_device)
    else:
        copy_blocks_torch(kv_cache, copies)


def copy_blocks_triton(
    kv_cache: Tensor, copies: list[BlockCopy], to_device: Callable[..., Tensor]
) -> None:
    """`copy_blocks` on a GPU.

    One launch does it, where PyTorch would need one for each layer and copy: a cache is too large
    for its 32-bit offsets.
    """
    assert kv_cache.is_contiguous()
    token_size = kv_cache[0, 0, 0, 0].numel()
    for part in independent(copies):
        most_numbers = max(copy.num_tokens for copy in part) * token_size
        num_planes = kv_cache.shape[0] * kv_cache.shape[1]
        grid = (triton.cdiv(most_numbers, TILE), len(part), num_planes)
        _copy_blocks_kernel[grid](
            kv_cache,
            to_device(np.array(part, dtype=np.int32)),
            kv_cache[0, 0].numel(),
            kv_cache[0, 0, 0].numel(),
            token_size,
            TILE=TILE,
        )


def copy_blocks_torch(kv_cache: Tensor, copies: list[BlockCopy]) -> None:
    """`copy_blocks` in PyTorch: the reference, and the CPU's way."""
    for source, target, num_tokens in copies:
        kv_cache[:, :, target, :num_tokens] = kv_cache[:, :, source, :num_tokens]


def independent(copies: list[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """Cut copies into parts, each of which may be made in any order; nearly always it is one.

    A block may come twice if a step could not be scheduled at once: a target is freed meanwhile,
    and is the target of another copy.
    """
    part: list[BlockCopy] = []
    sources: set[int] = set()
    targets: set[int] = set()
    for copy in copies:
        if copy.target in sources or copy.target in targets or copy.source in targets:
            yield part
            part = []
            sources.clear()
            targets.clear()
        part.append(copy)
        sources.add(copy.source)
        targets.add(copy.target)
    yield part
