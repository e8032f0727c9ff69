"""Time the attention kernels on a GPU, alone: `python scripts/bench_attention.py [--sweep]`.

Decode runs inside a CUDA graph, as in the engine, over sequences of 920 tokens on average, and is limited by
reading K and V: GB/s, against the 4.2 TB/s that an H200 reads. Calls in a row read different blocks, more
than the L2 cache holds. Prefill is limited by arithmetic: TFLOP/s of the causal half, against 790. `--sweep`
tries other tiles.
"""

import argparse
from collections.abc import Callable

import torch

from nanovllm.kernels import flash_attention
from nanovllm.kernels.paged_decode import DecodeConfig, decode_config, paged_decode
from nanovllm.kernels.varlen_prefill import PrefillConfig, prefill_config, varlen_prefill

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, DTYPE = 16, 8, 128, 256, torch.bfloat16  # Qwen3-0.6B
SCALE = HEAD_DIM**-0.5
TOKEN_BYTES = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
READ_GB_PER_S = 4200


def microseconds(run: Callable[[], object], calls: int = 1, repeats: int = 10) -> float:
    """Time of one call when `run` makes `calls` of them: the best of three rounds of `repeats`."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
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
    """One batch size, and enough sets of block tables that no call finds its blocks in the L2 cache."""

    def __init__(self, num_seqs: int, k_cache: torch.Tensor, v_cache: torch.Tensor):
        lengths = torch.randint(200, 1641, (num_seqs,)) if num_seqs > 1 else torch.tensor([920])
        self.bytes = int(lengths.sum()) * TOKEN_BYTES
        width = 2048 // BLOCK_SIZE
        num_sets = max(2, min(64, len(k_cache) // (num_seqs * width)))
        blocks = torch.cat([torch.randperm(len(k_cache)) for _ in range(2)])[
            : num_sets * num_seqs * width
        ]
        self.tables = list(blocks.int().view(num_sets, num_seqs, width).cuda())
        self.inputs = (
            torch.randn(num_seqs, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda"),
            k_cache,
            v_cache,
        )
        self.lengths = lengths.int().cuda()

    def time(self, decode: Callable, **options: object) -> float:
        def run_all():
            for tables in self.tables:
                decode(*self.inputs, self.lengths, tables, SCALE, **options)

        run_all()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        return microseconds(graph.replay, len(self.tables))

    def report(self, name: object, us: float) -> str:
        rate = self.bytes / us / 1000
        return f"{name!s:<62}{us:>9.1f} us {rate:>7.0f} GB/s {rate / READ_GB_PER_S:>6.0%}"


def bench_decode(sweep: bool, flash: bool) -> None:
    # 1 GiB each: a call at batch 256 reads nearly all of it, the smaller ones take turns.
    shape = (2 * 2**30 // (BLOCK_SIZE * TOKEN_BYTES), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.randn(shape, dtype=DTYPE, device="cuda") for _ in range(2))
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
            for block_n, num_warps, num_stages in [
                (128, 4, 3),
                (64, 4, 3),
                (64, 4, 4),
                (64, 2, 3),
                (32, 4, 3),
            ]:
                for num_splits in (1, 2, 4, 8, 16, 32):
                    if 64 <= num_seqs * KV_HEADS * num_splits <= 8192:
                        config = DecodeConfig(block_n, num_splits, num_warps, num_stages)
                        timed.append((work.time(paged_decode, config=config), config))
            for us, config in sorted(timed)[:6]:
                print(work.report(config, us))


def bench_prefill(sweep: bool, flash: bool) -> None:
    others = [
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 2),
        (128, 64, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
    ]
    for num_seqs, length in ((16, 1024), (64, 2048)):
        total = num_seqs * length
        qkv = torch.randn(total, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        qkv = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        sums = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
        num_blocks = total // BLOCK_SIZE
        caches = [
            x.reshape(num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM).contiguous() for x in qkv[1:]
        ]
        tables = torch.arange(num_blocks, dtype=torch.int32, device="cuda").view(num_seqs, -1)
        args = (*qkv, *caches, sums, sums, length, length, SCALE)
        flops = 2 * 2 * HEADS * HEAD_DIM * num_seqs * length**2 / 2

        def report(name: object, prefill: Callable, *more: object) -> None:
            try:
                us = microseconds(lambda: prefill(*args, *more))
                print(f"{name!s:<62}{us:>9.1f} us {flops / us / 1e6:>7.0f} TFLOP/s")
            except (
                Exception
            ) as error:  # a configuration may ask for more shared memory than there is
                print(f"{name!s:<62} {type(error).__name__}: {str(error)[:60]}")

        print(f"\nprefill, {num_seqs} sequences of {length}")
        report(prefill_config(HEAD_DIM, DTYPE, sums.device), varlen_prefill)
        report("  the same from the cache", varlen_prefill, tables)
        if flash:
            report(
                f"flash_attn {flash_attention.flash_attention_version()}",
                flash_attention.flash_prefill,
            )
            report("  the same from the cache", flash_attention.flash_prefill, tables)
        for config in others if sweep else []:
            report(PrefillConfig(*config), varlen_prefill, None, PrefillConfig(*config))


def main() -> None:
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
