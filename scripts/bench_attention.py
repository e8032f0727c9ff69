"""Time the attention kernels on a GPU, alone.

    python scripts/bench_attention.py [--sweep]      # --sweep tries other tiles too
    python scripts/bench_attention.py --window 512 1024 [--context 8192]      # sliding windows only
    python scripts/bench_attention.py --shared-prefix 256 2048 [--sweep]      # groups in decode

Decode runs inside a CUDA graph, as in the engine, over sequences of 920 tokens on average. It is
limited by reading K and V: GB/s, against the 4.2 TB/s that an H200 reads. Calls in a row read
different blocks, more than the L2 cache holds. Prefill is limited by arithmetic: TFLOP/s of the
causal half, against 790. With windows both are counted for what the window holds, beside the same
attention without a window and (decode) with no more context than the window. Groups that share a
prefix are timed beside the same sequences without the group; their GB/s count what they share once.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from nanovllm.kernels import flash_attention
from nanovllm.kernels.paged_decode import DecodeConfig, decode_config, paged_decode
from nanovllm.kernels.prefill_config import PrefillConfig, prefill_config
from nanovllm.kernels.prefix_groups import Groups, TileLimits, make_prefix_tiles
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.shared_prefix import (
    PrefixConfig,
    prefix_config,
    shared_prefix_decode,
)
from nanovllm.kernels.varlen_prefill import varlen_prefill

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
PREFIX_CONFIGS = (
    PrefixConfig(16, 64, 4, 3),
    PrefixConfig(32, 64, 4, 3),
    PrefixConfig(64, 64, 4, 2),
    PrefixConfig(64, 64, 4, 4),
    PrefixConfig(64, 128, 4, 2),
    PrefixConfig(128, 64, 8, 3),
    PrefixConfig(128, 64, 4, 3),
    PrefixConfig(128, 128, 8, 2),
)
PREFIX_TILES = (8, 16, 32)  # so many a KV head, together for all groups
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

    def __init__(self, lengths: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor):
        num_seqs = len(lengths)
        width = -(-max(2048, int(lengths.max())) // BLOCK_SIZE)  # of a block table
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

    def report(self, name: object, us: float, window: int | None = None) -> str:
        """A line for a kernel that takes `us` microseconds."""
        seen = self.lengths if window is None else self.lengths.clamp(max=window)
        rate = int(seen.sum()) * TOKEN_BYTES / us / 1000
        return f"{name!s:<62}{us:>9.1f} us {rate:>7.0f} GB/s {rate / READ_GB_PER_S:>6.0%}"


def random_cache() -> torch.Tensor:
    """K or V, 1 GiB: a call at batch 256 reads nearly all of it, the smaller ones take turns."""
    shape = (2 * 2**30 // (BLOCK_SIZE * TOKEN_BYTES), BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return torch.randn(shape, dtype=DTYPE, device="cuda")


def bench_decode(sweep: bool, flash: bool) -> None:
    """Print a line for each batch size and kernel.

    Args:
        sweep: try other tiles too, and print the best six.
        flash: time flash-attn too.
    """
    k_cache = random_cache()
    v_cache = random_cache()
    for num_seqs in (1, 4, 16, 64, 256):
        lengths = torch.tensor([920])
        if num_seqs > 1:
            lengths = torch.randint(200, 1641, (num_seqs,))
        work = DecodeWork(lengths, k_cache, v_cache)
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
        self.num_seqs = num_seqs
        self.length = length

    def report(
        self,
        name: object,
        prefill: Callable[..., object],
        tables: torch.Tensor | None = None,
        window: int | None = None,
        **options: object,
    ) -> None:
        """Time a kernel and print a line; the keywords are its further arguments."""
        seen = min(window or self.length, self.length)  # by a query that is not among the first
        pairs = self.num_seqs * (self.length * seen - seen**2 / 2)  # of a query and a key
        flops = 2 * 2 * HEADS * HEAD_DIM * pairs
        try:
            us = microseconds(lambda: prefill(*self.inputs, tables, window=window, **options))
            print(f"{name!s:<62}{us:>9.1f} us {flops / us / 1e6:>7.0f} TFLOP/s")
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
            work.report(config, varlen_prefill, config=config)


def bench_windows(windows: list[int], context: int, flash: bool) -> None:
    """Print what attention costs in a long context, with each window and without one.

    Args:
        windows: in tokens.
        context: tokens of each sequence, a multiple of the block size.
        flash: time flash-attn too.
    """
    decodes: dict[str, Callable[..., object]] = {"triton": paged_decode}
    prefills: dict[str, Callable[..., object]] = {"triton": varlen_prefill}
    if flash:
        decodes["flash_attn"] = flash_attention.flash_decode
        prefills["flash_attn"] = flash_attention.flash_prefill
    k_cache = random_cache()
    v_cache = random_cache()
    for num_seqs in (1, 16, 64):
        print(f"\ndecode, batch {num_seqs}, context {context}")
        work = DecodeWork(torch.full((num_seqs,), context), k_cache, v_cache)
        for name, decode in decodes.items():
            print(work.report(f"{name}, no window", work.time(decode)))
            for window in windows:
                us = work.time(decode, window=window)
                print(work.report(f"{name}, window {window}", us, window))
        for window in windows:
            short = DecodeWork(torch.full((num_seqs,), window), k_cache, v_cache)
            us = short.time(paged_decode)
            print(short.report(f"triton, no window, context {window} only", us))
    for num_seqs in (1, 8):
        print(f"\nprefill, {num_seqs} sequences of {context}")
        prompts = PrefillWork(num_seqs, context)
        for name, prefill in prefills.items():
            for window in (None, *windows):
                prompts.report(f"{name}, window {window}", prefill, window=window)
                prompts.report("  the same from the cache", prefill, prompts.tables, window)


class SharedWork:
    """Sequences of which each has `prefix` tokens in common with all, and some of its own."""

    def __init__(self, members: int, prefix: int, k_cache: torch.Tensor, v_cache: torch.Tensor):
        self.members = members
        self.prefix_blocks = prefix // BLOCK_SIZE
        self.suffix_lens = torch.randint(129, 192, (members,)).int().cuda()
        self.prefix = prefix
        self.caches = (k_cache, v_cache)
        blocks_in_set = self.prefix_blocks + members
        num_sets = max(1, min(32, len(k_cache) // blocks_in_set))
        blocks = torch.randperm(len(k_cache))[: num_sets * blocks_in_set].int().cuda()
        self.tables = []
        for own in blocks.view(num_sets, blocks_in_set):
            table = torch.empty(self.prefix_blocks + 1, members, dtype=torch.int32, device="cuda")
            table[:-1] = own[: self.prefix_blocks, None]
            table[-1] = own[self.prefix_blocks :]
            self.tables.append(table.t())
        self.query = torch.randn(members, HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")

    def prefixes(self, tiles: PrefixConfig, num_tiles: int) -> SharedPrefixes:
        """One group of all sequences."""
        groups = Groups(
            members=np.arange(self.members),
            num_members=np.array([self.members]),
            prefix_blocks=np.array([self.prefix_blocks]),
        )
        members = tiles.block_m * KV_HEADS // HEADS
        limits = TileLimits(members, tiles.block_n, tiles.block_n, 32, num_tiles)
        made, num_parts = make_prefix_tiles(groups, BLOCK_SIZE, limits)
        zeros = torch.zeros_like(self.suffix_lens)
        return SharedPrefixes(
            tiles=torch.from_numpy(made).cuda(),
            members=torch.arange(self.members, dtype=torch.int32, device="cuda"),
            prefix_lens=zeros + self.prefix,
            num_parts=zeros + int(num_parts[0]),
            suffix_lens=self.suffix_lens,
            max_parts=int(num_parts[0]),
        )

    def report(
        self, name: object, run: Callable[[torch.Tensor], object], prefix_reads: int
    ) -> None:
        """Print a line for `run(block_tables)`, inside a CUDA graph."""

        def run_all() -> None:
            for tables in self.tables:
                run(tables)

        run_all()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        us = microseconds(graph.replay, len(self.tables))
        read = (int(self.suffix_lens.sum()) + prefix_reads * self.prefix) * TOKEN_BYTES
        print(f"{name!s:<74}{us:>9.1f} us {read / us / 1000:>7.0f} GB/s", flush=True)

    def report_shared(self, tiles: PrefixConfig, num_tiles: int) -> None:
        """Print a line for one way of cutting the group."""
        prefixes = self.prefixes(tiles, num_tiles)
        name = f"  {tiles}, {len(prefixes.tiles)} tiles, {prefixes.max_parts} parts"

        def run(tables: torch.Tensor) -> object:
            return shared_prefix_decode(
                self.query, *self.caches, prefixes, tables, SCALE, tiles=tiles
            )

        self.report(name, run, 1)


def bench_shared_prefixes(lengths: list[int], sweep: bool) -> None:
    """Print what a group costs, for each number of members and length of prefix."""
    k_cache = random_cache()
    v_cache = random_cache()
    chosen = prefix_config(HEAD_DIM, DTYPE, k_cache.device, BLOCK_SIZE)
    for members in (4, 8, 16, 32, 64, 128, 256):
        for prefix in lengths:
            work = SharedWork(members, prefix, k_cache, v_cache)
            context_lens = work.suffix_lens + prefix

            def plain(
                tables: torch.Tensor,
                work: SharedWork = work,
                context_lens: torch.Tensor = context_lens,
            ) -> object:
                return paged_decode(work.query, *work.caches, context_lens, tables, SCALE)

            print(f"\n{members} members, prefix {prefix}")
            work.report("without a group", plain, members)
            for tiles in PREFIX_CONFIGS if sweep else (chosen,):
                for num_tiles in PREFIX_TILES:
                    work.report_shared(tiles, num_tiles)


def main() -> None:
    """Time both kinds of attention."""
    parser = argparse.ArgumentParser(description="Time the attention kernels on a GPU.")
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes too")
    parser.add_argument("--window", type=int, nargs="+", help="time these sliding windows only")
    parser.add_argument("--context", type=int, default=8192, help="of the windows; default 8192")
    parser.add_argument(
        "--shared-prefix", type=int, nargs="+", help="time groups with prefixes of so many tokens"
    )
    args = parser.parse_args()
    if any(length % BLOCK_SIZE for length in args.shared_prefix or ()):
        parser.error(f"--shared-prefix must be multiples of {BLOCK_SIZE}: {args.shared_prefix}")
    if args.context % BLOCK_SIZE:
        parser.error(f"--context must be a multiple of {BLOCK_SIZE}, not {args.context}")
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
    if args.window:
        bench_windows(args.window, args.context, flash)
        return
    if args.shared_prefix:
        bench_shared_prefixes(args.shared_prefix, args.sweep)
        return
    bench_decode(args.sweep, flash)
    bench_prefill(args.sweep, flash)


if __name__ == "__main__":
    main()
