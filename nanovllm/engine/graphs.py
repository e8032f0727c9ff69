"""CUDA graphs of the decode step: capture, choice and replay.

A decode step is some 300 small kernels, which a host cannot launch as fast as the GPU runs them. A
CUDA graph records them once and launches them as one. It fixes everything but the contents of
memory: addresses, shapes, launch grids. So a step reads its inputs from fixed buffers
(`DecodeBuffers`), and is padded up to the next of many batch sizes, each of which has a graph.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

MAX_GRAPH_BATCH = 512
# Sizes whose kernels are compiled before the capture, which should not compile any. The tiles of
# `split_gemm` and decode attention depend on the size, and these cover their choices but for some
# numbers of KV heads, or on smaller cards.
SIZES_TO_COMPILE = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What a decode step leaves on the device."""

    token_ids: Tensor  # [size] int64, sampled plainly: by temperature, with no other option
    logits: Tensor  # [size, vocab / tp], to sample from again where a request has options


@dataclass(frozen=True, slots=True)
class DecodeGraph:
    """A recorded decode step and where it leaves its results, at the same place every time."""

    graph: torch.cuda.CUDAGraph
    output: DecodeOutput


class DecodeGraphs:
    """The graphs of one model runner, by batch size. Without any, every step runs eagerly."""

    def __init__(self) -> None:
        self.graphs: dict[int, DecodeGraph] = {}
        self.sizes: list[int] = []  # of the graphs, in ascending order

    def padded_size(self, num_seqs: int) -> int:
        """Return the size of the graph for so many sequences; without one, num_seqs."""
        index = bisect_left(self.sizes, num_seqs)
        return self.sizes[index] if index < len(self.sizes) else num_seqs

    def replay(self, size: int) -> DecodeOutput | None:
        """Run the graph of this size; None if there is none. The output is valid until the next
        replay, of any size: the graphs share their memory.
        """
        graph = self.graphs.get(size)
        if graph is None:
            return None
        graph.graph.replay()
        return graph.output

    def capture(self, run_decode: Callable[[int], DecodeOutput], max_num_seqs: int) -> None:
        """Record `run_decode(size)`, on the first `size` rows of the buffers, for every size."""
        largest = min(max_num_seqs, MAX_GRAPH_BATCH)
        sizes = {size for size in (1, 2, 4, *range(8, largest, 8), largest) if size <= largest}
        for size in sorted(sizes & {*SIZES_TO_COMPILE, largest}):
            run_decode(size)
        torch.cuda.synchronize()

        # All graphs share one memory pool, and the largest, captured first, makes it large enough.
        pool = None
        for size in sorted(sizes, reverse=True):
            graph = torch.cuda.CUDAGraph()
            # thread_local: NCCL's watchdog thread makes CUDA calls of its own meanwhile.
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                output = run_decode(size)
            if pool is None:
                pool = graph.pool()
            # Of the logits only the address is kept. Whoever holds a tensor of the pool keeps the
            # next graph from using its memory, and the logits of all sizes would add up to much.
            output = DecodeOutput(output.token_ids, unowned_view(output.logits))
            self.graphs[size] = DecodeGraph(graph, output)
        torch.cuda.synchronize()
        self.sizes = sorted(sizes)

    def clear(self) -> None:
        """Destroy all graphs."""
        self.graphs.clear()
        self.sizes.clear()


def unowned_view(tensor: Tensor) -> Tensor:
    """Return a tensor of the same memory, contiguous and on a CUDA device, that does not own it.

    PyTorch may give that memory to another tensor. Inside a pool of CUDA graphs that is harmless:
    only replays write there, so what a replay has left stays until the next replay.
    """
    data = (tensor.data_ptr(), False)  # False: not read-only
    memory = {"shape": (tensor.nbytes,), "typestr": "|u1", "data": data, "version": 2}
    interface = SimpleNamespace(__cuda_array_interface__=memory)
    return torch.as_tensor(interface, device=tensor.device).view(tensor.dtype).view(tensor.shape)
