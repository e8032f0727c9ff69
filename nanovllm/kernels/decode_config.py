"""How decode attention divides its work over the GPU."""

from typing import NamedTuple

import torch

from nanovllm.kernels._triton import device_limits, next_power_of_2

MAX_SPLITS = 32


class DecodeConfig(NamedTuple):
    """How `paged_decode` divides the work; the result does not depend on it."""

    block_n: int  # tokens in a tile
    num_splits: int  # programs that share one sequence and KV head, at most MAX_SPLITS
    num_warps: int = 4
    num_stages: int = 3  # tiles in shared memory: the one that is computed, and those on their way
    # Of a thread; with fewer, more programs share a multiprocessor. None: as many as it wants.
    max_registers: int | None = None


def decode_config(
    num_seqs: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
    window: int | None = None,
    cache_dtype: torch.dtype | None = None,
) -> DecodeConfig:
    """Return the configuration that was measured to be fastest, within the GPU's shared memory.

    dtype, cache_dtype: of q, and of K and V; None: the same.
    It does not depend on the context lengths, because a CUDA graph that was recorded with it is
    replayed with others.
    """
    num_multiprocessors, shared_memory = device_limits(device)
    programs = max(1, num_seqs * kv_heads)
    splits = 1
    stages = 3
    fills_once = 3 * num_multiprocessors // 4 < programs <= num_multiprocessors
    if programs <= 2 * num_multiprocessors and not fills_once:
        # Up to four programs a multiprocessor, by a power of two. More do not help; with fewer the
        # longest sequence would be computed alone while the others have ended. But one program for
        # each multiprocessor gains more by doing without the kernel that combines splits.
        largest = 4 * num_multiprocessors // programs
        splits = min(MAX_SPLITS, 1 << (largest.bit_length() - 1))
    block_n = 64
    max_registers = None
    cache_itemsize = dtype.itemsize if cache_dtype is None else cache_dtype.itemsize
    token_bytes = next_power_of_2(head_dim) * cache_itemsize
    if next_power_of_2(head_dim) * dtype.itemsize == 256:
        if cache_itemsize == 1:
            max_registers = 128  # a tile of 64 tokens has half the bytes, and wants no more
        elif programs > 6 * num_multiprocessors:
            # Many programs, maybe with short contexts, gain when four of them share a
            # multiprocessor. Few gain by longer tiles and by as many registers as they want.
            block_n = 32
            max_registers = 128
    if block_size % 16 == 0:
        # The largest power of two that divides block_size: a tile in one block is found faster.
        block_n = min(block_n, block_size & -block_size)
    # A stage holds a tile of K and one of V.
    while block_n > 16 and 2 * stages * block_n * token_bytes > shared_memory:
        block_n //= 2
    if window is not None:
        # More splits than the window has tiles would find no work. Where it begins inside a tile,
        # it has one tile more.
        splits = min(splits, 1 + -(-(window - 1) // block_n))
    return DecodeConfig(block_n, splits, num_stages=stages, max_registers=max_registers)
