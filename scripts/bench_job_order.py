"""How many prompt tokens are computed if the prefixes of a job do not fit into the cache together?

    python scripts/bench_job_order.py

Drives Scheduler and BlockManager, with no model and made-up tokens, through a job of many prefixes
that take turns, once in the order of the prompts and once in the order in which `generate` queues
them. The cache holds a few of the prefixes.
"""

import argparse
import random
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace

from nanovllm import SamplingParams
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sharing.job_order import job_order

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Job:
    """Prompts that begin with one of a few prefixes and end with tokens of their own."""

    num_prefixes: int = 40
    num_members: int = 25  # of each prefix
    prefix_blocks: int = 32
    own_tokens: int = 24
    max_tokens: int = 40  # half of it at least, for each sequence
    cached_prefixes: int = 3  # that the cache has room for

    def requests(self) -> list[list[Sequence]]:
        """The sequences of each request; members of all prefixes take turns."""
        r = random.Random(0)
        prefixes = [r.choices(range(1000), k=self.prefix_tokens) for _ in range(self.num_prefixes)]
        requests = []
        for _ in range(self.num_members):
            for prefix in prefixes:
                own = r.choices(range(1000), k=self.own_tokens)
                max_tokens = r.randint(self.max_tokens // 2, self.max_tokens)
                params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
                requests.append([Sequence([*prefix, *own], params)])
        return requests

    @property
    def prefix_tokens(self) -> int:
        return self.prefix_blocks * BLOCK_SIZE

    @property
    def fewest_tokens(self) -> int:
        """The prompt tokens that must be computed: each prefix once, and what is each one's own."""
        own = self.num_members * self.own_tokens
        return self.num_prefixes * (self.prefix_tokens + own)

    def config(self) -> SimpleNamespace:
        """The fields of Config that scheduler and job order read."""
        return SimpleNamespace(
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            eos=-1,
            num_kvcache_blocks=self.cached_prefixes * self.prefix_blocks + 16 * 4,
            kvcache_block_size=BLOCK_SIZE,
            enable_prefix_caching=True,
        )


@dataclass(frozen=True)
class Outcome:
    """What a job took."""

    computed_tokens: int  # in prefill steps
    num_steps: int
    num_preemptions: int


def run(requests: Iterable[list[Sequence]], config: SimpleNamespace) -> Outcome:
    """Schedule the requests, queued in this order, to their end."""
    scheduler = Scheduler(config)
    for seqs in requests:
        for seq in seqs:
            scheduler.add(seq)
    computed_tokens = 0
    num_steps = 0
    while not scheduler.is_finished():
        step = scheduler.schedule()
        assert step is not None
        computed_tokens += step.num_tokens * step.is_prefill
        num_steps += 1
        scheduler.postprocess(step, [0] * len(step.seqs))
    return Outcome(computed_tokens, num_steps, scheduler.counters["preemptions"])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    job = Job()
    config = job.config()
    as_they_come = run(job.requests(), config)
    ordered = run(job_order(job.requests(), config), config)
    print(
        f"{job.num_prefixes} prefixes of {job.prefix_tokens} tokens, {job.num_members} prompts "
        f"each, a cache for {job.cached_prefixes} prefixes; at least {job.fewest_tokens:,} prompt "
        "tokens have to be computed"
    )
    for name, outcome in (("as they come", as_they_come), ("job order", ordered)):
        print(
            f"{name:12}: {outcome.computed_tokens:>9,} prompt tokens computed, "
            f"{outcome.num_steps:,} steps, {outcome.num_preemptions} preemptions"
        )


if __name__ == "__main__":
    main()
