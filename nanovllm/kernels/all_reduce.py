"""The sum of a small tensor over the GPUs of one host, in one kernel, for decode steps, where NCCL's latency counts.

The ranks write to each other's memory. A 32-bit word of data is there as soon as its slot no longer holds EMPTY, a
NaN that is never sent; whoever has read it makes the slot empty again. So there are no flags and no fences (as in
TensorRT-LLM's "Lamport" all-reduce). Few bytes are sent to all ranks, and each adds them up ("one-shot"); many go to
one rank, slice by slice, which sends the sum to the others ("two-shot"), so that less travels. Sums are in the order
of the ranks: all get the same bits. A program owns a slice and counts its rounds. Slots come in two halves, used in
turn: a peer whose words of this round are here has emptied those of the round before, so the next may fill them.

A slice is a row of the hidden states, so that the RMSNorm that follows can be computed where the row is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    padded_empty,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.host_words import HostWords

MAX_BYTES = 2 << 20  # of a tensor; most of prefills are larger
MAX_WORDS = MAX_BYTES // 4
ONE_SHOT_BYTES = 256 << 10  # with more than two ranks; with two, both ways send as much
EMPTY = -1  # NaN as one float32, and as two of 16 bits
OTHER_NAN = 0x7FFF7FFF  # what is sent for it


@triton.jit
def _slots(peers_ptr, rank):
    return tl.multiple_of(tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _send(slot_ptr, words, mask, EMPTY: tl.constexpr, OTHER_NAN: tl.constexpr):
    tl.store(slot_ptr, tl.where(words == EMPTY, OTHER_NAN, words), mask=mask)


@triton.jit
def _receive(slot_ptr, mask, stop_ptr, EMPTY: tl.constexpr):
    words, times = tl.load(slot_ptr, mask=mask, other=0, volatile=True), 0
    while tl.max((words == EMPTY).to(tl.int32), 0) > 0:
        words = tl.load(slot_ptr, mask=mask, other=0, volatile=True)
        times += 1
        if times % 256 == 0:  # rarely, as the host is far
            if tl.load(stop_ptr, volatile=True) != 0:  # a rank died: go on, with anything
                words = tl.zeros_like(words)
    tl.store(slot_ptr, tl.full(words.shape, EMPTY, tl.int32), mask=mask)
    return words


@triton.jit
def _unpack(words, DTYPE: tl.constexpr):
    """A word's one or two numbers, as float32."""
    low = words if DTYPE == tl.float32 else words.to(tl.int16)
    high = words if DTYPE == tl.float32 else (words >> 16).to(tl.int16)
    return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _pack(low, high, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        return low.to(tl.int32, bitcast=True)
    else:
        low, high = (
            low.to(DTYPE).to(tl.int16, bitcast=True),
            high.to(DTYPE).to(tl.int16, bitcast=True),
        )
        return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)


@triton.jit
def _all_reduce_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    norm_ptr,
    normed_ptr,
    eps,
    peers_ptr,
    rounds_ptr,
    num_words,
    rank,
    PARTS: tl.constexpr,
    RANKS: tl.constexpr,
    SLICE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_WORDS: tl.constexpr,
    DTYPE: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    EMPTY: tl.constexpr,
    OTHER_NAN: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    program, column = tl.program_id(0), tl.arange(0, BLOCK)
    word = program * SLICE + column
    mask = (column < SLICE) & (word < num_words)
    if norm_ptr is not None:
        norm_words = tl.load(norm_ptr + column, mask=mask, other=0)
    wait_for_previous(PDL)
    round = tl.load(rounds_ptr + program) + 1
    slot = (round & 1) * (RANKS * MAX_WORDS) + word  # of rank 0's words; the other ranks' follow
    slots_ptr, stop_ptr = _slots(peers_ptr, rank) + slot, _slots(peers_ptr, RANKS)
    words = tl.load(x_ptr + word, mask=mask, other=0)
    if PARTS > 1:
        low, high = _unpack(words, DTYPE)
        for i in tl.static_range(1, PARTS):
            part_low, part_high = _unpack(
                tl.load(x_ptr + i * num_words + word, mask=mask, other=0), DTYPE
            )
            low, high = low + part_low, high + part_high
        words = _pack(low, high, DTYPE)
    if residual_ptr is not None:
        residual_low, residual_high = _unpack(
            tl.load(residual_ptr + word, mask=mask, other=0), DTYPE
        )
    owner = program % RANKS
    for i in tl.static_range(1, RANKS):
        peer = (rank + i) % RANKS
        if (not TWO_SHOT) or peer == owner:
            _send(_slots(peers_ptr, peer) + slot + rank * MAX_WORDS, words, mask, EMPTY, OTHER_NAN)
    if (not TWO_SHOT) or rank == owner:
        low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(RANKS):
            part = words
            if source != rank:
                part = _receive(slots_ptr + source * MAX_WORDS, mask, stop_ptr, EMPTY)
            part_low, part_high = _unpack(part, DTYPE)
            low, high = low + part_low, high + part_high
        words = _pack(low, high, DTYPE)
        if TWO_SHOT:
            for i in tl.static_range(1, RANKS):
                _send(
                    _slots(peers_ptr, (rank + i) % RANKS) + slot + rank * MAX_WORDS,
                    words,
                    mask,
                    EMPTY,
                    OTHER_NAN,
                )
    else:
        words = _receive(slots_ptr + owner * MAX_WORDS, mask, stop_ptr, EMPTY)
    if residual_ptr is not None:
        low, high = _unpack(words, DTYPE)
        words = _pack(low + residual_low, high + residual_high, DTYPE)
    tl.store(out_ptr + word, words, mask=mask)
    tl.store(rounds_ptr + program, round)
    if norm_ptr is not None:  # RMSNorm: the row is here
        low, high = _unpack(words, DTYPE)
        norm_low, norm_high = _unpack(norm_words, DTYPE)
        numbers: tl.constexpr = SLICE if DTYPE == tl.float32 else 2 * SLICE
        squares = low * low if DTYPE == tl.float32 else low * low + high * high
        scale = tl.rsqrt(tl.sum(squares, 0) / numbers + eps)
        tl.store(
            normed_ptr + word,
            _pack(low * scale * norm_low, high * scale * norm_high, DTYPE),
            mask=mask,
        )


