"""Time the attention kernels on a GPU, alone.

    python scripts/bench_attention.py [--sweep]      # --sweep tries other tiles too

Decode runs inside a CUDA graph, as in the engine, over sequences of 920 tokens on average. It is
limited by reading K and V: GB/s, against the 4.2 TB/s that an H200 reads. Calls in a row read
different blocks, more than the L2 cache holds. Prefill is limited by arithmetic: TFLOP/s of the
causal half, against 790.
"""

import argparse
from collections.abc import Callable

import torch

from nanovllm.kernels import flash_attention
from nanovllm.kernels.paged_decode import DecodeConfig, decode_config, paged_decode
from nanovllm.kernels.varlen_prefill import PrefillConfig, prefill_config, varlen_prefill

# Qwen3-0.6B's attention
HEADS = 16
KV_HEADS = 8
HEAD_DIM = 128
DTYPE = torch.bfloat16
BLOCK_SIZE = 256
SCALE = HEAD_DIM**-0.5
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
READ_GB_PER_S = 4200
# What --sweep tries.
DECODE_TILES = (  # block_n, num_warps, num_stages
    (128, 4, 3),
    (64, 4, 3),
    (64, 4, 4),
    (64, 2, 3),
    (32, 4, 3),
)
DECODE_SPLITS = (1, 2, 4, 8, 16, 32)
PREFILL_CONFIGS = (
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 64, 4, 3),
    PrefillConfig(64, 128, 4, 2),
    PrefillConfig(64, 64, 4, 3),
)


