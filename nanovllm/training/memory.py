"""Memory that a rank gives back while somebody else needs it, and takes again.

A trainer on the same GPU needs, for its optimizer, the memory in which the rollouts have their KV
cache and their weights. What sleeps is really freed, for other processes too.

CUDA graphs hold addresses. So the first time that a rank on a GPU wakes up, cache and weights move
to memory whose addresses stay when it is freed, and the graphs are captured again, which takes
seconds. From then on they are kept, and sleeping and waking up are quick. An engine that never
sleeps has nothing of this.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.kernels.cpu_memory import give_freed_memory_back, move_to_huge_pages
from nanovllm.quantization.quantized import forget_dequantized
from nanovllm.training.virtual_memory import VirtualMemory, padded

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner


def on_rank(runner: ModelRunner, method: str, *args: Any) -> None:
    """Call a method of a rank's memory; it is sent to every rank."""
    if runner.model.memory is None:
        runner.model.memory = CudaMemory(runner) if runner.is_cuda else CpuMemory(runner)
    getattr(runner.model.memory, method)(runner, *args)


def meet(runner: ModelRunner) -> None:
    """Wait until all ranks have done what they were told."""
    if runner.group is not None:
        dist.barrier()


def drop_values(runner: ModelRunner) -> None:
    """Free the weights; only their shapes are kept."""
    for module in runner.model.modules():
        if hasattr(module, "dequantized"):
            forget_dequantized(module)
    for param in runner.model.parameters():
        param.data = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)


def attach(runner: ModelRunner, kv_cache: Tensor) -> None:
    """Give a runner, and each of its layers, a KV cache."""
    runner.kv_cache = kv_cache
    for index, layer in enumerate(runner.attention_layers):
        layer.k_cache = kv_cache[0, index]
        layer.v_cache = kv_cache[1, index]


def detach(runner: ModelRunner) -> None:
    """Let a runner know nothing of its KV cache any more."""
    runner.kv_cache = torch.empty(0)
    for layer in runner.attention_layers:
        layer.k_cache = torch.empty(0)
        layer.v_cache = torch.empty(0)


class CpuMemory:
    """On a CPU: the system takes what is freed, and nothing holds addresses."""

    def __init__(self, runner: ModelRunner) -> None:
        self.cache_shape = runner.kv_cache.shape

    def free_cache(self, runner: ModelRunner) -> None:
        """Free the KV cache."""
        detach(runner)
        runner.sampling.free_counts()
        give_freed_memory_back()

    def weights_to_host(self, runner: ModelRunner) -> None:
        """They are there."""

    def drop_weights(self, runner: ModelRunner, is_on_device: bool) -> None:
        """Free the weights."""
        drop_values(runner)

    def restore_weights(self, runner: ModelRunner, from_host: bool) -> None:
        """Have memory for the weights again."""
        if from_host:
            return
        for param in runner.model.parameters():
            param.data = torch.empty(param.shape, dtype=param.dtype)
        move_to_huge_pages(runner.model)

    def restore_cache(self, runner: ModelRunner) -> None:
        """Have a KV cache again."""
        attach(runner, torch.empty(self.cache_shape, dtype=runner.config.kv_cache_dtype))

    def prepare_steps(self, runner: ModelRunner) -> None:
        """All that steps work with is there."""


class CudaMemory:
    """On a GPU."""

    def __init__(self, runner: ModelRunner) -> None:
        self.cache_shape = runner.kv_cache.shape
        # None until the first time that they wake up.
        self.cache: VirtualMemory | None = None
        self.weights: VirtualMemory | None = None
        # A copy of the weights, each at a multiple of an alignment. It is kept for the next time:
        # to pin memory takes much longer than to copy.
        self.host: Tensor | None = None

    def free_cache(self, runner: ModelRunner) -> None:
        """Free the KV cache, and the graphs if it will move."""
        runner.sampling.free_counts()
        if self.cache is None:
            runner.clear_graphs()
            detach(runner)
            give_back(runner)
        else:
            self.cache.unmap()

    def weights_to_host(self, runner: ModelRunner) -> None:
        """Copy the weights to the host, and free them on the device."""
        if self.host is None:
            self.host = pinned_memory(weights_bytes(runner))
        for param, copy in zip(runner.model.parameters(), self._copies(runner), strict=True):
            copy.copy_(param.data, non_blocking=True)
        self._free_weights(runner)

    def drop_weights(self, runner: ModelRunner, is_on_device: bool) -> None:
        """Free the weights, on the host, too."""
        if is_on_device:
            self._free_weights(runner)
        self.host = None

    def _free_weights(self, runner: ModelRunner) -> None:
        torch.cuda.synchronize(runner.device)  # they may be being copied
        if self.weights is None:
            drop_values(runner)
            give_back(runner)
        else:
            self.weights.unmap()

    def restore_weights(self, runner: ModelRunner, from_host: bool) -> None:
        """Have memory for the weights again, and in it what was copied to the host."""
        if self.weights is not None:
            self.weights.map()
        else:
            weights = VirtualMemory(weights_bytes(runner), runner.device)
            weights.map()
            for param in runner.model.parameters():
                param.data = weights.tensor(param.shape, param.dtype)
            self.weights = weights
        if from_host:
            for param, copy in zip(runner.model.parameters(), self._copies(runner), strict=True):
                param.data.copy_(copy, non_blocking=True)
            torch.cuda.synchronize(runner.device)

    def restore_cache(self, runner: ModelRunner) -> None:
        """Have a KV cache again, of zeros, as at start-up."""
        dtype = runner.config.kv_cache_dtype
        if self.cache is None:
            cache = VirtualMemory(math.prod(self.cache_shape) * dtype.itemsize, runner.device)
            cache.map()
            attach(runner, cache.tensor(self.cache_shape, dtype))
            self.cache = cache
        else:
            self.cache.map()
        runner.kv_cache.zero_()

    def prepare_steps(self, runner: ModelRunner) -> None:
        """Capture the graphs again. If that fails, the cache is free again."""
        if runner.config.enforce_eager:
            return
        try:
            # A graph is captured on buffers that hold nothing but padding: see `capture_graphs`.
            runner.allocate_tables()
            runner.capture_graphs()
        except BaseException:
            runner.clear_graphs()
            gc.collect()
            assert self.cache is not None
            self.cache.unmap()
            raise

    def _copies(self, runner: ModelRunner) -> Iterator[Tensor]:
        """The host's copy of each parameter."""
        assert self.host is not None
        start = 0
        for param in runner.model.parameters():
            yield self.host[start : start + param.nbytes].view(param.dtype).view(param.shape)
            start += padded(param.nbytes)


def weights_bytes(runner: ModelRunner) -> int:
    """How much memory all parameters take one after the other."""
    return sum(padded(param.nbytes) for param in runner.model.parameters())


def pinned_memory(num_bytes: int) -> Tensor:
    """Memory of the host that a GPU can read and write: `[num_bytes]` uint8.

    PyTorch's own pinned memory would be rounded up to a power of two.
    """
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    address = memory.data_ptr()
    torch.cuda.check_error(cudart.cudaHostRegister(address, num_bytes, 0))
    finalize(memory, cudart.cudaHostUnregister, address).atexit = False
    return memory


def give_back(runner: ModelRunner) -> None:
    """Give memory that nothing refers to back to the driver."""
    gc.collect()  # graphs and tensors may be part of a cycle
    torch.cuda.synchronize(runner.device)
    torch.cuda.empty_cache()
