"""Scheduler and BlockManager, with no model, through random loads: the invariants hold after every step.

What the model would do is simulated by a store that holds, for each cache slot, which prefix's K and V were
written there last. Whatever a sequence is about to attend to must be its own prefix, token for token.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass
from itertools import count
from unittest import mock

import pytest
from conftest import assert_idle, make_scheduler, make_sequence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence

EOS = 0


@dataclass(frozen=True)
class Request:
    arrival: int  # step before which it is added
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool


@dataclass(frozen=True)
class Load:
    """A cache, limits and requests. `sampled` is repeated for ever: the tokens the model "draws"."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    max_model_len: int
    enable_prefix_caching: bool
    requests: list[Request]
    sampled: list[int]


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Few token ids, and prompts cut from common beginnings, so that equal blocks are frequent.

    Hypothesis chooses the sizes; a seeded generator fills them in, since Hypothesis itself likes short
    lists of small numbers, which never fill a cache.
    """
    r = random.Random(draw(st.integers(0, 10**6)))
    block_size = draw(st.integers(1, 8))
    max_model_len = draw(st.integers(2, 48))
    smallest = -(-max_model_len // block_size)
    num_tokens = draw(st.integers(1, 4))
    eos_share = draw(st.sampled_from([0, 0.01, 0.1, 0.5]))

    def tokens(length: int) -> list[int]:
        return [EOS if r.random() < eos_share else r.randint(1, num_tokens) for _ in range(length)]

    beginnings = [tokens(max_model_len) for _ in range(draw(st.integers(1, 3)))]
    longest_prompt = draw(st.integers(1, max_model_len - 1))
    last_arrival = draw(st.sampled_from([0, 10, 60]))
    requests = []
    for _ in range(draw(st.integers(1, 16))):
        prompt = r.choice(beginnings)[: r.randint(0, longest_prompt)] + tokens(r.choice([0, 1, 5]))
        prompt = prompt[:longest_prompt] or tokens(1)
        max_tokens = r.randint(1, max_model_len - len(prompt))
        requests.append(Request(r.randint(0, last_arrival), prompt, max_tokens, r.random() < 0.5))
    return Load(
        block_size=block_size,
        num_blocks=smallest + draw(st.one_of(st.integers(0, 3), st.integers(0, 4 * smallest))),
        max_num_seqs=draw(st.integers(1, 10)),
        budget=draw(st.one_of(st.integers(1, 12), st.integers(12, 200))),
        max_model_len=max_model_len,
        enable_prefix_caching=draw(st.sampled_from([True, True, True, False])),
        requests=sorted(requests, key=lambda request: request.arrival),
        sampled=tokens(draw(st.integers(1, 40))),
    )


class Simulation:
    """Runs a load and checks every step."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.scheduler: Scheduler = make_scheduler(
            load.num_blocks,
            load.block_size,
            max_num_seqs=load.max_num_seqs,
            max_num_batched_tokens=load.budget,
            eos=EOS,
            enable_prefix_caching=load.enable_prefix_caching,
        )
        self.live: list[Sequence] = []  # in order of arrival
        self.requests: dict[int, Request] = {}
        self.admitted: list[int] = []  # ids, in order of the first admission
        self.finished: list[Sequence] = []
        self.prefixes: dict[
            tuple[int, int], int
        ] = {}  # (prefix, next token) -> prefix; equal exactly if equal
        self.prefix_of: dict[int, list[int]] = {}  # sequence id -> prefix that ends at each position
        self.store: dict[int, int] = {}  # slot -> prefix whose K and V it holds
        self.num_hits = 0

    def run(self) -> None:
        load = self.load
        arrivals, sampled = deque(load.requests), 0
        # A step either samples a token or computes a whole budget of the prompt at the head of the queue, and
        # nothing is preempted before that prompt is done.
        total = sum(request.max_tokens for request in load.requests)
        bound = 61 + total * (1 + -(-load.max_model_len // load.budget))
        for step in count():
            assert step <= bound, f"{bound} steps, and {len(self.live)} sequences are not finished"
            while arrivals and arrivals[0].arrival <= step:
                self.add(arrivals.popleft())
            if self.scheduler.is_finished():
                if not arrivals:
                    break
                continue
            sampled = self.step(sampled)
        assert len(self.finished) == len(load.requests)
        assert not self.live
        assert_idle(self.scheduler)

    def add(self, request: Request) -> None:
        seq = make_sequence(request.prompt, request.max_tokens, request.ignore_eos)
        self.live.append(seq)
        self.requests[seq.seq_id] = request
        self.scheduler.add(seq)

    def step(self, sampled: int) -> int:
        held = {seq.seq_id: list(seq.block_table) for seq in self.live if seq.block_table}
        computed = {seq.seq_id: seq.num_computed_tokens for seq in self.live}
        seqs, is_prefill = self.scheduler.schedule()
        self.check_limits(seqs, is_prefill)
        self.check_blocks()
        for seq in seqs:
            if seq.seq_id not in held:
                self.num_hits += seq.num_computed_tokens // self.load.block_size
            if seq.seq_id not in self.admitted:
                self.admitted.append(seq.seq_id)
        # Slots whose contents a sequence has computed (or found) in an earlier step, and will still read.
        kept = {
            self.slot(held[seq.seq_id], position)
            for seq in self.live
            if seq.seq_id in held and seq.block_table[: len(held[seq.seq_id])] == held[seq.seq_id]
            for position in range(computed[seq.seq_id])
        }
        self.write(seqs, kept)
        self.check_reads(seqs)
        drawn = [self.load.sampled[(sampled + i) % len(self.load.sampled)] for i in range(len(seqs))]
        self.postprocess(seqs, drawn)
        self.check_blocks()
        return sampled + len(seqs)

    def slot(self, block_table: list[int], position: int) -> int:
        block_size = self.load.block_size
        return block_table[position // block_size] * block_size + position % block_size

    def prefix(self, seq: Sequence, position: int) -> int:
        known = self.prefix_of.setdefault(seq.seq_id, [])
        while len(known) <= position:
            key = (known[-1] if known else -1, seq.token_ids[len(known)])
            known.append(self.prefixes.setdefault(key, len(self.prefixes)))
        return known[position]

    def write(self, seqs: list[Sequence], kept: set[int]) -> None:
        """What every layer does first: store the K and V of all scheduled tokens."""
        written: dict[int, int] = {}
        for seq in seqs:
            start = seq.num_computed_tokens
            for position in range(start, start + seq.num_scheduled_tokens):
                slot = self.slot(seq.block_table, position)
                assert slot not in written, f"two tokens write slot {slot} in one step"
                assert slot not in kept, f"slot {slot}, which somebody reads, is written again"
                written[slot] = self.prefix(seq, position)
        self.store.update(written)

    def check_reads(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            for position in range(seq.num_computed_tokens + seq.num_scheduled_tokens):
                slot = self.slot(seq.block_table, position)
                assert self.store.get(slot) == self.prefix(seq, position), (
                    f"position {position} reads slot {slot}"
                )

    def check_limits(self, seqs: list[Sequence], is_prefill: bool) -> None:
        load, scheduler = self.load, self.scheduler
        assert seqs and len(set(map(id, seqs))) == len(seqs)
        for seq in seqs:
            assert seq.num_scheduled_tokens >= 1
            assert seq.num_computed_tokens + seq.num_scheduled_tokens <= seq.num_tokens
            assert (
                len(seq.block_table) * load.block_size >= seq.num_tokens
            )  # all of the prompt, chunked or not
            if not is_prefill:
                assert seq.num_scheduled_tokens == 1 and seq.is_sampled
        if is_prefill:
            assert sum(seq.num_scheduled_tokens for seq in seqs) <= load.budget
            assert all(seq.is_sampled for seq in seqs[:-1])  # one chunk at most, and it comes last
        assert len(scheduler.running) <= load.max_num_seqs and len(seqs) <= load.max_num_seqs
        if not load.enable_prefix_caching:
            assert all(seq.num_cached_tokens == 0 for seq in seqs)

    def check_blocks(self) -> None:
        manager = self.scheduler.block_manager
        holders = Counter(block_id for seq in self.live for block_id in seq.block_table)
        for seq in self.live:
            assert len(set(seq.block_table)) == len(seq.block_table)
        assert [block.ref_count for block in manager.blocks] == [
            holders[i] for i in range(len(manager.blocks))
        ]
        free = list(manager.free_block_ids)
        assert sorted(free) == [i for i in range(len(manager.blocks)) if not holders[i]]
        assert len(manager.cached_blocks) <= len(manager.blocks)  # nothing is left of what was evicted
        # First come, first served; a preempted sequence goes back to where it was.
        queued = [seq.seq_id for seq in (*self.scheduler.running, *self.scheduler.waiting)]
        assert queued == [seq.seq_id for seq in self.live]
        assert self.admitted == sorted(self.admitted)

    def postprocess(self, seqs: list[Sequence], drawn: list[int]) -> None:
        before = {seq.seq_id: list(seq.token_ids) for seq in seqs}
        takes = {
            seq.seq_id: seq.num_computed_tokens + seq.num_scheduled_tokens == seq.num_tokens for seq in seqs
        }
        finished = self.scheduler.postprocess(seqs, drawn)
        expected = []
        for seq, token in zip(seqs, drawn):
            request = self.requests[seq.seq_id]
            assert seq.token_ids == before[seq.seq_id] + [token] * takes[seq.seq_id]
            assert seq.num_tokens == len(seq.token_ids) and seq.num_prompt_tokens == len(request.prompt)
            if not takes[seq.seq_id]:
                continue
            assert seq.completion_token_ids == seq.token_ids[len(request.prompt) :]
            if token == EOS and not request.ignore_eos:
                expected.append((seq, "stop"))
            elif len(seq.completion_token_ids) == request.max_tokens:
                expected.append((seq, "length"))
        assert [(seq, seq.finish_reason) for seq in finished] == expected
        assert all(seq.is_finished and not seq.block_table for seq in finished)
        self.finished += finished
        self.live = [seq for seq in self.live if seq not in finished]


property_test = settings(
    max_examples=1500, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@property_test
@given(loads())
def test_invariants_hold_after_every_step(load: Load) -> None:
    Simulation(load).run()


@pytest.mark.parametrize(
    "weak_hash",
    [
        lambda token_ids, previous_key=None: 7,
        lambda token_ids, previous_key=None: sum(token_ids) % 3,
        lambda token_ids, previous_key=None: (sum(token_ids) + (previous_key or 0)) % 4,
    ],
    ids=["constant", "sum", "chained"],
)
@settings(parent=property_test, max_examples=500)
@given(load=loads())
def test_a_hash_collision_never_returns_another_prompts_cache(weak_hash: object, load: Load) -> None:
    with mock.patch.object(BlockManager, "compute_hash", staticmethod(weak_hash)):
        Simulation(load).run()


def test_the_loads_reach_what_they_are_meant_to_reach() -> None:
    """Else the properties above could hold because nothing happens."""
    seen: Counter[str] = Counter()

    @settings(parent=property_test, max_examples=60)
    @given(loads())
    def explore(load: Load) -> None:
        simulation = Simulation(load)
        simulation.run()
        seen["preemptions"] += simulation.scheduler.num_preemptions > 2
        seen["hits"] += simulation.num_hits > 2
        seen["chunks"] += load.budget < max(len(request.prompt) for request in load.requests)
        seen["eos"] += any(seq.finish_reason == "stop" for seq in simulation.finished)
        seen["shared"] += simulation.num_hits > 2 and simulation.scheduler.num_preemptions > 2

    explore()
    assert all(seen[event] >= 5 for event in ("preemptions", "hits", "chunks", "eos", "shared")), seen


def test_the_only_running_sequence_is_not_preempted() -> None:
    """It needs every block of the cache, and gets them one by one from the others."""
    load = Load(
        block_size=2, num_blocks=6, max_num_seqs=8, budget=100, max_model_len=12, enable_prefix_caching=True,
        requests=[Request(0, [1, 2, i], 9, True) for i in range(4)], sampled=[1, 2, 3],
    )  # fmt: skip
    simulation = Simulation(load)
    simulation.run()
    assert simulation.scheduler.num_preemptions >= 3
    assert [seq.seq_id for seq in simulation.finished] == simulation.admitted
