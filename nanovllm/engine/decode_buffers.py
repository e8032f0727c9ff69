"""The inputs of a decode step, on the host and on the device."""

import math

import numpy as np
import torch


class DecodeBuffers:
    """Arrays of one row for each sequence of the batch, side by side in one piece of memory.

    So one copy takes them all to the device. There are two pieces of (pinned) host memory, used in turn: while one
    is still being copied, the next step is written to the other. On a CPU the device's arrays are the host's.
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
        is_cuda = device.type == "cuda"

        def views(memory: torch.Tensor) -> dict[str, torch.Tensor]:
            parts = zip(memory.split(sizes), arrays.items(), strict=True)
            return {name: part.view(dtype).view(shape) for part, (name, (dtype, shape)) in parts}

        memory = torch.zeros(sum(sizes), dtype=torch.uint8, device="cpu")
        self._host = [memory.pin_memory(), memory.pin_memory()] if is_cuda else [memory]
        self._host_arrays = [{name: x.numpy() for name, x in views(memory).items()} for memory in self._host]
        self._copied = [torch.cuda.Event() for _ in self._host] if is_cuda else []
        self._turn = 0
        self._device = memory.to(device)  # on a CPU, the same memory
        self.device = views(self._device)  # by name

    def next_host(self) -> dict[str, np.ndarray]:
        """The host arrays to fill for the next step."""
        self._turn = (self._turn + 1) % len(self._host)
        if self._copied:
            self._copied[self._turn].synchronize()  # the copy of two steps ago; it has long been done
        return self._host_arrays[self._turn]

    def upload(self) -> None:
        """Send what `next_host` returned to the device, behind the steps that are queued there."""
        if self._copied:
            self._device.copy_(self._host[self._turn], non_blocking=True)
            self._copied[self._turn].record()
