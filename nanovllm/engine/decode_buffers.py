"""The inputs of a decode step, on the host and on the device."""

import math
from itertools import cycle

import numpy as np
import torch


class DecodeBuffers:
    """Arrays of one row for each sequence of the batch, side by side in one piece of memory: one copy takes them all.

    There are two pieces of (pinned) host memory, used in turn: while one is still being copied, the next step is
    written to the other. On a CPU the device's arrays are the host's.
    """

    def __init__(self, max_num_seqs: int, blocks_per_seq: int, device: torch.device) -> None:
        one_each = (max_num_seqs,)
        arrays = {  # the wide ones first, so that every one is aligned
            "rows": (torch.int64, one_each),  # where the sequence's newest token is kept
            "positions": (torch.int64, one_each),  # of that token
            "seeds": (torch.int64, one_each),
            "context_lens": (torch.int32, one_each),
            "slots": (torch.int32, one_each),  # where its K and V go
            "temperatures": (torch.float32, one_each),
            "block_tables": (torch.int32, (max_num_seqs, blocks_per_seq)),
        }
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in arrays.values()]

        def views(memory: torch.Tensor) -> dict[str, torch.Tensor]:
            parts = zip(memory.split(sizes), arrays.items(), strict=True)
            return {name: part.view(dtype).view(shape) for part, (name, (dtype, shape)) in parts}

        memory, is_cuda = (
            torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu"),
            device.type == "cuda",
        )
        self._device = memory.to(device)  # on a CPU, the same memory
        self.device = views(self._device)  # by name
        hosts = [memory.pin_memory(), memory.pin_memory()] if is_cuda else [memory]
        host_arrays = [{name: view.numpy() for name, view in views(host).items()} for host in hosts]
        self._turns = cycle(
            [(*turn, torch.cuda.Event() if is_cuda else None) for turn in zip(hosts, host_arrays)]
        )
        # Padding stores nothing, attends to nothing (context length 0) and writes to a spare row.
        self._padding = {**dict.fromkeys(arrays, 0), "slots": -1, "rows": max_num_seqs}

    def upload(self, inputs: dict[str, np.ndarray], size: int) -> None:
        """Send inputs, padded to `size` rows, to the device, behind the steps that are queued there."""
        host, arrays, copied = next(self._turns)
        if copied is not None:
            copied.synchronize()  # the copy of two steps ago; it has long been done
        for name, values in inputs.items():
            arrays[name][: len(values)] = values
            if len(values) < size:
                arrays[name][len(values) : size] = self._padding[name]
        if copied is not None:
            self._device.copy_(host, non_blocking=True)
            copied.record()
