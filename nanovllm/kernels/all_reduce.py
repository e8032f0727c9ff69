"""All-reduce of a small tensor over the GPUs of one host in one kernel, faster than NCCL's.

It serves decode steps, where the time goes into latency. The ranks write directly into each other's
memory. What arrives is recognised by its value, so that there are no flags and no memory fences, as
in TensorRT-LLM's "Lamport" all-reduce. The words used below:

- word: 32 bits of data, that is one float32 or two 16-bit numbers. GPUs write a word as a whole.
- slot: the place of one word in a rank's receiving memory, which has a slot for every word of every
  rank. An empty slot holds EMPTY, the bits of a NaN that is never sent (see OTHER_NAN).
- slice: the words that one program sums: one row of the hidden states, so that the program can also
  compute the RMSNorm of the row. Programs do not wait for each other, only for peers' programs.
- round: how many all-reduces a program has computed, this one included. The slots come in two
  halves, for odd and for even rounds.

One slice on two ranks, time going down:

    rank 0                                          rank 1
    round 1: writes its words into rank 1's half 1  (still busy with something else)
    reads its own half 1 again and again: EMPTY     round 1: writes its words into rank 0's half 1
    sees rank 1's words, makes the slots EMPTY      sees rank 0's words, makes the slots EMPTY
    adds both ranks' words, stores the sum          adds both ranks' words, stores the sum
    round 2: writes into rank 1's half 0            (delayed)
    reads its own half 0 again and again: EMPTY     round 2: writes into rank 0's half 0
    sees rank 1's words, adds, stores               sees rank 0's words, adds, stores
    round 3: writes into rank 1's half 1 again

Writing into half 1 again is safe: rank 0 has seen rank 1's words of round 2, which rank 1 sent
after it had emptied its half 1 in round 1. With one half only, rank 0 could in round 2 overwrite
words of round 1 that rank 1 had not read yet.

Small tensors are sent to all ranks, and each rank adds them up ("one-shot"). For larger ones every
slice has an owner: all ranks send their words to the owner, which adds them and sends the sum to
the others ("two-shot"): two latencies, but fewer bytes. Either way words are added in the order of
the ranks, so that all ranks get the same bits.
"""
# ruff: noqa: SIM300 (`DTYPE == tl.float32`: DTYPE is a parameter, and not the constant of the two)

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

MAX_BYTES = 2 << 20  # of a tensor; the tensors of most prefills are larger
MAX_WORDS = MAX_BYTES // 4
ONE_SHOT_BYTES = 256 << 10  # of a tensor; two ranks always take one-shot: it sends as few bytes
EMPTY = -1  # in an empty slot: all bits set, a NaN as one float32 and as two 16-bit numbers
OTHER_NAN = 0x7FFF7FFF  # is sent in place of a word that has the bits of EMPTY
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
STORAGE_DEVICE = 6  # the place of the device's number among the arguments of rebuild_cuda_tensor


