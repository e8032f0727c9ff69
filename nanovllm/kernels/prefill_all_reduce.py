"""The all-reduces of a large prefill over the GPUs of one host, done while the GPUs compute.

A prefill is cut into pieces of its rows (tokens): while one piece is summed, the next is computed.
Each rank owns some rows of every piece. The other ranks copy their addends of these rows to the
owner ("reduce-scatter"); the owner adds them to its rows of the residual, computes the RMSNorm that
follows, and copies the result to all ranks ("all-gather"). That moves as many bytes as any
all-reduce, but addition and norm are computed once and not on every rank.

GEMMs occupy every multiprocessor from start to end, so that a kernel that copied, or waited for a
peer, would be in their way. Therefore copy engines move the data, and streams wait for words in the
host's memory that peers write after their copies (stream memory operations of the CUDA driver).
Only the addition is a kernel; its stream has a higher priority: it comes next when a GEMM ends.

One piece on two ranks, time going down (`compute` is the GEMM; each line is one stream's work):

    rank 0                                            rank 1
    waits for this piece of the last sum: SUMMED      the same
    computes its addends                              computes its addends
    copies rank 1's rows to rank 1's inbox, SENT      copies rank 0's rows to rank 0's inbox, SENT
    waits for rank 1's SENT                           waits for rank 0's SENT
    adds its own rows, writes them to its `out`       adds its own rows, writes them to its `out`
    copies them to rank 1's `out`, SUMMED             copies them to rank 0's `out`, SUMMED

Why one inbox and one `out` are enough for all sums, although ranks may be ahead of each other:

1. Inbox: a rank sends a piece only after it has waited for the same piece of the sum before, that
   is for every rank's SUMMED. A rank writes SUMMED after its addition has read its inbox.
2. `out`: a rank writes rows of a piece to any `out` only after every rank's SENT for that piece. A
   rank writes SENT after `compute`, which was the last to read the piece of the sum before.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nanovllm.kernels._triton import next_power_of_2
from nanovllm.kernels.all_reduce import share_memory
from nanovllm.kernels.host_words import HostWords
from nanovllm.kernels.rms_norm import launch_add_rms_norm

MIN_ROWS = 2048  # of a piece, as launching one takes the host 0.1 ms
MIN_TOKENS = 2 * MIN_ROWS  # of a prefill, as a single piece would be summed beside nothing
SENT = 0  # the kind of word that tells how many pieces a rank has sent
SUMMED = 1  # the kind of word that tells of how many pieces a rank has summed its rows


# --- the addition ---


def add_norm(
    addends: Tensor,
    inbox: Tensor,
    residual: Tensor,
    out: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    rank: int,
) -> None:
    """Add all ranks' addends to the residual, in place, and write its RMSNorm to `out`.

    addends: `[n, hidden]`, this rank's.
    inbox: `[ranks, n, hidden]`, the other ranks' addends; `inbox[rank]` is not read.
    residual, out: `[n, hidden]`. All are of one dtype, with contiguous rows.
    norm_weight: `[hidden]`; None: the sum itself is written to `out`.
    """
    num_rows, columns = addends.shape
    if num_rows == 0:
        return
    launch_add_rms_norm(
        residual=residual,
        addends=inbox,
        weight=norm_weight,
        eps=eps,
        out=out,
        num_warps=min(8, max(1, next_power_of_2(columns) // 512)),
        pdl={"PDL": False},
        own=addends,
        own_index=rank,
    )


# --- copies, and waiting for them, by the CUDA driver ---


@lru_cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_uint64
    driver.cuMemcpyAsync.argtypes = pointer, pointer, ctypes.c_size_t, pointer
    for operation in (driver.cuStreamWriteValue32_v2, driver.cuStreamWaitValue32_v2):
        operation.argtypes = pointer, pointer, ctypes.c_uint32, ctypes.c_uint
    return driver


def _check(error: int) -> None:
    if error:
        raise RuntimeError(
            f"a copy between GPUs, or a wait for one, failed with CUDA driver error {error}"
        )


def _copy(stream: torch.cuda.Stream, target: int, source: int, num_bytes: int) -> None:
    """Copy between two GPUs with a copy engine.

    target, source: addresses, since slicing tensors for `copy_` would take the host longer.
    """
    if num_bytes:
        _check(_driver().cuMemcpyAsync(target, source, num_bytes, stream.cuda_stream))


def _write(stream: torch.cuda.Stream, word: int, value: int) -> None:
    """Write `value`, modulo 2^32, to the address `word` after all that `stream` did before.

    Who sees the value sees the results of that work as well, on every GPU.
    """
    _check(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, word, value % 2**32, 0))


def _wait(stream: torch.cuda.Stream, word: int, value: int) -> None:
    """Let `stream` wait until the word at address `word` is at least `value`.

    The driver compares modulo 2^32, so that the counts of pieces may wrap around.
    """
    _check(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, word, value % 2**32, 0))


# --- the sums ---


def pieces(num_rows: int, ranks: int) -> list[slice]:
    """Return the pieces into which the rows of a prefill are cut: of equal size but for the last.

    None, if the prefill is too short for two. There are more pieces with more ranks: a sum then
    takes longer in comparison with a GEMM, so that it should start sooner.
    """
    if num_rows < MIN_TOKENS:
        return []
    count = min(2 * ranks, num_rows // MIN_ROWS)
    unit = 128 * ranks  # whole tiles of a GEMM, and as many rows for each rank
    length = -(-num_rows // (count * unit)) * unit
    return [slice(first, min(first + length, num_rows)) for first in range(0, num_rows, length)]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a sum that this rank has begun."""

    index: int  # among the pieces of the sum
    first_row: int  # of the prefill
    count: int  # how many pieces this rank had begun with it, in all sums; what its words tell
    # `[n, hidden]`, this rank's. Kept alive until it is copied, which the allocator cannot know.
    addends: Tensor


