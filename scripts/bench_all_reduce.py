"""Time all-reduces over all GPUs of this host, in a CUDA graph.

    python scripts/bench_all_reduce.py

Microseconds of one bf16 all-reduce of several sizes: by NCCL, by PyTorch's symmetric-memory
one-shot kernel (with the copy into its memory) and by ours. Each is checked against the sum.
"""

from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import _symmetric_memory as symmetric_memory

from nanovllm.kernels.all_reduce import MAX_BYTES, SmallAllReduce
from nanovllm.kernels.host_words import HostWords

CALLS = 50  # in a graph
REPLAYS = 10
ROW_BYTES = 8192  # of Qwen3-8B's hidden states
SIZES = (8, 2048, 8192, 32768, 131072, 524288, 1 << 20, 2 << 20)  # bytes


def measure(reduce: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Microseconds of one call, on the slowest rank."""
    reduce(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            out = reduce(x)  # the last result is kept, so that its memory is not given away
    graph.replay()
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    dist.barrier()
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    del out
    time = torch.tensor(start.elapsed_time(end) * 1000 / CALLS / REPLAYS, device="cuda")
    dist.all_reduce(time, op=dist.ReduceOp.MAX)
    return time.item()


def compare(rank: int, size: int, words: HostWords) -> None:
    """Check and time the three all-reduces; rank 0 prints. Their memory is freed at the end."""
    device = torch.device("cuda", rank)
    group = dist.group.WORLD
    assert group is not None
    small_all_reduce = SmallAllReduce(rank, size, device, words, ROW_BYTES)
    shared = symmetric_memory.empty(MAX_BYTES // 2, dtype=torch.bfloat16, device=device)
    symmetric_memory.rendezvous(shared, group)

    def nccl(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def ours(x: torch.Tensor) -> torch.Tensor:
        return small_all_reduce(x)[0]

    def torch_one_shot(x: torch.Tensor) -> torch.Tensor:
        part = shared[: x.numel()]
        part.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", group.group_name)

    if rank == 0:
        print(f"{size} x {torch.cuda.get_device_name()}, us")
        print(f"{'bytes':>9} {'NCCL':>8} {'symm_mem':>8} {'ours':>8}")
    for num_bytes in SIZES:
        x = torch.full((num_bytes // 2,), float(rank + 1), dtype=torch.bfloat16, device=device)
        for reduce in (nccl, torch_one_shot, ours):
            for _ in range(5):  # repeats use both halves of the buffer
                assert (reduce(x.clone()) == size * (size + 1) / 2).all(), reduce
        zeros = torch.zeros_like(x)
        times = [measure(reduce, zeros) for reduce in (nccl, torch_one_shot, ours)]
        if rank == 0:
            print(f"{num_bytes:>9} " + " ".join(f"{time:8.1f}" for time in times), flush=True)


def run(rank: int, size: int, port: int, memory: SharedMemory) -> None:
    """What one rank does, from its start to its end.

    Args:
        rank: of this process, and the index of its GPU.
        size: number of ranks.
        port: of the rendezvous on this host.
        memory: shared by the ranks; a waiting kernel looks there whether it must stop.
    """
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device)
    words = HostWords(memory)
    compare(rank, size, words)
    words.close()
    dist.barrier()  # nobody ends while others hold its memory
    dist.destroy_process_group()


if __name__ == "__main__":
    num_gpus = torch.cuda.device_count()
    # Port 0 has the system choose a free one; all ranks must know it.
    probe = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    port = probe.port
    del probe
    memory = SharedMemory(create=True, size=4096)
    mp.spawn(run, (num_gpus, port, memory), nprocs=num_gpus)
    memory.close()
    memory.unlink()
