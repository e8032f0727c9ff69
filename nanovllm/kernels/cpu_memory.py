"""Weights in huge pages: reading them is most of a CPU's step, and so is finding their pages."""

import ctypes
import mmap

import torch
from torch import Tensor, nn

HUGE_PAGE = 1 << 21  # bytes


def huge_pages(num_bytes: int) -> Tensor | None:
    """Return memory `[num_bytes]` uint8 in one mapping with pages of 2 MiB.

    Linux gives such pages to whoever asks, where it has them. None elsewhere, and for less than a
    page.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or num_bytes < HUGE_PAGE:
        return None
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(advice)
    except OSError:  # a kernel without them
        return None
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    return memory[start : start + num_bytes]


def move_to_huge_pages(module: nn.Module) -> None:
    """Move a CPU module's parameters, one by one, into huge pages, where there are any."""
    parameters = [param for param in module.parameters() if param.nbytes > 0]
    memory = huge_pages(sum(-(-param.nbytes // 64) * 64 for param in parameters))
    if memory is None:
        return
    start = 0
    for param in parameters:
        moved = memory[start : start + param.nbytes].view(param.dtype).view(param.shape)
        param.data = moved.copy_(param.data)
        start += -(-param.nbytes // 64) * 64  # cache lines


def in_huge_pages(tensor: Tensor) -> Tensor:
    """Return a copy of a contiguous CPU tensor in huge pages, or itself where there are none."""
    memory = huge_pages(tensor.nbytes)
    if memory is None:
        return tensor
    return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def give_freed_memory_back() -> None:
    """Have the system take what was freed, and what malloc keeps for later in the middle of its
    heap. It does so with a large block that fitted into what was free there.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
