"""Time the attention kernels on a GPU, alone.

    python scripts/bench_attention.py [--sweep]      # --sweep tries other tiles too
    python scripts/bench_attention.py --window 512 1024 [--context 8192]      # sliding windows only
    python scripts/bench_attention.py --shared-prefix 256 2048 [--sweep]      # groups in decode
    python scripts/bench_attention.py --fp8 [--sweep] [--shared-prefix 2048]  # FP8 caches, too

Decode runs inside a CUDA graph, as in the engine, over sequences of 920 tokens on average. It is
limited by reading K and V: GB/s, against the 4.2 TB/s that an H200 reads. Calls in a row read
different blocks, more than the L2 cache holds. Prefill is limited by arithmetic: TFLOP/s of the
causal half, against 790. With windows both are counted for what the window holds, beside the same
attention without a window and (decode) with no more context than the window. Groups that share a
prefix are timed beside the same sequences without the group; their GB/s count what they share once.
With an FP8 cache GB/s count its bytes, so that half the time at the same rate is what can be had.
"""

import argparse
from collections.abc import Callable

import torch

from attention_work import (
    BLOCK_SIZE,
    DTYPE,
    HEAD_DIM,
    KV_HEADS,
    SCALE,
    DecodeWork,
    PrefillWork,
    SharedWork,
    random_cache,
    scale_of,
)
from nanovllm.checkpoints.kv_scales import FP8
from nanovllm.kernels import flash_attention
from nanovllm.kernels.paged_decode import DecodeConfig, decode_config, paged_decode
from nanovllm.kernels.prefill_config import PrefillConfig, prefill_config
from nanovllm.kernels.shared_prefix import PrefixConfig, prefix_config
from nanovllm.kernels.varlen_prefill import varlen_prefill

# What --sweep tries.
DECODE_TILES = (  # block_n, num_warps, num_stages, max_registers
    (128, 4, 3, None),
    (128, 4, 2, 128),
    (64, 4, 3, None),
    (64, 4, 4, None),
    (64, 4, 3, 128),
    (64, 2, 3, None),
    (32, 4, 3, None),
    (32, 4, 3, 128),
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


def bench_decode(sweep: bool, flash: bool, cache_dtype: torch.dtype = DTYPE) -> None:
    """Print a line for each batch size and kernel.

    Args:
        sweep: try other tiles too, and print the best six.
        flash: time flash-attn too.
        cache_dtype: of K and V.
    """
    k_cache = random_cache(cache_dtype)
    v_cache = random_cache(cache_dtype)
    for num_seqs in (1, 4, 16, 64, 256):
        lengths = torch.tensor([920])
        if num_seqs > 1:
            lengths = torch.randint(200, 1641, (num_seqs,))
        work = DecodeWork(lengths, k_cache, v_cache)
        print(f"\ndecode, batch {num_seqs}, cache in {cache_dtype}")
        chosen = decode_config(
            num_seqs,
            KV_HEADS,
            HEAD_DIM,
            DTYPE,
            k_cache.device,
            BLOCK_SIZE,
            cache_dtype=cache_dtype,
        )
        print(work.report(chosen, work.time(paged_decode)))
        if flash:
            name = f"flash_attn {flash_attention.flash_attention_version()}"
            print(work.report(name, work.time(flash_attention.flash_decode)))
        if sweep:
            timed = []
            for block_n, *resources in DECODE_TILES:
                for num_splits in DECODE_SPLITS:
                    if 64 <= num_seqs * KV_HEADS * num_splits <= 8192:
                        config = DecodeConfig(block_n, num_splits, *resources)
                        timed.append((work.time(paged_decode, config=config), config))
            for us, config in sorted(timed)[:6]:
                print(work.report(config, us))


def bench_prefill(sweep: bool, flash: bool, cache_dtype: torch.dtype = DTYPE) -> None:
    """Print a line for each size and kernel; the arguments are those of `bench_decode`."""
    for num_seqs, length in ((16, 1024), (64, 2048)):
        work = PrefillWork(num_seqs, length, cache_dtype)
        print(f"\nprefill, {num_seqs} sequences of {length}, cache in {cache_dtype}")
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


def bench_shared_prefixes(
    lengths: list[int], sweep: bool, cache_dtype: torch.dtype = DTYPE
) -> None:
    """Print what a group costs, for each number of members and length of prefix."""
    k_cache = random_cache(cache_dtype)
    v_cache = random_cache(cache_dtype)
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
                v_scale = scale_of(work.caches[0])
                return paged_decode(
                    work.query, *work.caches, context_lens, tables, SCALE, v_scale=v_scale
                )

            print(f"\n{members} members, prefix {prefix}, cache in {cache_dtype}")
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
    parser.add_argument("--fp8", action="store_true", help="time FP8 caches, too")
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
    for cache_dtype in (DTYPE, FP8) if args.fp8 else (DTYPE,):
        if args.shared_prefix:
            bench_shared_prefixes(args.shared_prefix, args.sweep, cache_dtype)
            continue
        flash = flash and cache_dtype == DTYPE
        bench_decode(args.sweep, flash, cache_dtype)
        bench_prefill(args.sweep, flash, cache_dtype)


if __name__ == "__main__":
    main()