def microseconds(run: Callable[[], object], calls: int = 1, repeats: int = 10) -> float:
    """Time of one call when `run` makes `calls` of them: the best of three rounds of `repeats`."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    run()
    rounds = []
    for _ in range(3):
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        rounds.append(start.elapsed_time(end) * 1000 / repeats / calls)
    return min(rounds)


class DecodeWork:
    """One batch size, with so many sets of block tables that no call finds its blocks in L2."""

    def __init__(self, num_seqs: int, k_cache: torch.Tensor, v_cache: torch.Tensor):
        lengths = torch.tensor([920])
        if num_seqs > 1:
            lengths = torch.randint(200, 1641, (num_seqs,))
        self.bytes = int(lengths.sum()) * TOKEN_BYTES
        width = 2048 // BLOCK_SIZE  # of a block table
        num_blocks = len(k_cache)
        num_sets = max(2, min(64, num_blocks // (num_seqs * width)))
        # Two permutations: at the largest batch, two sets need more blocks than there are.
        blocks = torch.cat([torch.randperm(num_blocks), torch.randperm(num_blocks)])
        blocks = blocks[: num_sets * num_seqs * width]
        self.tables = list(blocks.int().view(num_sets, num_seqs, width).cuda())
        query = torch.randn(num_seqs, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        self.inputs = (query, k_cache, v_cache)
        self.lengths = lengths.int().cuda()

    def time(self, decode: Callable[..., object], **options: object) -> float:
        """Microseconds of one call of `decode`, inside a CUDA graph."""

        def run_all() -> None:
            for tables in self.tables:
                decode(*self.inputs, self.lengths, tables, SCALE, **options)

        run_all()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        return microseconds(graph.replay, len(self.tables))

    def report(self, name: object, us: float) -> str:
        """A line for a kernel that takes `us` microseconds."""
        rate = self.bytes / us / 1000
        return f"{name!s:<62}{us:>9.1f} us {rate:>7.0f} GB/s {rate / READ_GB_PER_S:>6.0%}"


def bench_decode(sweep: bool, flash: bool) -> None:
    """Print a line for each batch size and kernel.

    Args:
        sweep: try other tiles too, and print the best six.
        flash: time flash-attn too.
    """
    # 1 GiB each: a call at batch 256 reads nearly all of it, the smaller ones take turns.
    shape = (2 * 2**30 // (BLOCK_SIZE * TOKEN_BYTES), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    k_cache = torch.randn(shape, dtype=DTYPE, device="cuda")
    v_cache = torch.randn(shape, dtype=DTYPE, device="cuda")
    for num_seqs in (1, 4, 16, 64, 256):
        work = DecodeWork(num_seqs, k_cache, v_cache)
        print(f"\ndecode, batch {num_seqs}")
        chosen = decode_config(num_seqs, KV_HEADS, HEAD_DIM, DTYPE, k_cache.device, BLOCK_SIZE)
        print(work.report(chosen, work.time(paged_decode)))
        if flash:
            name = f"flash_attn {flash_attention.flash_attention_version()}"
            print(work.report(name, work.time(flash_attention.flash_decode)))
        if sweep:
            timed = []
            for block_n, num_warps, num_stages in DECODE_TILES:
                for num_splits in DECODE_SPLITS:
                    if 64 <= num_seqs * KV_HEADS * num_splits <= 8192:
                        config = DecodeConfig(block_n, num_splits, num_warps, num_stages)
                        timed.append((work.time(paged_decode, config=config), config))
            for us, config in sorted(timed)[:6]:
                print(work.report(config, us))


class PrefillWork:
    """Sequences of one length, with their K and V also in the cache."""

    def __init__(self, num_seqs: int, length: int):
        total = num_seqs * length
        qkv = torch.randn(total, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        cu_seqlens = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
        num_blocks = total // BLOCK_SIZE
        cache_shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        k_cache = k.reshape(cache_shape).contiguous()
        v_cache = v.reshape(cache_shape).contiguous()
        blocks = torch.arange(num_blocks, dtype=torch.int32, device="cuda")
        self.tables = blocks.view(num_seqs, -1)
        self.inputs = (q, k, v, k_cache, v_cache, cu_seqlens, cu_seqlens, length, length, SCALE)
        self.flops = 2 * 2 * HEADS * HEAD_DIM * num_seqs * length**2 / 2

    def report(self, name: object, prefill: Callable[..., object], *more: object) -> None:
        """Time a kernel and print a line; `more` are its further arguments."""
        try:
            us = microseconds(lambda: prefill(*self.inputs, *more))
            print(f"{name!s:<62}{us:>9.1f} us {self.flops / us / 1e6:>7.0f} TFLOP/s")
        except Exception as error:  # a configuration may ask for more shared memory than there is
            print(f"{name!s:<62} {type(error).__name__}: {str(error)[:60]}")


def bench_prefill(sweep: bool, flash: bool) -> None:
    """Print a line for each size and kernel; the arguments are those of `bench_decode`."""
    for num_seqs, length in ((16, 1024), (64, 2048)):
        work = PrefillWork(num_seqs, length)
        print(f"\nprefill, {num_seqs} sequences of {length}")
        chosen = prefill_config(HEAD_DIM, DTYPE, work.tables.device)
        work.report(chosen, varlen_prefill)
        work.report("  the same from the cache", varlen_prefill, work.tables)
        if flash:
            name = f"flash_attn {flash_attention.flash_attention_version()}"
            work.report(name, flash_attention.flash_prefill)
            work.report("  the same from the cache", flash_attention.flash_prefill, work.tables)
        for config in PREFILL_CONFIGS if sweep else ():
            work.report(config, varlen_prefill, None, config)


def main() -> None:
    """Time both kinds of attention."""
    parser = argparse.ArgumentParser(description="Time the attention kernels on a GPU.")
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes too")
    sweep = parser.parse_args().sweep
    if not torch.cuda.is_available():
        raise SystemExit("bench_attention.py needs a CUDA GPU")
    torch.manual_seed(0)
    try:
        flash_attention.check_flash_attention(BLOCK_SIZE, HEAD_DIM, DTYPE)
        flash = True
    except ValueError as error:
        print(error)
        flash = False
    print(torch.cuda.get_device_name())
    bench_decode(sweep, flash)
    bench_prefill(sweep, flash)


if __name__ == "__main__":
    main()
