"""Time all-reduces over all GPUs of this host, in a CUDA graph: `python scripts/bench_all_reduce.py`.

Microseconds of one bf16 all-reduce of several sizes: by NCCL, by PyTorch's symmetric-memory one-shot kernel (with the
copy into its memory) and by our own. Each is checked against the sum.
"""

import sys
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from nanovllm.kernels.all_reduce import MAX_BYTES, SmallAllReduce  # noqa: E402
from nanovllm.kernels.host_words import HostWords  # noqa: E402

CALLS, ROW_BYTES = 50, 8192  # of Qwen3-8B's hidden states


def measure(reduce: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Microseconds a call; the slowest rank's."""
    reduce(x.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            out = reduce(x)
    graph.replay()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    dist.barrier()
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    end.synchronize()
    time = torch.tensor(start.elapsed_time(end) * 1000 / CALLS / 10, device="cuda")
    dist.all_reduce(time, op=dist.ReduceOp.MAX)
    return time.item()


def run(rank: int, size: int, port: int, memory: SharedMemory) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=size, device_id=device)
    from torch.distributed import _symmetric_memory as symmetric_memory

    words = HostWords(memory)
    small_all_reduce = SmallAllReduce(rank, size, device, words, ROW_BYTES)
    shared = symmetric_memory.empty(MAX_BYTES // 2, dtype=torch.bfloat16, device=device)
    symmetric_memory.rendezvous(shared, dist.group.WORLD)
    group = dist.group.WORLD.group_name

    def nccl(x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x)
        return x

    def ours(x: torch.Tensor) -> torch.Tensor:
        return small_all_reduce(x)[0]

    def torch_one_shot(x: torch.Tensor) -> torch.Tensor:
        part = shared[: x.numel()]
        part.copy_(x)
        return torch.ops.symm_mem.one_shot_all_reduce(part, "sum", group)

    if rank == 0:
        print(
            f"{size} x {torch.cuda.get_device_name()}, us\n{'bytes':>9} {'NCCL':>8} {'symm_mem':>8} {'ours':>8}"
        )
    for num_bytes in (8, 2048, 8192, 32768, 131072, 524288, 1 << 20, 2 << 20):
        x = torch.full((num_bytes // 2,), float(rank + 1), dtype=torch.bfloat16, device=device)
        for reduce in (nccl, torch_one_shot, ours):
            for _ in range(5):  # repeats use both halves of the buffer
                assert (reduce(x.clone()) == size * (size + 1) / 2).all(), reduce
        zeros = torch.zeros_like(x)
        times = [measure(reduce, zeros) for reduce in (nccl, torch_one_shot, ours)]
        if rank == 0:
            print(f"{num_bytes:>9} " + " ".join(f"{time:8.1f}" for time in times), flush=True)
    del small_all_reduce
    words.close()
    dist.barrier()  # nobody ends while others hold its memory
    dist.destroy_process_group()


if __name__ == "__main__":
    num_gpus = torch.cuda.device_count()
    probe = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    port = probe.port
    del probe
    memory = SharedMemory(create=True, size=4096)
    mp.spawn(run, (num_gpus, port, memory), nprocs=num_gpus)
    memory.close()
    memory.unlink()
