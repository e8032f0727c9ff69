"""What the kernel files share: Triton, overlapping launches, the GPU's limits, padded outputs.

**Overlapping launches.** Normally a kernel starts when the one before it has ended. From Hopper on,
programmatic dependent launch (PDL; CUDA C++ Programming Guide) lets it start earlier, beside the
end of the one before it. Such a kernel calls `launch_next` where the kernel after it may start, and
`wait_for_previous` where it needs the results of the kernels before it. Until then it loads what no
kernel of this step writes, such as its weights.
"""

from functools import lru_cache

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
except ImportError:  # macOS, Windows: no kernel can be launched, but the PyTorch references run
    from unittest.mock import Mock

    triton = tl = libdevice = Mock()

try:
    from triton.language.extra.cuda import gdc_launch_dependents
except ImportError:  # an older Triton, or none
    gdc_launch_dependents = None

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # an older Triton, or none
    TensorDescriptor = None

HAS_TRITON = hasattr(triton, "__version__")
MAX_GEMM_TILE_ROWS = 128


def major_and_minor(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, as in "2.11.0+cu130"."""
    return tuple(int(part) for part in version.split(".")[:2])


def triton_version() -> tuple[int, ...]:
    """Major and minor version of Triton; `(0, 0)` where there is none."""
    return major_and_minor(triton.__version__) if HAS_TRITON else (0, 0)


# --- overlapping launches ---


@lru_cache
def pdl_options() -> dict[str, bool]:
    """Return the options that launch a kernel with PDL, or without where the GPU or Triton has
    none.

    `PDL` is the kernel's own argument, `launch_pdl` is Triton's.
    """
    if gdc_launch_dependents is None or not torch.cuda.is_available():
        return {"PDL": False}
    if torch.cuda.get_device_capability() < (9, 0):  # before Hopper
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


@triton.jit
def launch_next(PDL: tl.constexpr):
    """Let the next kernel start on any multiprocessor that has room for it beside this kernel."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Block until everything that earlier kernels wrote can be read.

    Before this call a kernel may read only what was written by the last copy or plain kernel (one
    launched without PDL), or earlier still: weights, and the tables uploaded at the start of a
    step. Not even the output of the kernel *two* places ahead is safe: the kernel between them may
    start this one before it has waited itself.
    """
    if PDL:
        # Triton's own `gdc_wait` does the same, but Triton 3.9 does not pipeline a loop that
        # contains it. The assembly must have an output ("=r"); the comment "// $0" mentions it, as
        # no instruction does. "~{memory}" forbids the compiler to move a load or store across the
        # wait.
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )


# --- arithmetic ---


@triton.jit
def soft_capped(scores, limit):
    """Return `limit * tanh(scores / limit)`: like the scores where they are small, and in (-limit,
    limit).

    tanh(x) is 1 - 2 / (1 + e^(2x)), to about 1e-7. Where the power overflows it is 1.
    """
    power = tl.exp2(scores * (2.8853900817779268 / limit))  # 2 / ln 2
    return limit - 2.0 * limit / (1.0 + power)


# --- the limits of the GPU ---


@lru_cache
def has_tma() -> bool:
    """Whether the hardware copies tiles to shared memory by itself (TMA): from Hopper on.

    Triton's interpreter, which runs the kernels where there is no GPU, imitates it.
    """
    if TensorDescriptor is None:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


@lru_cache
def is_hopper() -> bool:
    """Whether the GPU is an H100, an H200 or a relative of them."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@lru_cache
def has_e4m3() -> bool:
    """Whether the GPU converts FP8 (e4m3) numbers: from Ada on, and Triton's interpreter does."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


@lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors, and the bytes of shared memory a program may use."""
    if device.type != "cuda":
        return 1, 227 * 1024  # Triton's interpreter: any numbers will do
    properties = torch.cuda.get_device_properties(device)
    # torch before 2.6 does not tell the shared memory; every GPU that Triton supports has 99 KB.
    shared_memory = getattr(properties, "shared_memory_per_block_optin", 99 * 1024)
    return properties.multi_processor_count, shared_memory


# --- sizes and outputs ---


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`, for n >= 1.

    The sides of a tile in Triton are powers of two.
    """
    return 1 << (n - 1).bit_length()


def gemm_tile_rows(num_rows: int) -> int:
    """Return the rows in a tile of `split_gemm`, a power of two, for an input of `num_rows`."""
    return min(MAX_GEMM_TILE_ROWS, max(16, next_power_of_2(num_rows)))


def padded_empty(num_rows: int, row_size: int, like: Tensor) -> Tensor:
    """Return an uninitialised `[num_rows, row_size]` with memory for padding rows behind it.

    The dtype and device are those of `like`.

    `split_gemm` reads its input by TMA, which copies whole tiles. A tile that reaches past the end
    of the allocated memory takes up to twice as long. Therefore every kernel whose output
    `split_gemm` may read allocates memory for a whole tile and returns its first rows. The contents
    of the padding rows do not matter.
    """
    allocated_rows = max(num_rows, gemm_tile_rows(num_rows))
    memory = torch.empty(allocated_rows, row_size, dtype=like.dtype, device=like.device)
    return memory[:num_rows]


def readable_rows(x: Tensor, tile_rows: int) -> int:
    """Return how many rows TMA may read of x `[n, size]`, contiguous: with as much memory as
    `padded_empty` allocates, at least a tile of `tile_rows`.
    """
    num_rows, size = x.shape
    elements_from_x = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    if elements_from_x >= tile_rows * size:
        return max(num_rows, tile_rows)
    return num_rows
