"""The sum of a small tensor over the GPUs of one host, in one kernel, for decode steps.

NCCL's latency is what limits small batches. Here every rank writes its part to memory that all can read, tells the
others by a flag, and adds up all parts itself ("one-shot"), in the order of the ranks, so that all get the same bits.

A program owns a slice of the buffer, with flags and a counter of its own. A slice lies in two halves, used in turn:
whoever has seen the others' flags of this round knows that they have read what it wrote in the round before, so the
round after may overwrite it, and one wait a round is enough.
"""

import pickle

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from nanovllm.kernels._triton import launch_next, pdl_options, tl, triton, wait_for_previous

MAX_BYTES = 2 << 20  # of a tensor; for larger ones NCCL is faster
SLICE_BYTES = 8192
MAX_SLICES = MAX_BYTES // SLICE_BYTES
STORAGE_DEVICE = 6  # which argument of rebuild_cuda_tensor that is


@triton.jit
def _all_reduce_kernel(
    x_ptr, residual_ptr, out_ptr, peers_ptr, rounds_ptr, stop_ptr, numel, rank, RANKS: tl.constexpr,
    BLOCK: tl.constexpr, SLICES: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_next(PDL)
    wait_for_previous(PDL)
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < numel
    round = tl.load(rounds_ptr + program) + 1
    half = (round & 1) * (SLICES * BLOCK)
    data_type = tl.pointer_type(x_ptr.dtype.element_ty)
    mine = tl.load(peers_ptr + rank)
    # Each rank's memory: 2 x SLICES slices, then an int32 flag for each rank and slice.
    FLAGS: tl.constexpr = 2 * SLICES * BLOCK * (x_ptr.dtype.element_ty.primitive_bitwidth // 8)
    tl.store(tl.multiple_of(mine.to(data_type), 16) + half + offsets, tl.load(x_ptr + offsets, mask=mask), mask=mask)
    tl.debug_barrier()  # the whole slice is written before the flags tell of it
    for peer in tl.static_range(RANKS):
        flags = (tl.load(peers_ptr + peer) + FLAGS).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(flags + rank * SLICES + program, round, sem="release", scope="sys")
    flags = (mine + FLAGS).to(tl.pointer_type(tl.int32)) + program
    for peer in tl.static_range(RANKS):
        seen = tl.atomic_add(flags + peer * SLICES, 0, sem="acquire", scope="sys")
        while round - seen > 0:  # the difference, because the counter wraps around
            seen = tl.atomic_add(flags + peer * SLICES, 0, sem="acquire", scope="sys")
            seen = tl.where(tl.load(stop_ptr, volatile=True) != 0, round, seen)  # a rank died: go on, with anything
    tl.debug_barrier()
    out = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(RANKS):
        part_ptr = tl.multiple_of(tl.load(peers_ptr + peer).to(data_type), 16) + half
        out += tl.load(part_ptr + offsets, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rounds_ptr + program, round)


class OneShotAllReduce:
    """The memory that `_all_reduce_kernel` works on. All ranks make one, and call it alike, in the same order."""

    def __init__(self, rank: int, size: int, device: torch.device, store: dist.Store) -> None:
        self.rank, self.size = rank, size
        memory = torch.zeros(2 * MAX_BYTES + 4 * MAX_SLICES * size, dtype=torch.uint8, device=device)
        store.set(f"all_reduce_{rank}", pickle.dumps(reduce_tensor(memory)[1]))
        self.memories = [memory if peer == rank else self._open(store, peer, device) for peer in range(size)]
        self.peers = torch.tensor([peer.data_ptr() for peer in self.memories], dtype=torch.int64, device=device)
        self.rounds = torch.zeros(MAX_SLICES, dtype=torch.int32, device=device)
        self.stop = torch.zeros(1, dtype=torch.int32, device=device)

    @staticmethod
    def _open(store: dist.Store, peer: int, device: torch.device) -> torch.Tensor:
        """Another process's memory, as if it lay on this GPU (a CUDA IPC handle; NVLink or PCIe does the rest)."""
        arguments = list(pickle.loads(store.get(f"all_reduce_{peer}")))
        arguments[STORAGE_DEVICE] = device.index
        return rebuild_cuda_tensor(*arguments)

    def takes(self, x: torch.Tensor) -> bool:
        return x.numel() * x.itemsize <= MAX_BYTES

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """`residual` + the sum of the ranks' x, all contiguous and alike; in place of residual, or else of x."""
        assert x.is_contiguous() and self.takes(x) and (residual is None or residual.is_contiguous())
        out, block = x if residual is None else residual, SLICE_BYTES // x.itemsize
        _all_reduce_kernel[(triton.cdiv(x.numel(), block),)](
            x, out, out, self.peers, self.rounds, self.stop, x.numel(), self.rank, RANKS=self.size, BLOCK=block,
            SLICES=MAX_SLICES, HAS_RESIDUAL=residual is not None, num_warps=8, **pdl_options(),
        )  # fmt: skip
        return out

    def release(self) -> None:
        """Let the kernels that wait for a dead rank end; from another thread than theirs, which may be blocked."""
        with torch.cuda.stream(torch.cuda.Stream(self.stop.device)):
            self.stop.fill_(1)
