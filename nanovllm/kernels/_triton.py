"""What the kernel files share: Triton itself, programmatic dependent launch, and the limits of the GPU."""

from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # macOS, Windows: the kernels cannot be launched, the PyTorch references run
    from unittest.mock import Mock

    triton = tl = libdevice = Mock()

try:
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # an older Triton, or none
    gdc_launch_dependents = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # likewise
    TensorDescriptor = None

HAS_TRITON = hasattr(triton, "__version__")


@lru_cache
def pdl_options() -> dict[str, bool]:
    """Options for programmatic dependent launch, from Hopper on: a kernel may start while the one before it finishes.

    It must wait before it touches what an earlier kernel writes; until then, reading its weights, say, costs no time.
    """
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return (
        {"PDL": True, "launch_pdl": True}
        if gdc_launch_dependents is not None and is_hopper
        else {"PDL": False}
    )


@lru_cache
def has_tma() -> bool:
    """Whether the hardware copies tiles to shared memory by itself (TMA): from Hopper on, and in the interpreter."""
    is_older = torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0)
    return TensorDescriptor is not None and not is_older


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Let the next kernel start, as far as there is room beside this one."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Wait until all that earlier kernels write can be read. Before, only what a copy or a plain kernel wrote may be,
    or came before one: the kernel ahead may have let this one in while it still waits itself."""
    if PDL:  # not gdc_wait: a loop with that in it Triton 3.9 does not pipeline
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


@lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """How many multiprocessors `device` has, and how many bytes of shared memory a program may use."""
    if device.type != "cuda":
        return 1, 227 * 1024  # Triton's interpreter: anything will do
    properties = torch.cuda.get_device_properties(
        device
    )  # torch before 2.6 may not tell; all cards have 99 KB
    return properties.multi_processor_count, getattr(
        properties, "shared_memory_per_block_optin", 99 * 1024
    )


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


MAX_GEMM_TILE_ROWS = 128


def gemm_tile_rows(num_rows: int) -> int:
    """How many rows of its input, a power of two, a tile of `split_gemm` takes when the input has `num_rows`."""
    return min(MAX_GEMM_TILE_ROWS, max(16, next_power_of_2(num_rows)))


def padded_empty(num_rows: int, row_size: int, like: Tensor) -> Tensor:
    """Return `[num_rows, row_size]`, uninitialised, with memory behind it for a whole tile of `split_gemm`.

    The hardware (TMA) copies whole tiles. Where rows of a tile are outside the tensor that it was told of, the copy
    takes up to twice as long. So all kernels whose output `split_gemm` may read allocate the whole tile, and return
    its first rows. What the other rows hold does not matter.
    """
    allocated_rows = max(num_rows, gemm_tile_rows(num_rows))
    memory = torch.empty(allocated_rows, row_size, dtype=like.dtype, device=like.device)
    return memory[:num_rows]
