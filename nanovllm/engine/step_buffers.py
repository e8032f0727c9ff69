"""The inputs of steps that CUDA graphs run, on the host and on the device."""

from dataclasses import dataclass
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SEQUENCE, TOKEN, TILE = "sequence", "token", "tile"  # what an array can have a row for


class InputArray(NamedTuple):
    """One of the arrays, and what stands in rows that a step does not use."""

    row: str  # what each row is of
    dtype: type
    padding: int = 0
    columns: int | None = None  # None: a row is a number


@dataclass(frozen=True, slots=True)
class HostCopy:
    """The host's side of the buffers. On a GPU there are two, see `StepBuffers`."""

    memory: Tensor  # bytes, pinned
    arrays: dict[str, np.ndarray]  # views of it
    block_tables: np.ndarray  # a view of the rest of it
    copied: torch.cuda.Event | None  # its last upload is done; None on a CPU


class StepBuffers:
    """All arrays that a kind of step reads, side by side in one memory: one copy uploads them all.

    They stay at the same addresses in every step, so that a CUDA graph can be replayed on them.
    There are two copies in (pinned) host memory, used in turn: while one is still being uploaded,
    the next step is written to the other. On a CPU the device's arrays are the host's.

    The block tables come last, and column by column: first the first blocks of all sequences, then
    the second ones. So the copy ends with the last column in use, and does not take longer because
    longer sequences are allowed.
    """

    def __init__(
        self,
        arrays: dict[str, InputArray],
        max_rows: dict[str, int],
        blocks_per_seq: int,
        device: torch.device,
    ) -> None:
        """Make the arrays, filled with padding; those of wide numbers come first, to be aligned.

        max_rows: the most rows of each kind.
        """
        self.arrays = arrays
        self.max_rows = max_rows
        self.blocks_per_seq = blocks_per_seq
        num_bytes = sum(np.empty(self._shape(a), a.dtype).nbytes for a in arrays.values())
        self._tables_start = -(-num_bytes // 16) * 16
        num_bytes = self._tables_start + max_rows[SEQUENCE] * blocks_per_seq * np.int32().itemsize
        host_memory = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu")
        for name, view in self._views(host_memory).items():
            view.fill_(arrays[name].padding)
        self._device_memory = host_memory.to(device)  # on a CPU, the same memory
        self._on_device = self._views(self._device_memory)
        hosts = [self._host_copy(host_memory, None)]
        if device.type == "cuda":
            memories = [host_memory.pin_memory(), host_memory.pin_memory()]
            hosts = [self._host_copy(memory, torch.cuda.Event()) for memory in memories]
        self._hosts = cycle(hosts)

    def _shape(self, array: InputArray) -> tuple[int, ...]:
        num_rows = self.max_rows[array.row]
        return (num_rows,) if array.columns is None else (num_rows, array.columns)

    def _views(self, memory: Tensor) -> dict[str, Tensor]:
        views = {}
        start = 0
        for name, array in self.arrays.items():
            like = torch.from_numpy(np.empty(self._shape(array), array.dtype))
            end = start + like.nbytes
            views[name] = memory[start:end].view(like.dtype).view(like.shape)
            start = end
        return views

    def _block_tables(self, memory: Tensor) -> Tensor:
        return memory[self._tables_start :].view(torch.int32)

    def _host_copy(self, memory: Tensor, copied: torch.cuda.Event | None) -> HostCopy:
        arrays = {name: view.numpy() for name, view in self._views(memory).items()}
        return HostCopy(memory, arrays, self._block_tables(memory).numpy(), copied)

    def upload(
        self, inputs: dict[str, np.ndarray], block_tables: np.ndarray, num_rows: dict[str, int]
    ) -> None:
        """Send a step's inputs, padded, to the device, behind the steps queued there.

        inputs: of some or all arrays, as many rows as there are.
        block_tables: `[columns, n]` int32, as far as they are in use.
        num_rows: of each kind, with padding.
        """
        host = next(self._hosts)
        if host.copied is not None:
            host.copied.synchronize()  # the upload of two steps ago, which has long been done
        for name, values in inputs.items():
            num_values = len(values)
            padded = num_rows[self.arrays[name].row]
            host.arrays[name][:num_values] = values
            if num_values < padded:
                host.arrays[name][num_values:padded] = self.arrays[name].padding
        columns, num_seqs = block_tables.shape
        padded = num_rows[SEQUENCE]
        table = host.block_tables[: columns * padded].reshape(columns, padded)
        table[:, :num_seqs] = block_tables
        if num_seqs < padded:
            table[:, num_seqs:] = 0
        if host.copied is not None:
            end = self._tables_start + table.nbytes
            self._device_memory[:end].copy_(host.memory[:end], non_blocking=True)
            host.copied.record()

    def on_device(self, num_rows: dict[str, int]) -> dict[str, Tensor]:
        """The device's arrays, by name, of steps that are padded to so many rows of each kind.

        `block_tables` is `[sequences, blocks_per_seq]`, with unspecified numbers behind the columns
        in use.
        """
        views = {}
        for name, whole in self._on_device.items():
            views[name] = whole[: num_rows[self.arrays[name].row]]
        num_seqs = num_rows[SEQUENCE]
        entries = self._block_tables(self._device_memory)[: self.blocks_per_seq * num_seqs]
        views["block_tables"] = entries.view(self.blocks_per_seq, num_seqs).t()
        return views


def make_decode_buffers(
    max_num_seqs: int, blocks_per_seq: int, device: torch.device
) -> StepBuffers:
    """Make the buffers of decode steps. A padding row stores nothing (slot -1), attends to nothing
    (context 0) and samples into a row of no sequence.
    """
    arrays = {
        "table_rows": InputArray(SEQUENCE, np.int64, padding=max_num_seqs),
        "positions": InputArray(SEQUENCE, np.int64),  # of the newest token
        "seeds": InputArray(SEQUENCE, np.int64),
        "context_lens": InputArray(SEQUENCE, np.int32),
        "slots": InputArray(SEQUENCE, np.int32, padding=-1),  # where the newest K and V go
        "temperatures": InputArray(SEQUENCE, np.float32),
    }
    return StepBuffers(arrays, {SEQUENCE: max_num_seqs}, blocks_per_seq, device)
