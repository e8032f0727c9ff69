"""CUDA graphs of decode steps and of small prefills: capture, choice and replay.

A step is some 300 kernels, most of them so small that a host cannot launch them as fast as the GPU
runs them. A CUDA graph records them once and launches them as one. It fixes everything but the
contents of memory: addresses, shapes, launch grids. So a step reads its inputs from fixed buffers
(`StepBuffers`), and is padded up to the next of many sizes, each of which has a graph. The size of
a decode step is its number of sequences, that of a prefill its number of tokens.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

MAX_DECODE_SIZE = 512
# Sizes of decode steps whose kernels are compiled before the capture, which should not compile any.
# The tiles of `split_gemm` and decode attention depend on the size, and these cover their choices
# but for some numbers of KV heads, or on smaller cards.
SIZES_TO_COMPILE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# From 256 tokens on, padding is a third of a step at most. The host launches larger prefills faster
# than the device runs them.
PREFILL_SIZES = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048, 3072, 4096)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step leaves on the device, for each of its n sequences, padding included."""

    token_ids: Tensor  # [n] int64, sampled plainly: by temperature, with no other option
    logits: Tensor  # [n, vocab / tp], to sample from again where a request has options
    hidden: Tensor  # [n, hidden] of the last tokens, before the last norm, for embeddings


@dataclass(frozen=True, slots=True)
class StepGraph:
    """A recorded step and where it leaves its results, at the same place every time."""

    graph: torch.cuda.CUDAGraph
    output: StepOutput


class StepGraphs:
    """The graphs of one kind of step, by size. Without any, every step runs eagerly."""

    def __init__(self) -> None:
        self.graphs: dict[int, StepGraph] = {}
        self.sizes: list[int] = []  # of the graphs, in ascending order

    def padded_size(self, size: int) -> int:
        """Return the size of the graph for a step of this size; without one, the step's own."""
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if index < len(self.sizes) else size

    def __contains__(self, size: int) -> bool:
        return size in self.graphs

    def replay(self, size: int) -> StepOutput:
        """Run the graph of this size. The output is valid until the next replay, of any kind and
        size: the graphs share their memory.
        """
        graph = self.graphs[size]
        graph.graph.replay()
        return graph.output

    def capture(
        self,
        run_step: Callable[[int], StepOutput],
        sizes: list[int],
        sizes_to_compile: list[int],
        pool: Any = None,
    ) -> Any:
        """Record `run_step(size)` for every size, and return the memory pool of the graphs.

        sizes_to_compile: those of the sizes at which the step is run first, eagerly, since a
            capture should compile no kernel.
        pool: the memory pool of other graphs, to be shared with them.
        """
        for size in sizes_to_compile:
            run_step(size)
        torch.cuda.synchronize()

        # All graphs share one memory pool, and the largest, captured first, makes it large enough.
        for size in sorted(sizes, reverse=True):
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog thread makes CUDA calls of its own meanwhile.
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                output = run_step(size)
            if pool is None:
                pool = graph.pool()
            # Of the logits only the address is kept. Whoever holds a tensor of the pool keeps the
            # next graph from using its memory, and the logits of all sizes would add up to much.
            views = (unowned_view(tensor) for tensor in (output.logits, output.hidden))
            self.graphs[size] = StepGraph(graph, StepOutput(output.token_ids, *views))
        torch.cuda.synchronize()
        self.sizes = sorted(sizes)
        return pool

    def clear(self) -> None:
        """Destroy all graphs."""
        self.graphs.clear()
        self.sizes.clear()


def clear_all(*kinds: StepGraphs) -> None:
    """Destroy the graphs of several kinds of step."""
    for graphs in kinds:
        graphs.clear()


def decode_sizes(max_num_seqs: int) -> list[int]:
    """The sizes of decode steps that have graphs, in ascending order."""
    largest = min(max_num_seqs, MAX_DECODE_SIZE)
    return sorted({size for size in (1, 2, 4, *range(8, largest, 8), largest) if size <= largest})


def unowned_view(tensor: Tensor) -> Tensor:
    """Return a tensor of the same memory, contiguous and on a CUDA device, that does not own it.

    PyTorch may give that memory to another tensor. Inside a pool of CUDA graphs that is harmless:
    only replays write there, so what a replay has left stays until the next replay.
    """
    data = (tensor.data_ptr(), False)  # False: not read-only
    memory = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": data, "version": 2}
    interface = SimpleNamespace(__cuda_array_interface__=memory)
    return torch.as_tensor(interface, device=tensor.device).view(tensor.dtype).view(tensor.shape)
