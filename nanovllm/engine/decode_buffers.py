"""The inputs of a decode step, on the host and on the device."""

from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostCopy:
    """The host's side of the buffers. On a GPU there are two, see `DecodeBuffers`."""

    memory: Tensor  # bytes, pinned
    arrays: dict[str, np.ndarray]  # views of it
    copied: torch.cuda.Event | None  # its last upload is done; None on a CPU


class DecodeBuffers:
    """All arrays that a decode step reads, side by side in one memory: one copy uploads them all.

    They stay at the same addresses in every step, so that a CUDA graph can be replayed on them.
    There are two copies in (pinned) host memory, used in turn: while one is still being uploaded,
    the next step is written to the other. On a CPU the device's arrays are the host's.
    """

    def __init__(self, max_num_seqs: int, blocks_per_seq: int, device: torch.device) -> None:
        # All arrays with nothing but padding, a row for each sequence. A padding row stores nothing
        # (slot -1), attends to nothing (context 0) and samples into a row of no sequence. The wide
        # numbers come first, so that every array is aligned.
        rows = max_num_seqs
        self.padding: dict[str, np.ndarray] = {
            "table_rows": np.full(rows, max_num_seqs, np.int64),  # in the model runner's tables
            "positions": np.zeros(rows, np.int64),  # of the newest token
            "seeds": np.zeros(rows, np.int64),
            "context_lens": np.zeros(rows, np.int32),
            "slots": np.full(rows, -1, np.int32),  # where the newest token's K and V go
            "temperatures": np.zeros(rows, np.float32),
            "block_tables": np.zeros((rows, blocks_per_seq), np.int32),
        }
        num_bytes = sum(array.nbytes for array in self.padding.values())
        host_memory = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
        self._device_memory = host_memory.to(device)  # on a CPU, the same memory
        self.on_device = self._views(self._device_memory)  # by name
        hosts = [self._host_copy(host_memory, None)]
        if device.type == "cuda":
            memories = [host_memory.pin_memory(), host_memory.pin_memory()]
            hosts = [self._host_copy(memory, torch.cuda.Event()) for memory in memories]
        self._hosts = cycle(hosts)

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        start = 0
        for name, array in self.padding.items():
            end = start + array.nbytes
            dtype = torch.from_numpy(array).dtype
            views[name] = memory[start:end].view(dtype).view(array.shape)
            start = end
        return views

    def _host_copy(self, memory: Tensor, copied: torch.cuda.Event | None) -> HostCopy:
        arrays = {name: view.numpy() for name, view in self._views(memory).items()}
        return HostCopy(memory, arrays, copied)

    def upload(self, inputs: dict[str, np.ndarray], num_rows: int) -> None:
        """Send inputs, padded to `num_rows` rows, to the device, behind the steps queued there."""
        host = next(self._hosts)
        if host.copied is not None:
            host.copied.synchronize()  # the upload of two steps ago, which has long been done
        for name, values in inputs.items():
            num_values = len(values)
            host.arrays[name][:num_values] = values
            if num_values < num_rows:
                host.arrays[name][num_values:num_rows] = self.padding[name][num_values:num_rows]
        if host.copied is not None:
            self._device_memory.copy_(host.memory, non_blocking=True)
            host.copied.record()
