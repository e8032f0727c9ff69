"""Scheduler and BlockManager, with no model, through random loads: every step keeps the invariants.

What the device would do is simulated by a store that holds, for each cache slot, which prefix's K
and V were written there last, and by each row's newest token. Whatever a sequence is about to
attend to must be its own prefix, token for token. A device executes steps in the order in which
they are launched, so all this is done as soon as a step is scheduled; the scheduler learns the
sampled tokens `lag` steps later, as LLMEngine.step tells it. The simulation knows them in advance:
the token at each position of a request is fixed by its load, so every lag must give the same
results.
"""

import os
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from unittest import mock

import pytest
from conftest import assert_idle, make_scheduler, make_sequence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler, Step
from nanovllm.engine.sequence import Sequence

EOS = 0
MAX_LAG = 2


@dataclass(frozen=True)
class Request:
    arrival: int  # step before which it is added
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    is_sibling: bool = False  # whether it is one more completion of the request before it


@dataclass(frozen=True)
class Load:
    """A cache, limits and requests. `sampled`, repeated for ever, is what the model "draws"."""

    block_size: int
    num_blocks: int
    max_num_seqs: int
    budget: int
    max_model_len: int
    enable_prefix_caching: bool
    requests: list[Request]
    sampled: list[int]

    def tokens(self, index: int) -> list[int]:
        """What request `index` would come to if nothing ended it.

        Steps that are launched beyond its end draw from what follows there.

        Requests take `sampled` from one of three places, so that equal prompts may complete alike.
        """
        prompt = self.requests[index].prompt
        sampled = [
            self.sampled[(i + index % 3) % len(self.sampled)]
            for i in range(self.max_model_len + MAX_LAG + 1)
        ]
        return prompt + sampled[len(prompt) :]

    def result(self, index: int) -> tuple[list[int], str]:
        """The completion that request `index` must get, and why it ends."""
        request = self.requests[index]
        completion = self.tokens(index)[len(request.prompt) :][: request.max_tokens]
        if EOS in completion and not request.ignore_eos:
            return completion[: completion.index(EOS) + 1], "stop"
        return completion, "length"


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Few token ids, and prompts cut from common beginnings, so that equal blocks are frequent.

    Hypothesis chooses the sizes; a seeded generator fills them in, since Hypothesis itself likes
    short lists of small numbers, which never fill a cache.
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
        arrival = r.randint(0, last_arrival)
        requests.append(Request(arrival, prompt, max_tokens, r.random() < 0.5))
        for _ in range(r.choice([0] * 6 + [1, 4]) if len(requests) < 16 else 0):
            max_tokens = r.randint(1, max_model_len - len(prompt))
            is_sibling = r.random() < 0.7
            requests.append(Request(arrival, prompt, max_tokens, r.random() < 0.5, is_sibling))
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
    """Runs a load, reading tokens `lag` steps late, and checks every step."""

    def __init__(self, load: Load, lag: int) -> None:
        self.load, self.lag = load, lag
        self.scheduler: Scheduler = make_scheduler(
            load.num_blocks,
            load.block_size,
            max_num_seqs=load.max_num_seqs,
            max_num_batched_tokens=load.budget,
            eos=EOS,
            enable_prefix_caching=load.enable_prefix_caching,
        )
        self.live: list[Sequence] = []  # in order of arrival
        self.queued: Sequence | None = None  # the last that was added
        self.index: dict[int, int] = {}  # sequence id -> its request's place in the load
        self.tokens: dict[int, list[int]] = {}  # sequence id -> the tokens it has and would get
        self.admitted: list[int] = []  # ids, in order of the first admission
        self.finished: list[Sequence] = []
        # Steps that were scheduled and not postprocessed, oldest first, with what each draws.
        self.pending: deque[tuple[Step, list[int]]] = deque()
        # (prefix, next token) -> prefix; equal exactly if equal
        self.prefixes: dict[tuple[int, int], int] = {}
        self.prefix_of: dict[
            int, list[int]
        ] = {}  # sequence id -> prefix that ends at each position
        self.store: dict[int, int] = {}  # slot -> prefix whose K and V it holds
        self.newest: dict[int, int] = {}  # row -> the token that was drawn for it last
        self.followers: set[int] = set()  # ids of those that were admitted without computing
        self.num_hits = self.num_dropped = self.num_waits = self.num_copies = 0

    def run(self) -> None:
        load = self.load
        arrivals = deque(range(len(load.requests)))
        # A step either samples a token or computes a whole budget of the prompt at the head of the
        # queue, and nothing is preempted before that prompt is done.
        total = sum(request.max_tokens for request in load.requests)
        bound = 61 + total * (1 + -(-load.max_model_len // load.budget))
        for step in count():
            assert step <= bound, f"{bound} steps, and {len(self.live)} sequences are not finished"
            while arrivals and load.requests[arrivals[0]].arrival <= step:
                self.add(arrivals.popleft())
            while len(self.pending) <= self.lag and self.schedule():
                pass
            if self.pending:
                self.postprocess()
            else:
                assert self.scheduler.is_finished()
                if not arrivals:
                    break
        assert not self.live
        assert_idle(self.scheduler)
        results = {
            self.index[seq.seq_id]: (seq.completion_token_ids, seq.finish_reason)
            for seq in self.finished
        }
        assert results == {index: load.result(index) for index in range(len(load.requests))}
        assert len(self.finished) == len(results)

    def add(self, index: int) -> None:
        request = self.load.requests[index]
        seq = make_sequence(request.prompt, request.max_tokens, request.ignore_eos)
        if request.is_sibling and self.queued is not None:
            seq.request_id = self.queued.request_id
        self.queued = seq
        self.live.append(seq)
        self.index[seq.seq_id], self.tokens[seq.seq_id] = index, self.load.tokens(index)
        self.scheduler.add(seq)

    def schedule(self) -> bool:
        """Schedule one step, and do what the device would; False when there is none."""
        scheduler = self.scheduler
        held = {seq.seq_id: list(seq.block_table) for seq in self.live if seq.block_table}
        computed = {seq.seq_id: seq.num_computed_tokens for seq in self.live}
        totals = {seq.seq_id: seq.num_tokens for seq in self.live}
        num_preemptions = scheduler.counters["preemptions"]
        # In the tables already, by an attempt that came to no step, and not yet written.
        not_copied = {target for _, target, _ in scheduler.block_manager.tails._copies}
        step = scheduler.schedule()
        self.check_blocks()
        if self.pending:  # which sequence could start again is not known before the tokens are
            assert scheduler.counters["preemptions"] == num_preemptions
        if step is None:
            assert self.pending or not self.live
            assert {seq.seq_id: seq.num_tokens for seq in self.live} == totals
            assert {seq.seq_id: seq.num_computed_tokens for seq in self.live} == computed
            self.num_waits += any(not seq.is_exhausted for seq in self.live)
            return False
        self.check_limits(step, totals)
        for seq in step.seqs:
            if seq.seq_id not in held and seq.num_scheduled_tokens > 0:
                self.num_hits += (
                    seq.num_computed_tokens - seq.num_scheduled_tokens
                ) // self.load.block_size
        # In a step, those that compute nothing come right after the one with the same tokens.
        for seq in sorted(step.seqs, key=self.live.index):
            if seq.seq_id not in self.admitted:
                self.admitted.append(seq.seq_id)
        # Slots that a sequence has computed (or found) in an earlier step, and will still read.
        block_size = self.load.block_size
        kept = {
            self.slot(held[seq.seq_id], position)
            for seq in self.live
            if seq.seq_id in held and seq.block_table
            for position in range(computed[seq.seq_id])
            if seq.block_table[position // block_size] == held[seq.seq_id][position // block_size]
            and seq.block_table[position // block_size] not in not_copied
        }
        self.check_inputs(step)
        self.copy(step, kept)
        self.write(step.seqs, kept)
        self.check_reads(step.seqs)
        # The token after the last computed one; after a chunk, one that must be ignored.
        drawn = [
            self.tokens[seq.seq_id][seq.num_computed_tokens] if yields else -1
            for seq, yields in zip(step.seqs, step.yields, strict=True)
        ]
        self.newest.update({seq.row: token for seq, token in zip(step.seqs, drawn, strict=True)})
        self.pending.append((step, drawn))
        assert scheduler.num_pending == len(self.pending)
        return True

    def slot(self, block_table: list[int], position: int) -> int:
        block_size = self.load.block_size
        return block_table[position // block_size] * block_size + position % block_size

    def prefix(self, seq: Sequence, position: int) -> int:
        known = self.prefix_of.setdefault(seq.seq_id, [])
        while len(known) <= position:
            key = (known[-1] if known else -1, self.tokens[seq.seq_id][len(known)])
            known.append(self.prefixes.setdefault(key, len(self.prefixes)))
        return known[position]

    def check_inputs(self, step: Step) -> None:
        """The host knows all tokens of a prefill; in decode, the device has the one it needs."""
        for seq in step.seqs:
            end = seq.num_computed_tokens
            tokens = self.tokens[seq.seq_id][end - seq.num_scheduled_tokens : end]
            if step.is_prefill:
                assert seq.scheduled_token_ids == tokens
            else:
                assert [self.newest[seq.row]] == tokens
                assert seq.scheduled_token_ids in ([], tokens)
                assert self.lag > 0 or seq.scheduled_token_ids

    def copy(self, step: Step, kept: set[int]) -> None:
        """What the device does before the step: copy the beginnings of blocks, one by one."""
        block_size = self.load.block_size
        for source, target, num_tokens in step.copies:
            assert 0 < num_tokens < block_size and source != target
            for offset in range(num_tokens):
                slot = target * block_size + offset
                assert slot not in kept, f"slot {slot}, which somebody reads, is copied over"
                self.store[slot] = self.store[source * block_size + offset]
        self.num_copies += len(step.copies)

    def write(self, seqs: list[Sequence], kept: set[int]) -> None:
        """What every layer does first: store the K and V of all scheduled tokens."""
        written: dict[int, int] = {}
        for seq in seqs:
            for position in range(
                seq.num_computed_tokens - seq.num_scheduled_tokens, seq.num_computed_tokens
            ):
                slot = self.slot(seq.block_table, position)
                assert slot not in written, f"two tokens write slot {slot} in one step"
                assert slot not in kept, f"slot {slot}, which somebody reads, is written again"
                written[slot] = self.prefix(seq, position)
        self.store.update(written)

    def check_reads(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            for position in range(seq.num_computed_tokens):
                slot = self.slot(seq.block_table, position)
                assert self.store.get(slot) == self.prefix(seq, position), (
                    f"position {position} reads slot {slot}"
                )

    def check_limits(self, step: Step, totals: dict[int, int]) -> None:
        """`totals`: the `num_tokens` of every sequence before the step was scheduled."""
        load, scheduler, seqs = self.load, self.scheduler, step.seqs
        assert seqs and len(set(map(id, seqs))) == len(seqs) == len(step.yields)
        for seq, yields in zip(seqs, step.yields, strict=True):
            total = totals[seq.seq_id]
            assert not seq.is_finished
            assert seq.num_computed_tokens <= total
            assert yields == (
                seq.num_computed_tokens == total
            )  # it samples after the last token there is
            assert seq.num_tokens == total + yields
            assert (
                seq.num_tokens - seq.num_prompt_tokens <= seq.max_tokens
            )  # no more than can be used
            assert (
                len(seq.block_table) * load.block_size >= total
            )  # all of the prompt, chunked or not
            if not step.is_prefill:
                assert seq.num_scheduled_tokens == 1 and yields
        self.check_followers(step)
        assert step.num_tokens == sum(seq.num_scheduled_tokens for seq in seqs)
        if step.is_prefill:
            assert step.num_tokens <= load.budget
            assert all(step.yields[:-1])  # one chunk at most, and it comes last
        assert len(scheduler.running) <= load.max_num_seqs and len(seqs) <= load.max_num_seqs
        if not load.enable_prefix_caching:
            assert all(seq.num_cached_tokens == 0 or seq.seq_id in self.followers for seq in seqs)

    def check_followers(self, step: Step) -> None:
        """At least one token of each sequence is computed, if not by itself then by the one that it
        follows, which has the same tokens and all of them after this step.
        """
        leader: Sequence | None = None
        for seq, yields in zip(step.seqs, step.yields, strict=True):
            if seq.num_scheduled_tokens > 0:
                leader = seq
                if step.is_prefill:
                    self.followers.discard(seq.seq_id)
                continue
            assert step.is_prefill and yields and leader is not None
            assert leader.token_ids == seq.token_ids
            assert leader.num_computed_tokens == seq.num_computed_tokens == len(seq.token_ids)
            assert leader.block_table == seq.block_table
            if not self.load.enable_prefix_caching:
                assert leader.request_id == seq.request_id
            self.followers.add(seq.seq_id)

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
        assert len(manager.cached_blocks) <= len(
            manager.blocks
        )  # nothing is left of what was evicted
        # Each admitted sequence has a row of its own, and no row is lost.
        rows = [seq.row for seq in self.live if seq.block_table]
        assert sorted(rows + self.scheduler.free_rows) == list(range(self.load.max_num_seqs))
        # First come, first served; a preempted sequence goes back to where it was.
        queued = [seq.seq_id for seq in (*self.scheduler.running, *self.scheduler.waiting)]
        assert queued == [seq.seq_id for seq in self.live]
        assert self.admitted == sorted(self.admitted)

    def postprocess(self) -> None:
        step, drawn = self.pending.popleft()
        before = {seq.seq_id: list(seq.token_ids) for seq in step.seqs}
        has_ended = {seq.seq_id for seq in step.seqs if seq.is_finished}
        finished = self.scheduler.postprocess(step, drawn)
        under_way = Counter(
            seq.seq_id
            for later, _ in self.pending
            for seq, yields in zip(later.seqs, later.yields, strict=True)
            if yields
        )
        expected = []
        for seq, yields, token in zip(step.seqs, step.yields, drawn, strict=True):
            request = self.load.requests[self.index[seq.seq_id]]
            takes = yields and seq.seq_id not in has_ended
            self.num_dropped += yields and not takes
            assert seq.token_ids == before[seq.seq_id] + [token] * takes
            assert seq.num_prompt_tokens == len(request.prompt)
            assert seq.num_tokens == len(seq.token_ids) + (
                0 if seq.is_finished else under_way[seq.seq_id]
            )
            if not takes:
                continue
            assert seq.completion_token_ids == seq.token_ids[len(request.prompt) :]
            if token == EOS and not request.ignore_eos:
                expected.append((seq, "stop"))
            elif len(seq.completion_token_ids) == request.max_tokens:
                expected.append((seq, "length"))
        assert [(seq, seq.finish_reason) for seq in finished] == expected
        assert all(seq.is_finished and not seq.block_table for seq in finished)
        self.finished += finished
        ended = {seq.seq_id for seq in finished}
        self.live = [seq for seq in self.live if seq.seq_id not in ended]
        assert self.scheduler.num_pending == len(self.pending)
        self.check_blocks()


def run_at_every_lag(load: Load) -> list[Simulation]:
    simulations = [Simulation(load, lag) for lag in range(MAX_LAG + 1)]
    for simulation in simulations:
        simulation.run()
    assert simulations[0].num_dropped == 0
    return simulations


# Of random loads; the environment can ask for more than what CI has time for.
EXAMPLES = int(os.environ.get("NANOVLLM_EXAMPLES", "800"))
property_test = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@property_test
@given(loads())
def test_invariants_hold_after_every_step(load: Load) -> None:
    run_at_every_lag(load)


@pytest.mark.parametrize(
    "weak_hash",
    [
        lambda token_ids, parent_hash=None: 7,
        lambda token_ids, parent_hash=None: sum(token_ids) % 3,
        lambda token_ids, parent_hash=None: (sum(token_ids) + (parent_hash or 0)) % 4,
    ],
    ids=["constant", "sum", "chained"],
)
@settings(parent=property_test, max_examples=EXAMPLES // 4)
@given(load=loads())
def test_a_hash_collision_never_returns_another_prompts_cache(
    weak_hash: object, load: Load
) -> None:
    with mock.patch.object(BlockManager, "compute_hash", staticmethod(weak_hash)):
        run_at_every_lag(load)


def test_the_loads_reach_what_they_are_meant_to_reach() -> None:
    """Else the properties above could hold because nothing happens."""
    seen: Counter[tuple[str, int]] = Counter()

    @settings(parent=property_test, max_examples=300)
    @given(loads())
    def explore(load: Load) -> None:
        for lag, simulation in enumerate(run_at_every_lag(load)):
            seen["preemptions", lag] += simulation.scheduler.counters["preemptions"] > 2
            seen["hits", lag] += simulation.num_hits > 2
            seen["chunks", lag] += load.budget < max(
                len(request.prompt) for request in load.requests
            )
            seen["eos", lag] += any(seq.finish_reason == "stop" for seq in simulation.finished)
            seen["shared", lag] += (
                simulation.num_hits > 2 and simulation.scheduler.counters["preemptions"] > 2
            )
            seen["dropped", lag] += simulation.num_dropped > 0
            seen["waits", lag] += simulation.num_waits > 2
            seen["followers", lag] += len(simulation.followers) > 2
            seen["copies", lag] += (
                simulation.num_copies > 2 and simulation.scheduler.counters["preemptions"] > 2
            )

    explore()
    for lag in range(MAX_LAG + 1):
        events = ["preemptions", "hits", "chunks", "eos", "shared", "followers", "copies"]
        events += ["dropped", "waits"] * (lag > 0)
        assert all(seen[event, lag] >= 10 for event in events), seen
    assert seen["dropped", 0] == seen["waits", 0] == 0


def test_the_only_running_sequence_is_not_preempted() -> None:
    """It needs every block of the cache, and gets them one by one from the others."""
    load = Load(
        block_size=2,
        num_blocks=6,
        max_num_seqs=8,
        budget=100,
        max_model_len=12,
        enable_prefix_caching=True,
        requests=[Request(0, [1, 2, i], 9, True) for i in range(4)],
        sampled=[1, 2, 3],
    )
    for simulation in run_at_every_lag(load):
        assert simulation.scheduler.counters["preemptions"] >= 3
        assert [seq.seq_id for seq in simulation.finished] == simulation.admitted


def test_an_end_that_is_found_late_costs_a_dropped_token_each_step() -> None:
    """The first of two ends at its third token, by which time `lag` more steps are launched."""
    load = Load(
        block_size=2,
        num_blocks=20,
        max_num_seqs=8,
        budget=100,
        max_model_len=12,
        enable_prefix_caching=True,
        requests=[Request(0, [1, 2], 9, False), Request(0, [1, 3], 9, True)],
        sampled=[1, 2, 3, 2, EOS, 3, 1, 1],
    )
    for lag, simulation in enumerate(run_at_every_lag(load)):
        first, second = simulation.finished
        assert (first.completion_token_ids, first.finish_reason) == ([3, 2, EOS], "stop")
        assert len(second.completion_token_ids) == 9 and second.finish_reason == "length"
        assert simulation.num_dropped == lag


def test_no_step_is_launched_beyond_max_tokens() -> None:
    """Unlike an EOS, that end is known in advance: nothing is computed in vain."""
    load = Load(
        block_size=2,
        num_blocks=20,
        max_num_seqs=8,
        budget=100,
        max_model_len=12,
        enable_prefix_caching=True,
        requests=[Request(0, [1, 2], n, True) for n in (1, 2, 5)],
        sampled=[1, 2, 3],
    )
    for lag in range(MAX_LAG + 1):
        simulation = Simulation(load, lag)
        sizes: list[int] = []
        schedule = simulation.scheduler.schedule

        def counting(
            schedule: Callable[[], Step | None] = schedule, sizes: list[int] = sizes
        ) -> Step | None:
            step = schedule()
            sizes.extend([len(step.seqs)] if step is not None else [])
            return step

        simulation.scheduler.schedule = counting  # type: ignore[method-assign]
        simulation.run()
        assert sizes == [3, 2, 1, 1, 1]
        assert simulation.num_dropped == 0
