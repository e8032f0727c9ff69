"""The sums over the GPUs of one host in a prefill, while the GPUs compute.

A prefill's tokens come in pieces: while one is summed, the next is computed. Each rank owns a part of a piece's rows:
the others copy theirs to it ("reduce-scatter"), it adds them to its part of the residual, takes the norm that
follows, and copies that to all ("all-gather"). That moves as many bytes as an all-reduce, but addition and norm are
done once, not on every rank. GEMMs occupy every multiprocessor from start to end, so nothing here waits on one: copy
engines move the data, and streams wait for the words that peers write behind it (stream memory operations of the CUDA
driver); only the sum is a kernel, of a stream that goes first when a GEMM ends.

No memory needs a second half: a rank sends a piece of the next sum only when that piece of this one is there, so that
all ranks have read theirs; and nobody overwrites what belongs to a piece before all ranks have sent theirs.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from nanovllm.kernels._triton import next_power_of_2
from nanovllm.kernels.all_reduce import share_memory
from nanovllm.kernels.host_words import HostWords
from nanovllm.kernels.rms_norm import launch_add_rms_norm

MIN_ROWS = 2048  # of a piece: launching one takes the host 0.1 ms
MIN_TOKENS = 2 * MIN_ROWS  # of a prefill: one piece would be summed beside nothing
SENT, SUMMED = 0, 1  # what a rank's words to its peers count, in pieces


def add_norm(
    part: Tensor,
    inbox: Tensor,
    residual: Tensor,
    out: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    rank: int,
) -> None:
    """`residual` += part + the other ranks' parts in `inbox`; out = its RMSNorm, or itself without a `norm_weight`.

    part, residual, out: `[n, hidden]`; inbox: `[ranks, n, hidden]`, `inbox[rank]` not read. Of one dtype, with
    contiguous rows.
    """
    num_rows, columns = part.shape
    if num_rows:
        block = next_power_of_2(columns)
        launch_add_rms_norm(
            residual,
            inbox,
            norm_weight,
            eps,
            out,
            num_warps=min(8, max(1, block // 512)),
            pdl={"PDL": False},
            own=part,
            own_index=rank,
        )


@lru_cache
def _driver() -> ctypes.CDLL:
    driver, pointer = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint64
    driver.cuMemcpyAsync.argtypes = pointer, pointer, ctypes.c_size_t, pointer
    for operation in (driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2):
        operation.argtypes = pointer, pointer, ctypes.c_uint32, ctypes.c_uint
    return driver


def _checked(error: int) -> None:
    if error:
        raise RuntimeError(
            f"a copy between GPUs, or a wait for one, failed with CUDA driver error {error}"
        )


def _copy(stream: torch.cuda.Stream, target: int, source: int, num_bytes: int) -> None:
    """Between two GPUs, by a copy engine. All places are addresses: slicing tensors would take the host longer."""
    if num_bytes:
        _checked(_driver().cuMemcpyAsync(target, source, num_bytes, stream.cuda_stream))


def _write(stream: torch.cuda.Stream, word: int, value: int) -> None:
    """Write `value` (modulo 2^32) when all GPUs can see what `stream` did before."""
    _checked(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, word, value % 2**32, 0))


def _wait(stream: torch.cuda.Stream, word: int, value: int) -> None:
    """Let `stream` wait until the word, a count that may wrap around, is at least `value`."""
    _checked(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, word, value % 2**32, 0))


def pieces(num_rows: int, ranks: int) -> list[slice]:
    """The pieces of a prefill of `num_rows` tokens, equal but for the last; none for a prefill too short for two.

    The more ranks, the longer a sum takes beside a GEMM, and the sooner it should start.
    """
    count, unit = (
        min(2 * ranks, num_rows // MIN_ROWS),
        128 * ranks,
    )  # unit: whole tiles of a GEMM, for each rank
    if num_rows < MIN_TOKENS:
        return []
    length = -(-num_rows // (count * unit)) * unit
    return [slice(first, min(first + length, num_rows)) for first in range(0, num_rows, length)]


class PrefillAllReduce:
    """The shared memory and streams of these sums. All ranks make one, and call it alike, in the same order."""

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        words: HostWords,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """shape: the most rows of a residual, and its columns."""
        self.rank, self.size, self.words = rank, size, words
        self.peers = [(rank + i) % size for i in range(1, size)]
        self.max_rows, columns = shape
        out = torch.empty(shape, dtype=dtype, device=device)
        # Of each rank, the rows that are this one's to sum.
        inbox = torch.empty(size, -(-self.max_rows // size), columns, dtype=dtype, device=device)
        self.outs, self.inboxes = (share_memory(memory, rank, size) for memory in (out, inbox))
        self.outs_at = [out.data_ptr() for out in self.outs]
        self.inboxes_at = [
            inbox[rank].data_ptr() for inbox in self.inboxes
        ]  # this rank's part of them
        self.scatter, self.gather = (
            torch.cuda.Stream(device),
            torch.cuda.Stream(device, priority=-1),
        )
        self.computed, self.summed = (
            [torch.cuda.Event() for _ in range(2 * size)] for _ in range(2)
        )
        self.count = 0  # of all pieces there were
        # The count, and this rank's part, of the pieces not waited for: until then, peers may not have read it.
        self.pending: dict[int, tuple[int, Tensor]] = {}

    def takes(self, num_rows: int) -> bool:
        return MIN_TOKENS <= num_rows <= self.max_rows

    def __call__(
        self,
        compute: Callable[[slice], Tensor],
        residual: Tensor,
        norm_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """The ranks' `compute(rows)` `[rows, hidden]`, summed and added to `residual`; of that the norm, if asked.

        The result's pieces must be waited for; it is valid until the next call. Of `residual` `[n, hidden]` only
        this rank's rows are kept up to date. `compute` may read the same piece of the result of the call before.
        """
        stream = torch.cuda.current_stream()
        for index, rows in enumerate(pieces(len(residual), self.size)):
            self.wait([index])
            part = compute(rows)
            self.computed[index].record(stream)
            self.count += 1
            self.pending[index] = self.count, part
            self._scatter(index, rows.start, part)
            self._gather(index, rows.start, part, residual[rows], norm_weight, eps)
        return self.outs[self.rank][: len(residual)]

    def _share(self, rank: int, num_rows: int) -> tuple[int, int]:
        """The first of the rows of a piece that belong to `rank`, and how many do."""
        length = -(-num_rows // self.size)
        first = min(rank * length, num_rows)
        return first, min(length, num_rows - first)

    def _word(self, reader: int, kind: int, writer: int) -> int:
        return self.words.address + 4 * (1 + (reader * 2 + kind) * self.size + writer)

    def _scatter(self, index: int, start: int, part: Tensor) -> None:
        """Copy the others' rows of a piece to them."""
        self.scatter.wait_event(self.computed[index])
        source, row_bytes = part.data_ptr(), part[0].nbytes
        for peer in self.peers:
            first, length = self._share(peer, len(part))
            target = self.inboxes_at[peer] + start // self.size * row_bytes
            _copy(self.scatter, target, source + first * row_bytes, length * row_bytes)
            _write(self.scatter, self._word(peer, SENT, self.rank), self.count)

    def _gather(
        self,
        index: int,
        start: int,
        part: Tensor,
        residual: Tensor,
        norm_weight: Tensor | None,
        eps: float,
    ) -> None:
        """Sum this rank's rows of a piece, and copy them to the others."""
        self.gather.wait_event(self.computed[index])
        for peer in self.peers:
            _wait(self.gather, self._word(self.rank, SENT, peer), self.count)
        first, length = self._share(self.rank, len(part))
        mine, inbox = (
            slice(first, first + length),
            self.inboxes[self.rank].narrow(1, start // self.size, length),
        )
        out = self.outs[self.rank].narrow(0, start + first, length)
        with torch.cuda.stream(self.gather):
            add_norm(part[mine], inbox, residual[mine], out, norm_weight, eps, self.rank)
        self.summed[index].record(self.gather)
        for peer in self.peers:
            target = self.outs_at[peer] + (start + first) * part[0].nbytes
            _copy(self.gather, target, out.data_ptr(), out.nbytes)
            _write(self.gather, self._word(peer, SUMMED, self.rank), self.count)

    def wait(self, indices: Iterable[int]) -> None:
        """Let the current stream wait for these pieces of the last result, as far as it has not."""
        stream = torch.cuda.current_stream()
        for index in indices:
            count, _ = self.pending.pop(index, (None, None))
            if count is not None:
                stream.wait_event(self.summed[index])
                for peer in self.peers:
                    _wait(stream, self._word(self.rank, SUMMED, peer), count)

    def wait_for_all(self) -> None:
        self.wait(list(self.pending))

    def arriving(self, num_rows: int) -> Iterator[slice]:
        """The rows of the last result in two runs, each as soon as the current stream has waited for it."""
        *others, last = pieces(num_rows, self.size)
        self.wait(range(len(others)))
        yield slice(last.start)
        self.wait_for_all()
        yield last

    def owns(self, rows: Tensor, num_rows: int) -> Tensor:
        """Whether this rank sums, and so keeps, each of these rows of `num_rows`: `[m]` bool."""
        piece_length = pieces(num_rows, self.size)[0].stop
        start = rows // piece_length * piece_length
        length = (num_rows - start).clamp(max=piece_length)  # the last piece may be shorter
        share = (length + self.size - 1) // self.size
        return (rows - start) // share == self.rank

    def release(self) -> None:
        """Let the streams that wait for a dead rank go on."""
        ahead = self.count + 2**30  # of all that may still be waited for
        self.words.write(1, *[ahead] * (2 * self.size**2))
