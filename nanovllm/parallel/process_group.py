"""What connects a rank to the others: torch.distributed, and memory that the GPUs share."""

import threading
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.kernels.all_reduce import SmallAllReduce
from nanovllm.kernels.host_words import HostWords
from nanovllm.kernels.prefill_all_reduce import MIN_TOKENS, PrefillAllReduce
from nanovllm.parallel.channel import Channel


class ProcessGroup:
    """One rank's connections: NCCL (gloo on a CPU), and two all-reduces of our own.

    The two need GPUs that can read and write each other's memory. Where these cannot, they are
    None, and torch.distributed does all sums.
    """

    def __init__(self, config: Config, rank: int, channel: Channel, store: dist.Store) -> None:
        """Meet the other ranks at `store`; every rank makes one at the same time."""
        self.rank = rank
        self.channel = channel
        self.is_cuda = config.device == "cuda"
        # Destroys the CUDA graphs that hold kernels of NCCL: the model runner sets it.
        self.clear_graphs: Callable[[], None] = lambda: None
        self.small_all_reduce: SmallAllReduce | None = None
        self.prefill_all_reduce: PrefillAllReduce | None = None
        size = config.tensor_parallel_size
        device = None
        if self.is_cuda:
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
        backend = "nccl" if self.is_cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device)
        if rank == 0:
            channel.on_death = self.let_go
            threading.Thread(target=channel.watch, daemon=True).start()

        row_bytes = config.hf_config.hidden_size * config.dtype.itemsize
        if device is None or row_bytes % 4:
            return
        peers = [peer for peer in range(size) if peer != rank]
        if not all(torch.cuda.can_device_access_peer(rank, peer) for peer in peers):
            return
        words = HostWords(channel.words)
        channel.on_close = words.close
        self.small_all_reduce = SmallAllReduce(rank, size, device, words, row_bytes)
        shape = (config.max_num_batched_tokens, config.hf_config.hidden_size)
        if config.max_num_batched_tokens >= MIN_TOKENS:
            dtype = config.dtype
            self.prefill_all_reduce = PrefillAllReduce(rank, size, device, words, shape, dtype)

    def let_go(self) -> None:
        """After another rank failed: end what this rank's GPU waits for it to do. The sums may then
        have any result, and the engine raises before it uses one.
        """
        for all_reduce in (self.small_all_reduce, self.prefill_all_reduce):
            if all_reduce is not None:
                all_reduce.release()
        if self.is_cuda and dist.is_initialized():
            # NCCL ends its kernels first, and then goes on until no CUDA graph holds one of them.
            abort = threading.Thread(target=abort_nccl, daemon=True)
            abort.start()
            for _ in range(5):
                abort.join(timeout=1.0)
                if not abort.is_alive():
                    break
                self.clear_graphs()

    def leave(self) -> None:
        """Give back the shared memory and leave the process group; all ranks call it."""
        shares_memory = self.small_all_reduce is not None
        self.small_all_reduce = None
        self.prefill_all_reduce = None
        if dist.is_initialized():
            if shares_memory:
                dist.barrier()  # no process ends while another one holds its memory
            dist.destroy_process_group()


def abort_nccl() -> None:
    """End NCCL's communicators, whatever state they are in."""
    with suppress(Exception):  # what it says would hide why it was called
        dist.distributed_c10d._abort_process_group()
