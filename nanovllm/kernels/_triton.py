"""`triton` and `tl` for the kernel files, also where Triton cannot be installed, and a GPU's limits."""

from functools import lru_cache

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:  # e.g. macOS: the PyTorch references must still import
    HAS_TRITON = False

    class _MissingKernel:
        def __init__(self, function):
            self.name = function.__name__

        def __getitem__(self, grid):
            raise RuntimeError(f"{self.name} needs Triton; pip install triton, or attention_backend='torch'")

    class _MissingTriton:
        """Just enough of `triton` and `triton.language` for the `@triton.jit` functions to be defined."""

        constexpr = object

        @staticmethod
        def jit(function=None, **options):
            return _MissingTriton.jit if function is None else _MissingKernel(function)

    triton = tl = _MissingTriton


@lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors of `device` and the shared memory, in bytes, one program may use."""
    if device.type != "cuda":
        return 1, 227 * 1024  # Triton's interpreter: anything will do
    properties = torch.cuda.get_device_properties(device)
    # Every supported card has at least 99 KB; torch before 2.6 may not tell.
    return properties.multi_processor_count, getattr(properties, "shared_memory_per_block_optin", 99 * 1024)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()
