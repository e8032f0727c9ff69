"""Batches that bench_attention.py times attention with, and how."""

from collections.abc import Callable

import numpy as np
import torch

from nanovllm.checkpoints.kv_scales import FP8
from nanovllm.kernels.prefix_groups import Groups, TileLimits, make_prefix_tiles
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.shared_prefix import PrefixConfig, shared_prefix_decode

# Qwen3-0.6B's attention
HEADS = 16
KV_HEADS = 8
HEAD_DIM = 128
DTYPE = torch.bfloat16
BLOCK_SIZE = 256
SCALE = HEAD_DIM**-0.5
READ_GB_PER_S = 4200


def token_bytes(cache: torch.Tensor) -> int:
    """The bytes of a token's K and V in one layer."""
    return 2 * KV_HEADS * HEAD_DIM * cache.itemsize


def scale_of(cache: torch.Tensor) -> float | None:
    """The scale of V, which an FP8 cache has."""
    return 1.0 if cache.dtype == FP8 else None


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


def random_cache(dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """K or V, 1 GiB in 16 bits: a call at batch 256 reads nearly all, smaller ones take turns."""
    block_bytes = BLOCK_SIZE * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    shape = (2**30 // block_bytes, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    return torch.randn(shape, dtype=DTYPE, device="cuda").to(dtype)


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
        options["v_scale"] = scale_of(self.inputs[1])

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
        rate = int(seen.sum()) * token_bytes(self.inputs[1]) / us / 1000
        return f"{name!s:<62}{us:>9.1f} us {rate:>7.0f} GB/s {rate / READ_GB_PER_S:>6.0%}"


class PrefillWork:
    """Sequences of one length, with their K and V also in the cache."""

    def __init__(self, num_seqs: int, length: int, cache_dtype: torch.dtype = DTYPE):
        total = num_seqs * length
        qkv = torch.randn(total, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        cu_seqlens = torch.arange(0, total + 1, length, dtype=torch.int32, device="cuda")
        num_blocks = total // BLOCK_SIZE
        cache_shape = (num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
        k_cache = k.reshape(cache_shape).contiguous().to(cache_dtype)
        v_cache = v.reshape(cache_shape).contiguous().to(cache_dtype)
        self.v_scale = scale_of(v_cache)
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
        options["v_scale"] = self.v_scale
        try:
            us = microseconds(lambda: prefill(*self.inputs, tables, window=window, **options))
            print(f"{name!s:<62}{us:>9.1f} us {flops / us / 1e6:>7.0f} TFLOP/s")
        except Exception as error:  # a configuration may ask for more shared memory than there is
            print(f"{name!s:<62} {type(error).__name__}: {str(error)[:60]}")


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
        num_read = int(self.suffix_lens.sum()) + prefix_reads * self.prefix
        read = num_read * token_bytes(self.caches[0])
        print(f"{name!s:<74}{us:>9.1f} us {read / us / 1000:>7.0f} GB/s", flush=True)

    def report_shared(self, tiles: PrefixConfig, num_tiles: int) -> None:
        """Print a line for one way of cutting the group."""
        prefixes = self.prefixes(tiles, num_tiles)
        name = f"  {tiles}, {len(prefixes.tiles)} tiles, {prefixes.max_parts} parts"

        def run(tables: torch.Tensor) -> object:
            return shared_prefix_decode(
                self.query,
                *self.caches,
                prefixes,
                tables,
                SCALE,
                v_scale=scale_of(self.caches[0]),
                tiles=tiles,
            )

        self.report(name, run, 1)
