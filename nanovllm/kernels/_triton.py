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


try:
    from triton.language.extra import libdevice
except ImportError:
    libdevice = None

try:  # griddepcontrol.wait and griddepcontrol.launch_dependents, in newer Tritons
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None


@lru_cache
def pdl_options() -> dict[str, bool]:
    """Launch options for programmatic dependent launch, from Hopper on.

    A kernel launched so may start while the one before it in the stream is still finishing. It must wait (`gdc_wait`,
    where its `PDL` is set) before it touches what an earlier kernel writes; what it does before, such as reading its
    weights, costs no time. Between kernels of a few microseconds that is a good part of the whole.
    """
    if gdc_wait is None or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


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
