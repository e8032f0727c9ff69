"""The paged KV cache: how much memory there is for it, and the tensor.

On a GPU it takes what `gpu_memory_utilization` leaves beside the weights and the activations of the
largest step, which a warm-up prefill shows. On a CPU the size is a stated default.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.config import Config
from nanovllm.layers.attention import Attention

CPU_KVCACHE_BYTES = 2 << 30  # without a GPU; the system commits pages as they are first used


def allocate_kv_cache(config: Config, layers: list[Attention], device: torch.device) -> Tensor:
    """Allocate the cache, and give each layer its part.

    Returns `[2, layers, num_blocks, block_size, kv_heads / tp, head_dim]`, keys then values, and
    sets `config.num_kvcache_blocks` if it was to be worked out. Raises a ValueError if the cache
    would not hold one sequence of max_model_len.
    """
    block_shape = (config.kvcache_block_size, layers[0].num_kv_heads, layers[0].head_dim)
    if config.num_kvcache_blocks == -1:
        block_bytes = 2 * len(layers) * math.prod(block_shape) * config.kv_cache_dtype.itemsize
        config.num_kvcache_blocks = num_blocks_that_fit(config, block_bytes, device)
    config.check_kvcache(config.num_kvcache_blocks)

    shape = (2, len(layers), config.num_kvcache_blocks, *block_shape)
    # On a GPU zeros keep the cache finite for flash-attn-4; on a CPU they would commit every page.
    allocate = torch.zeros if device.type == "cuda" else torch.empty
    kv_cache = allocate(shape, dtype=config.kv_cache_dtype, device=device)
    for index, layer in enumerate(layers):
        layer.k_cache = kv_cache[0, index]
        layer.v_cache = kv_cache[1, index]
    return kv_cache


def num_blocks_that_fit(config: Config, block_bytes: int, device: torch.device) -> int:
    """Work out how many blocks of the cache the memory has room for."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // block_bytes
    blocks_per_seq = -(-config.max_model_len // config.kvcache_block_size)
    most_in_use = config.max_num_seqs * blocks_per_seq
    if device.type == "cpu":
        return max(blocks_per_seq, min(CPU_KVCACHE_BYTES // block_bytes, most_in_use))

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    used = total - free  # by this process and by others
    activations = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    # The memory pool of CUDA graphs takes at most what the largest prefill does, as no graph has
    # more tokens or sequences, but for the `PartResults` of attention: some 17 MB for 0.6B.
    reserved = activations if config.enforce_eager else 2 * activations
    num_blocks = int(total * config.gpu_memory_utilization - used - reserved) // block_bytes
    # As much again as can be in use, for cached prefixes; more would only cost time to keep.
    num_blocks = min(num_blocks, 2 * most_in_use)
    if config.tensor_parallel_size == 1:
        return num_blocks
    # The scheduler counts the same blocks for all ranks.
    fewest = torch.tensor(num_blocks, device=device)
    dist.all_reduce(fewest, op=dist.ReduceOp.MIN)
    return int(fewest)
