"""The inputs of a decode step, on the host and on the device."""

import math
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One array of the buffers: a row for each sequence of the step."""

    dtype: torch.dtype
    padding: int  # what rows behind the last sequence hold
    columns: int = 0  # 0: one number for each sequence

    def shape(self, num_rows: int) -> tuple[int, ...]:
        """The shape for so many sequences."""
        return (num_rows, self.columns) if self.columns else (num_rows,)


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
        """Allocate the arrays for steps of up to max_num_seqs sequences."""
        # The wide numbers first, so that every array is aligned. A padding row stores nothing (slot
        # -1), attends to nothing (context 0) and samples into a row of no sequence.
        self.specs = {
            "table_rows": ArraySpec(torch.int64, padding=max_num_seqs),  # in the runner's tables
            "positions": ArraySpec(torch.int64, padding=0),  # of the newest token
            "seeds": ArraySpec(torch.int64, padding=0),
            "context_lens": ArraySpec(torch.int32, padding=0),
            "slots": ArraySpec(torch.int32, padding=-1),  # where the newest token's K and V go
            "temperatures": ArraySpec(torch.float32, padding=0),
            "block_tables": ArraySpec(torch.int32, padding=0, columns=blocks_per_seq),
        }
        self.max_num_seqs = max_num_seqs
        num_bytes = sum(self._num_bytes(spec) for spec in self.specs.values())
        host_memory = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
        self._device_memory = host_memory.to(device)  # on a CPU, the same memory
        self.on_device = self._views(self._device_memory)  # by name
        is_cuda = device.type == "cuda"
        if is_cuda:
            hosts = [self._host_copy(host_memory.pin_memory(), is_cuda) for _ in range(2)]
        else:
            hosts = [self._host_copy(host_memory, is_cuda)]
        self._hosts = cycle(hosts)

    def _num_bytes(self, spec: ArraySpec) -> int:
        return math.prod(spec.shape(self.max_num_seqs)) * spec.dtype.itemsize

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        start = 0
        for name, spec in self.specs.items():
            end = start + self._num_bytes(spec)
            views[name] = memory[start:end].view(spec.dtype).view(spec.shape(self.max_num_seqs))
            start = end
        return views

    def _host_copy(self, memory: Tensor, is_cuda: bool) -> HostCopy:
        arrays = {name: view.numpy() for name, view in self._views(memory).items()}
        return HostCopy(memory, arrays, torch.cuda.Event() if is_cuda else None)

    def upload(self, inputs: dict[str, np.ndarray], num_rows: int) -> None:
        """Send inputs, padded to `num_rows` rows, to the device, behind the steps queued there."""
        host = next(self._hosts)
        if host.copied is not None:
            host.copied.synchronize()  # the upload of two steps ago, which has long been done
        for name, values in inputs.items():
            array = host.arrays[name]
            num_values = len(values)
            array[:num_values] = values
            if num_values < num_rows:
                array[num_values:num_rows] = self.specs[name].padding
        if host.copied is not None:
            self._device_memory.copy_(host.memory, non_blocking=True)
            host.copied.record()
