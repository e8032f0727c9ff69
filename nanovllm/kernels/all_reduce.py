"""The sum of a small tensor over the GPUs of one host, in one kernel, for decode steps, where NCCL's latency counts.

The ranks write to each other's memory. Every 32-bit word of data travels in a 64-bit word beside the number of the
round, and is there when that number is: no flags, no fences (as in NCCL's "LL" protocol). Few bytes are sent to all
ranks, and each adds them up ("one-shot"); many go to one rank, slice by slice, which sends the sum to the others
("two-shot"), so that less travels. Sums are in the order of the ranks: all get the same bits. A program owns a slice
and counts its rounds. Slots come in two halves, used in turn: a peer whose words of this round are here has read
those of the round before, so the next round may overwrite them.
"""

import pickle

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from nanovllm.kernels._triton import launch_next, pdl_options, tl, triton, wait_for_previous

MAX_BYTES = 2 << 20  # of a tensor; for larger ones NCCL is faster
MAX_WORDS = MAX_BYTES // 4
ONE_SHOT_BYTES = 128 << 10  # with more than two ranks; with two, both ways send as much
BLOCK = 1024  # words a program


@triton.jit
def _slots(peers_ptr, rank):
    return tl.multiple_of(tl.load(peers_ptr + rank).to(tl.pointer_type(tl.int64)), 16)


@triton.jit
def _send(slot_ptr, words, round, mask):
    tl.store(slot_ptr, (round.to(tl.int64) << 32) | (words.to(tl.int64) & 0xFFFFFFFF), mask=mask)


@triton.jit
def _receive(slot_ptr, round, mask, stop_ptr):
    words = tl.load(slot_ptr, mask=mask, other=0, volatile=True)
    while tl.max((((words >> 32).to(tl.int32) != round) & mask).to(tl.int32), 0) > 0:
        words = tl.load(slot_ptr, mask=mask, other=0, volatile=True)
        if tl.load(stop_ptr, volatile=True) != 0:  # a rank died: go on, with anything
            words = tl.zeros_like(words) | (round.to(tl.int64) << 32)
    return words.to(tl.int32)


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
        low, high = low.to(DTYPE).to(tl.int16, bitcast=True), high.to(DTYPE).to(tl.int16, bitcast=True)
        return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)


@triton.jit
def _all_reduce_kernel(
    x_ptr, residual_ptr, out_ptr, peers_ptr, rounds_ptr, stop_ptr, num_words, rank, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, MAX_WORDS: tl.constexpr, DTYPE: tl.constexpr, TWO_SHOT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    wait_for_previous(PDL)
    program = tl.program_id(0)
    word = program * BLOCK + tl.arange(0, BLOCK)
    mask = word < num_words
    round = tl.load(rounds_ptr + program) + 1
    slot = (round & 1) * (RANKS * MAX_WORDS) + word  # of rank 0's words; the other ranks' follow
    slots_ptr = _slots(peers_ptr, rank) + slot
    words = tl.load(x_ptr + word, mask=mask, other=0)
    owner = program % RANKS
    for i in tl.static_range(1, RANKS):
        peer = (rank + i) % RANKS
        if (not TWO_SHOT) or peer == owner:
            _send(_slots(peers_ptr, peer) + slot + rank * MAX_WORDS, words, round, mask)
    if (not TWO_SHOT) or rank == owner:
        low, high = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for source in tl.static_range(RANKS):
            part = words
            if source != rank:
                part = _receive(slots_ptr + source * MAX_WORDS, round, mask, stop_ptr)
            part_low, part_high = _unpack(part, DTYPE)
            low, high = low + part_low, high + part_high
        words = _pack(low, high, DTYPE)
        if TWO_SHOT:
            for i in tl.static_range(1, RANKS):
                _send(_slots(peers_ptr, (rank + i) % RANKS) + slot + rank * MAX_WORDS, words, round, mask)
    else:
        words = _receive(slots_ptr + owner * MAX_WORDS, round, mask, stop_ptr)
    if HAS_RESIDUAL:
        low, high = _unpack(words, DTYPE)
        residual_low, residual_high = _unpack(tl.load(residual_ptr + word, mask=mask, other=0), DTYPE)
        words = _pack(low + residual_low, high + residual_high, DTYPE)
    tl.store(out_ptr + word, words, mask=mask)
    tl.store(rounds_ptr + program, round)


class SmallAllReduce:
    """The memory that `_all_reduce_kernel` works on. All ranks make one, and call it alike, in the same order."""

    def __init__(self, rank: int, size: int, device: torch.device, store: dist.Store) -> None:
        self.rank, self.size = rank, size
        memory = torch.zeros(2 * size * MAX_WORDS, dtype=torch.int64, device=device)
        store.set(f"all_reduce_{rank}", pickle.dumps(reduce_tensor(memory)[1]))
        self.memories = [memory] * size
        for peer in range(size):
            if peer != rank:  # a CUDA IPC handle makes another process's memory one of this GPU's
                arguments = list(pickle.loads(store.get(f"all_reduce_{peer}")))
                arguments[6] = device.index  # storage_device
                self.memories[peer] = rebuild_cuda_tensor(*arguments)
        self.peers = torch.tensor([peer.data_ptr() for peer in self.memories], dtype=torch.int64, device=device)
        self.rounds = torch.zeros(MAX_WORDS // BLOCK, dtype=torch.int32, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32, device=device)
        dist.barrier()  # nobody's memory is written before it is zeroed

    def takes(self, x: torch.Tensor) -> bool:
        return x.nbytes <= MAX_BYTES and x.nbytes % 4 == 0

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of the ranks' x, plus `residual`, in place of residual, or else of x; contiguous, of one dtype."""
        assert x.is_contiguous() and self.takes(x) and (residual is None or residual.is_contiguous())
        out = x if residual is None else residual
        words, out_words = x.view(-1).view(torch.int32), out.view(-1).view(torch.int32)
        _all_reduce_kernel[(triton.cdiv(words.numel(), BLOCK),)](
            words, out_words, out_words, self.peers, self.rounds, self.stop, words.numel(), self.rank,
            RANKS=self.size, BLOCK=BLOCK, MAX_WORDS=MAX_WORDS, DTYPE=getattr(tl, str(x.dtype).split(".")[1]),
            TWO_SHOT=self.size > 2 and x.nbytes > ONE_SHOT_BYTES, HAS_RESIDUAL=residual is not None, **pdl_options(),
        )  # fmt: skip
        return out

    def release(self) -> None:
        """Let the kernels that wait for a dead rank end; from another thread than theirs, which may be blocked."""
        with torch.cuda.stream(torch.cuda.Stream(self.stop.device)):
            self.stop.fill_(1)
