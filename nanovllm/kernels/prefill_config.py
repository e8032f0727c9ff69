"""How large the tiles of prefill attention are, by what is measured to be fastest."""

from typing import NamedTuple

import torch

from nanovllm.kernels._triton import device_limits, has_tma, next_power_of_2


class PrefillConfig(NamedTuple):
    """The tiles of `varlen_prefill`; the result does not depend on them."""

    block_m: int  # queries in a tile
    block_n: int  # keys in a tile
    num_warps: int
    num_stages: int  # tiles of keys and values in shared memory


# The fastest measured configurations, each of which needs more shared memory than the next.
FOR_16_BITS_WITH_TMA = PrefillConfig(128, 64, 4, 3)
FOR_16_BITS = PrefillConfig(128, 128, 8, 3)
SMALLER_FOR_16_BITS = (PrefillConfig(128, 64, 8, 2), PrefillConfig(64, 32, 4, 2))
# fp32 runs without tensor cores, which would cost precision; larger tiles would spill registers.
FOR_32_BITS = PrefillConfig(32, 64, 8, 2)
SMALLEST = PrefillConfig(16, 32, 4, 2)


def prefill_config(
    head_dim: int, dtype: torch.dtype, device: torch.device, block_size: int = 1
) -> PrefillConfig:
    """Return the fastest measured configuration whose tiles fit in the shared memory.

    block_size: of the cache that the keys are read from; 1 without one.
    """
    if dtype.itemsize != 2:
        configs: tuple[PrefillConfig, ...] = (FOR_32_BITS,)
    elif has_tma() and block_size % 64 == 0:
        configs = (FOR_16_BITS_WITH_TMA, *SMALLER_FOR_16_BITS)
    else:
        configs = (FOR_16_BITS, *SMALLER_FOR_16_BITS)
    _, shared_memory = device_limits(device)
    row_bytes = next_power_of_2(head_dim) * dtype.itemsize
    for config in configs:
        rows = config.block_m + 2 * config.block_n * config.num_stages  # of Q, and of K and V
        if rows * row_bytes <= shared_memory:
            return config
    return SMALLEST