@triton.jit
def _memory_at(addresses_ptr, index):
    """The memory at one of the addresses, as a pointer to words."""
    return tl.multiple_of(tl.load(addresses_ptr + index).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def _send(slot_ptr, words, mask, EMPTY: tl.constexpr, OTHER_NAN: tl.constexpr):
    """Fill slots of a peer."""
    tl.store(slot_ptr, tl.where(words == EMPTY, OTHER_NAN, words), mask=mask)


@triton.jit
def _receive(slot_ptr, mask, stop_ptr, EMPTY: tl.constexpr):
    """Wait until none of this rank's slots is empty; return their words, and empty the slots."""
    words = tl.load(slot_ptr, mask=mask, other=0, volatile=True)
    times = 0
    while tl.max((words == EMPTY).to(tl.int32), 0) > 0:
        words = tl.load(slot_ptr, mask=mask, other=0, volatile=True)
        times += 1
        if times % 256 == 0:  # noqa: SIM102 (seldom, since this word is in the host's memory)
            if tl.load(stop_ptr, volatile=True) != 0:
                words = tl.zeros_like(words)  # a rank has died: go on with any numbers
    tl.store(slot_ptr, tl.full(words.shape, EMPTY, tl.int32), mask=mask)
    return words


@triton.jit
def _unpack(words, DTYPE: tl.constexpr):
    """The numbers in each word as two float32: its low and its high half, or twice the only one."""
    low = words if DTYPE == tl.float32 else words.to(tl.int16)
    high = words if DTYPE == tl.float32 else (words >> 16).to(tl.int16)
    return low.to(DTYPE, bitcast=True).to(tl.float32), high.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _pack(low, high, DTYPE: tl.constexpr):
    """The words whose numbers are low and high, rounded to DTYPE; in float32, low alone."""
    if DTYPE == tl.float32:
        return low.to(tl.int32, bitcast=True)
    else:
        low_bits = low.to(DTYPE).to(tl.int16, bitcast=True)
        high_bits = high.to(DTYPE).to(tl.int16, bitcast=True)
        return (high_bits.to(tl.int32) << 16) | (low_bits.to(tl.int32) & 0xFFFF)


@triton.jit
def _all_reduce_kernel(
    x_ptr,
    residual_ptr,
    out_ptr,
    norm_ptr,
    normed_ptr,
    eps,
    addresses_ptr,
    rounds_ptr,
    num_words,
    rank,
    SPLITS: tl.constexpr,
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
    """A program sums one slice. All pointers are to words."""
    launch_next(PDL)
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    word = program * SLICE + column
    mask = (column < SLICE) & (word < num_words)
    if norm_ptr is not None:
        norm_words = tl.load(norm_ptr + column, mask=mask, other=0)
    wait_for_previous(PDL)
    round = tl.load(rounds_ptr + program) + 1
    # A half has MAX_WORDS slots for the words of rank 0, then as many for rank 1, and so on.
    slot = (round & 1) * (RANKS * MAX_WORDS) + word
    own_slots_ptr = _memory_at(addresses_ptr, rank) + slot
    stop_ptr = _memory_at(addresses_ptr, RANKS)

    # This rank's addend: x, or the sum of the split-K partial sums that x consists of.
    words = tl.load(x_ptr + word, mask=mask, other=0)
    if SPLITS > 1:
        low, high = _unpack(words, DTYPE)
        for i in tl.static_range(1, SPLITS):
            split_words = tl.load(x_ptr + i * num_words + word, mask=mask, other=0)
            split_low, split_high = _unpack(split_words, DTYPE)
            low += split_low
            high += split_high
        words = _pack(low, high, DTYPE)
    if residual_ptr is not None:
        residual_words = tl.load(residual_ptr + word, mask=mask, other=0)
        residual_low, residual_high = _unpack(residual_words, DTYPE)

    # Send the addend: to the owner of the slice, or to all ranks.
    owner = program % RANKS
    for i in tl.static_range(1, RANKS):
        peer = (rank + i) % RANKS
        if (not TWO_SHOT) or peer == owner:
            slot_ptr = _memory_at(addresses_ptr, peer) + slot + rank * MAX_WORDS
            _send(slot_ptr, words, mask, EMPTY, OTHER_NAN)

    # Add up all ranks' addends, or receive the sum from the owner.
    if (not TWO_SHOT) or rank == owner:
        low = tl.zeros([BLOCK], tl.float32)
        high = tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(RANKS):
            addend = words
            if source != rank:
                addend = _receive(own_slots_ptr + source * MAX_WORDS, mask, stop_ptr, EMPTY)
            addend_low, addend_high = _unpack(addend, DTYPE)
            low += addend_low
            high += addend_high
        words = _pack(low, high, DTYPE)
        if TWO_SHOT:
            for i in tl.static_range(1, RANKS):
                peer = (rank + i) % RANKS
                slot_ptr = _memory_at(addresses_ptr, peer) + slot + rank * MAX_WORDS
                _send(slot_ptr, words, mask, EMPTY, OTHER_NAN)
    else:
        words = _receive(own_slots_ptr + owner * MAX_WORDS, mask, stop_ptr, EMPTY)

    # The sum is rounded before the residual is added, as it would be by NCCL and an addition.
    if residual_ptr is not None:
        low, high = _unpack(words, DTYPE)
        words = _pack(low + residual_low, high + residual_high, DTYPE)
    tl.store(out_ptr + word, words, mask=mask)
    tl.store(rounds_ptr + program, round)
    if norm_ptr is not None:  # the RMSNorm, as the whole row is here
        low, high = _unpack(words, DTYPE)
        norm_low, norm_high = _unpack(norm_words, DTYPE)
        row_size: tl.constexpr = SLICE if DTYPE == tl.float32 else 2 * SLICE
        squares = low * low if DTYPE == tl.float32 else low * low + high * high
        scale = tl.rsqrt(tl.sum(squares, 0) / row_size + eps)
        tl.store(
            normed_ptr + word,
            _pack(low * scale * norm_low, high * scale * norm_high, DTYPE),
            mask=mask,
        )


def share_memory(memory: Tensor, rank: int, size: int) -> list[Tensor]:
    """Return the `memory` of each rank, as tensors that this GPU can use.

    All ranks must call it, in the same order. Their GPUs are in one host and can access each
    other's memory. It goes through CUDA IPC handles, as in torch.multiprocessing.
    """
    handles: list[Any] = [None] * size  # of each rank, the arguments of rebuild_cuda_tensor
    dist.all_gather_object(handles, reduce_tensor(memory)[1])
    memories = []
    for peer, handle in enumerate(handles):
        if peer == rank:
            memories.append(memory)
            continue
        arguments = list(handle)
        arguments[STORAGE_DEVICE] = memory.device.index  # this rank's GPU, not the peer's
        memories.append(rebuild_cuda_tensor(*arguments))
    return memories


def _as_words(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.view(-1).view(torch.int32)


class SmallAllReduce:
    """The shared memory of the all-reduce, and its launch.

    All ranks must make one and call it alike, in the same order. If a rank dies, the kernels of the
    others wait for its words; `release` ends them.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, words: HostWords, row_bytes: int
    ) -> None:
        """row_bytes: of a row of the hidden states, a multiple of 4. words: number 0 is used."""
        self.rank = rank
        self.size = size
        self.words = words
        self.slice_words = row_bytes // 4
        slots = torch.full((2 * size * MAX_WORDS,), EMPTY, dtype=torch.int32, device=device)
        self.slots = share_memory(slots, rank, size)  # of each rank
        addresses = [peer_slots.data_ptr() for peer_slots in self.slots]
        addresses.append(words.address)
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        max_slices = triton.cdiv(MAX_WORDS, self.slice_words)
        self.rounds = torch.zeros(max_slices, dtype=torch.int32, device=device)
        dist.barrier()  # or a peer might send before the slots are empty, and lose its words

    def takes(self, x: Tensor) -> bool:
        """Whether the sum of tensors like x can be computed here."""
        return x.nbytes <= MAX_BYTES and x.nbytes % 4 == 0

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        norm_weight: Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return `residual` + the ranks' sum of x, and the RMSNorm of that if there is a weight.

        The first result is in place of the residual, or of x where there is none.

        x: `[n, hidden]`, or any shape without a norm; with a residual also `[splits, n, hidden]`,
            the partial sums of `split_gemm`. Contiguous, as the others are, and of the same dtype:
            float32, float16 or bfloat16.
        residual: `[n, hidden]`, the same on all ranks; `takes` must be true of it, or else of x.
        norm_weight: `[hidden]`.
        """
        out = x if residual is None else residual
        assert x.is_contiguous() and out.is_contiguous()
        assert self.takes(out) and x.nbytes % out.nbytes == 0
        normed = None
        if norm_weight is not None:
            assert norm_weight.nbytes == out[0].nbytes == 4 * self.slice_words
            normed = padded_empty(len(out), out.shape[1], out)
        num_words = out.nbytes // 4
        block = max(32, next_power_of_2(self.slice_words))  # each thread of a warp has a word
        _all_reduce_kernel[(triton.cdiv(num_words, self.slice_words),)](
            _as_words(x),
            _as_words(residual),
            _as_words(out),
            _as_words(norm_weight),
            _as_words(normed),
            eps,
            self.addresses,
            self.rounds,
            num_words,
            self.rank,
            SPLITS=x.nbytes // out.nbytes,
            RANKS=self.size,
            SLICE=self.slice_words,
            BLOCK=block,
            MAX_WORDS=MAX_WORDS,
            DTYPE=DTYPES[x.dtype],
            TWO_SHOT=self.size > 2 and out.nbytes > ONE_SHOT_BYTES,
            EMPTY=EMPTY,
            OTHER_NAN=OTHER_NAN,
            num_warps=max(1, min(8, block // 256)),
            **pdl_options(),
        )
        return out, normed

    def release(self) -> None:
        """Let the kernels that wait for a dead rank end. What they return is meaningless."""
        self.words.write(0, 1)
