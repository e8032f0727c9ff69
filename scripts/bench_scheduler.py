"""Does the host cost of scheduling grow with the cache? It must not.

    python scripts/bench_scheduler.py

Drives Scheduler and BlockManager, with no model and made-up tokens, through the same decode steps
over a cache of 1,000 and one of 1,000,000 blocks. Both are full of old prefixes, so that every new
block evicts one; blocks are small, so that every step needs new ones. Exits with 1 if a step over
the large cache takes 1.5 times as long as one over the small cache, or longer.
"""

import argparse
import random
import statistics
import sys
import time
from types import SimpleNamespace

from nanovllm import SamplingParams
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

SIZES = (1_000, 1_000_000)
BLOCK_SIZE = 4
NUM_SEQS = 40
OUTPUT_LEN = 64
# Four lengths in turn, so that in each step a quarter of the sequences need a block.
PROMPT_LENS = [13 + i % BLOCK_SIZE for i in range(NUM_SEQS)]
LIMIT = 1.5


def make_scheduler(num_blocks: int) -> Scheduler:
    """A scheduler over a cache of that many blocks; it reads these fields of Config, no others."""
    return Scheduler(
        SimpleNamespace(
            max_num_seqs=NUM_SEQS,
            max_num_batched_tokens=16384,
            eos=-1,
            num_kvcache_blocks=num_blocks,
            kvcache_block_size=BLOCK_SIZE,
            enable_prefix_caching=True,
        )
    )


def prefill(scheduler: Scheduler, prompts: list[list[int]], output_len: int) -> None:
    """Add the prompts and compute all of them; each then has its first token."""
    for prompt in prompts:
        scheduler.add(Sequence(prompt, SamplingParams(max_tokens=output_len, ignore_eos=True)))
    while scheduler.waiting:
        step = scheduler.schedule()
        assert step is not None and step.is_prefill
        scheduler.postprocess(step, [0] * len(step.seqs))


def fill(scheduler: Scheduler, num_blocks: int, r: random.Random) -> None:
    """Leave old contents in every block of the cache."""
    chunk = min(num_blocks, 1_000)  # blocks a prompt
    for _ in range(num_blocks // chunk):
        prefill(scheduler, [list(r.randbytes(chunk * BLOCK_SIZE))], output_len=1)
    cached = len(scheduler.block_manager.cached_blocks)
    assert cached > 0.99 * num_blocks, f"only {cached} of {num_blocks} blocks have contents"


def decode_step(scheduler: Scheduler, tokens: list[int]) -> float:
    """Seconds that one decode step costs the host."""
    start = time.perf_counter()
    step = scheduler.schedule()
    assert step is not None
    scheduler.postprocess(step, tokens)
    elapsed = time.perf_counter() - start
    assert len(step.seqs) == NUM_SEQS, (
        f"{len(step.seqs)} sequences ran, not {NUM_SEQS}: the caches' work differs"
    )
    return elapsed


def measure(rounds: int) -> tuple[float, float]:
    """Seconds per decode step for each of SIZES: the best round's median, the two taken in turn."""
    r = random.Random(0)
    schedulers = [make_scheduler(size) for size in SIZES]
    for scheduler, size in zip(schedulers, SIZES, strict=True):
        fill(scheduler, size, r)
    best = [float("inf")] * len(SIZES)
    for _ in range(rounds):
        prompts = [list(r.randbytes(n)) for n in PROMPT_LENS]
        for scheduler in schedulers:
            prefill(scheduler, prompts, OUTPUT_LEN)
        times: list[list[float]] = [[] for _ in SIZES]
        for _ in range(OUTPUT_LEN - 1):
            tokens = list(r.randbytes(NUM_SEQS))
            for scheduler, samples in zip(schedulers, times, strict=True):
                samples.append(decode_step(scheduler, tokens))
        assert all(scheduler.is_finished() for scheduler in schedulers)
        for index, samples in enumerate(times):
            best[index] = min(best[index], statistics.median(samples))
    return best[0], best[1]


def main() -> None:
    """Measure, print, and exit with 1 if the ratio is too high."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=20, help="of 63 decode steps (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it must be at least 1")
    small, large = measure(args.rounds)
    for size, seconds in zip(SIZES, (small, large), strict=True):
        print(f"{size:>9,} blocks: {seconds * 1e6:7.1f} us per decode step of {NUM_SEQS} sequences")
    print(f"Ratio: {large / small:.3f} (must be below {LIMIT})")
    if large / small >= LIMIT:
        sys.exit(1)


if __name__ == "__main__":
    main()