class PrefillAllReduce:
    """The shared memory, the streams and the protocol of these sums.

    All ranks must make one and call it alike, in the same order. If a rank dies, the streams of the
    others wait for its words; `release` lets them go on.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        words: HostWords,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """shape: the most rows of a residual, and its columns. words: see `_word`."""
        self.rank = rank
        self.size = size
        self.words = words
        self.peers = [(rank + i) % size for i in range(1, size)]
        self.max_rows, columns = shape
        own_rows = -(-self.max_rows // size)  # the most that a rank owns
        out = torch.empty(shape, dtype=dtype, device=device)
        inbox = torch.empty(size, own_rows, columns, dtype=dtype, device=device)
        self.outs = share_memory(out, rank, size)  # of each rank: the result
        self.inboxes = share_memory(inbox, rank, size)  # of each rank: what was sent to it
        self.out_addresses = [out.data_ptr() for out in self.outs]
        # Where this rank sends to: its own slot in each rank's inbox.
        self.inbox_addresses = [inbox[rank].data_ptr() for inbox in self.inboxes]
        self.scatter_stream = torch.cuda.Stream(device)
        self.gather_stream = torch.cuda.Stream(device, priority=-1)
        # An event for each piece of a sum: its addends are computed; this rank's rows are summed.
        self.computed = [torch.cuda.Event() for _ in range(2 * size)]
        self.summed = [torch.cuda.Event() for _ in range(2 * size)]
        self.count = 0  # of all pieces that this rank has begun
        self.pending: dict[int, Piece] = {}  # by index: the pieces not yet waited for

    def takes(self, num_rows: int) -> bool:
        """Whether a residual of so many rows can be summed here."""
        return MIN_TOKENS <= num_rows <= self.max_rows

    def __call__(
        self,
        compute: Callable[[slice], Tensor],
        residual: Tensor,
        norm_weight: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Return the RMSNorm of residual + the ranks' sum of `compute`; without a weight, the sum.

        The result, `[n, hidden]`, is in shared memory, and valid until the next call. Its pieces
        arrive later: `wait`, `wait_for_all` or `arriving` must come before reading them. Of the
        residual, each rank updates only the rows that it owns, in place.

        compute: takes the rows of a piece and returns this rank's addends, `[rows, hidden]`. It may
            read the same rows, and no others, of the result of the call before.
        residual: `[n, hidden]`. norm_weight: `[hidden]`, or None.
        """
        stream = torch.cuda.current_stream()
        for index, rows in enumerate(pieces(len(residual), self.size)):
            self.wait([index])
            addends = compute(rows)
            self.computed[index].record(stream)
            self.count += 1
            piece = Piece(index, rows.start, self.count, addends)
            self.pending[index] = piece
            self._scatter(piece)
            self._gather(piece, residual[rows], norm_weight, eps)
        return self.outs[self.rank][: len(residual)]

    def _owned_rows(self, rank: int, num_rows: int) -> tuple[int, int]:
        """The first row that `rank` owns in a piece of `num_rows` rows, and how many it owns."""
        length = -(-num_rows // self.size)
        first = min(rank * length, num_rows)
        return first, min(length, num_rows - first)

    def _word(self, reader: int, kind: int, writer: int) -> int:
        """The address of the count of SENT or SUMMED pieces that `writer` tells `reader`.

        Word 0 belongs to `SmallAllReduce`; then come each reader's words, by kind and writer.
        """
        return self.words.address + 4 * (1 + (reader * 2 + kind) * self.size + writer)

    def _scatter(self, piece: Piece) -> None:
        """Copy the addends of the rows that others own to their inboxes."""
        self.scatter_stream.wait_event(self.computed[piece.index])
        source = piece.addends.data_ptr()
        row_bytes = piece.addends[0].nbytes
        inbox_row = piece.first_row // self.size
        for peer in self.peers:
            first, length = self._owned_rows(peer, len(piece.addends))
            target = self.inbox_addresses[peer] + inbox_row * row_bytes
            _copy(self.scatter_stream, target, source + first * row_bytes, length * row_bytes)
            _write(self.scatter_stream, self._word(peer, SENT, self.rank), piece.count)

    def _gather(
        self, piece: Piece, residual: Tensor, norm_weight: Tensor | None, eps: float
    ) -> None:
        """Sum the rows that this rank owns, and copy them to the others.

        residual: the rows of this piece.
        """
        self.gather_stream.wait_event(self.computed[piece.index])
        for peer in self.peers:
            _wait(self.gather_stream, self._word(self.rank, SENT, peer), piece.count)
        first, length = self._owned_rows(self.rank, len(piece.addends))
        owned = slice(first, first + length)
        out = self.outs[self.rank].narrow(0, piece.first_row + first, length)
        with torch.cuda.stream(self.gather_stream):
            add_norm(
                addends=piece.addends[owned],
                inbox=self.inboxes[self.rank].narrow(1, piece.first_row // self.size, length),
                residual=residual[owned],
                out=out,
                norm_weight=norm_weight,
                eps=eps,
                rank=self.rank,
            )
        self.summed[piece.index].record(self.gather_stream)
        offset = (piece.first_row + first) * piece.addends[0].nbytes
        for peer in self.peers:
            target = self.out_addresses[peer] + offset
            _copy(self.gather_stream, target, out.data_ptr(), out.nbytes)
            _write(self.gather_stream, self._word(peer, SUMMED, self.rank), piece.count)

    def wait(self, indices: Iterable[int]) -> None:
        """Let the current stream wait for these pieces of the last result, each at most once."""
        stream = torch.cuda.current_stream()
        for index in indices:
            piece = self.pending.pop(index, None)
            if piece is None:
                continue
            stream.wait_event(self.summed[index])
            for peer in self.peers:
                _wait(stream, self._word(self.rank, SUMMED, peer), piece.count)

    def wait_for_all(self) -> None:
        """Let the current stream wait for all pieces of the last result."""
        self.wait(list(self.pending))

    def arriving(self, num_rows: int) -> Iterator[slice]:
        """Yield the rows of the last result in two runs: all pieces but the last, then the last.

        Each is yielded when the current stream waits for it, so that work on the first run is done
        while the last piece is still on its way.
        """
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
        """Let the streams that wait for a dead rank go on. What they compute is meaningless."""
        ahead = self.count + 2**30  # more than any count that may still be waited for
        self.words.write(1, *[ahead] * (2 * self.size**2))
