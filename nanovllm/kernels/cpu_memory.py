"""Weights in huge pages: reading them is most of a CPU's step, and so is finding their pages."""

import mmap

import torch
from torch import nn

HUGE_PAGE = 1 << 21  # bytes


def move_to_huge_pages(module: nn.Module) -> None:
    """Move a CPU module's parameters, one by one, into one mapping with pages of 2 MiB.

    Linux gives such pages to whoever asks, where it has them; elsewhere this does nothing.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    parameters = [param for param in module.parameters() if param.nbytes > 0]
    num_bytes = sum(-(-param.nbytes // 64) * 64 for param in parameters)
    if advice is None or num_bytes < HUGE_PAGE:
        return
    mapping = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapping.madvise(advice)
    except OSError:  # a kernel without them
        return
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    for param in parameters:
        moved = memory[start : start + param.nbytes].view(param.dtype).view(param.shape)
        param.data = moved.copy_(param.data)
        start += -(-param.nbytes // 64) * 64  # cache lines