def share_memory(memory: Tensor, rank: int, size: int) -> list[Tensor]:
    """Each rank's `memory`, the others' as if they were memory of this GPU. All ranks call it, in the same order."""
    memories: list[Any] = [None] * size
    dist.all_gather_object(memories, reduce_tensor(memory)[1])  # CUDA IPC handles
    for peer in range(size):
        arguments = list(memories[peer])
        arguments[6] = memory.device.index  # storage_device
        memories[peer] = memory if peer == rank else rebuild_cuda_tensor(*arguments)
    return memories


class SmallAllReduce:
    """The memory that `_all_reduce_kernel` works on. All ranks make one, and call it alike, in the same order.

    A slice, always as long, is a row of the hidden states: row_bytes, a multiple of 4.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, words: HostWords, row_bytes: int
    ) -> None:
        self.rank, self.size, self.words, self.slice = rank, size, words, row_bytes // 4
        memory = torch.full((2 * size * MAX_WORDS,), EMPTY, dtype=torch.int32, device=device)
        self.memories = share_memory(memory, rank, size)
        addresses = [
            *(peer.data_ptr() for peer in self.memories),
            words.address,
        ]  # words[0]: whether to stop
        self.peers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.rounds = torch.zeros(
            triton.cdiv(MAX_WORDS, self.slice), dtype=torch.int32, device=device
        )
        dist.barrier()  # nobody's memory is written before it is empty

    def takes(self, x: Tensor) -> bool:
        return x.nbytes <= MAX_BYTES and x.nbytes % 4 == 0

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The sum of the ranks' x, plus `residual`, in place of residual, or else of x; and its RMSNorm, if asked.

        x, residual `[n, hidden]`, norm_weight `[hidden]`, contiguous, of one dtype; without the last, of any shape.
        With a residual, x may be in parts, `[parts, n, hidden]`.
        """
        out = x if residual is None else residual
        assert (
            x.is_contiguous()
            and out.is_contiguous()
            and self.takes(out)
            and x.nbytes % out.nbytes == 0
        )
        assert norm_weight is None or norm_weight.nbytes == out[0].nbytes == 4 * self.slice
        normed = None if norm_weight is None else padded_empty(*out.shape, out)
        words = (
            y if y is None else y.view(-1).view(torch.int32)
            for y in (x, residual, out, norm_weight, normed)
        )
        num_words, block = (
            out.nbytes // 4,
            max(32, next_power_of_2(self.slice)),
        )  # a thread has a word
        _all_reduce_kernel[(triton.cdiv(num_words, self.slice),)](
            *words,
            eps,
            self.peers,
            self.rounds,
            num_words,
            self.rank,
            PARTS=x.nbytes // out.nbytes,
            RANKS=self.size,
            SLICE=self.slice,
            BLOCK=block,
            MAX_WORDS=MAX_WORDS,
            DTYPE=getattr(tl, str(x.dtype).split(".")[1]),
            TWO_SHOT=self.size > 2 and out.nbytes > ONE_SHOT_BYTES,
            EMPTY=EMPTY,
            OTHER_NAN=OTHER_NAN,
            num_warps=max(1, min(8, block // 256)),
            **pdl_options(),
        )
        return out, normed

    def release(self) -> None:
        """Let the kernels that wait for a dead rank end."""
        self.words.write(0, 1)
