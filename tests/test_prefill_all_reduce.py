"""The sums of a prefill over several GPUs: how rows are cut, the kernel that sums them, and the
ranks' protocol."""

import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from nanovllm.kernels import prefill_all_reduce
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.prefill_all_reduce import MIN_ROWS, PrefillAllReduce, add_norm, pieces
from nanovllm.kernels.rms_norm import rms_norm_torch


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_pieces_cover_all_rows_once(ranks: int) -> None:
    assert pieces(2 * MIN_ROWS - 1, ranks) == []
    for num_rows in [*range(2 * MIN_ROWS, 2 * MIN_ROWS + 50), 5003, 6143, 16384, 100_000]:
        cut = pieces(num_rows, ranks)
        assert 1 < len(cut) <= 2 * ranks
        assert [row for rows in cut for row in range(rows.start, rows.stop)] == list(
            range(num_rows)
        )
        # Otherwise a rank's rows of two pieces would overlap in its inbox.
        assert all(rows.start % ranks == 0 for rows in cut)


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_each_row_is_owned_by_the_rank_that_sums_it(ranks: int) -> None:
    sums = [PrefillAllReduce.__new__(PrefillAllReduce) for _ in range(ranks)]
    for rank, one in enumerate(sums):
        one.rank, one.size = rank, ranks
    for num_rows in [*range(2 * MIN_ROWS, 2 * MIN_ROWS + 30), 5003, 10_241, 16384]:
        owned = torch.zeros(ranks, num_rows, dtype=torch.bool)
        for rank, one in enumerate(sums):
            for rows in pieces(num_rows, ranks):
                first, length = one._owned_rows(rank, rows.stop - rows.start)
                owned[rank, rows.start + first : rows.start + first + length] = True
        rows = torch.randperm(num_rows)[:500].int()
        found = torch.stack([one.owns(rows, num_rows) for one in sums])
        assert torch.equal(found, owned[:, rows.long()]) and (found.sum(0) == 1).all()


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "ranks, rank, num_rows, has_norm",
    [(2, 0, 5, True), (4, 2, 3, True), (3, 1, 4, False), (2, 1, 0, True)],
)
def test_sum_and_norm(
    ranks: int, rank: int, num_rows: int, has_norm: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    parts = torch.randn(ranks, num_rows, 200).to(dtype)
    residual, weight = torch.randn(num_rows, 200).to(dtype), torch.randn(200).to(dtype)
    expected = residual.float()
    for part in parts:
        expected = expected + part.float()
    expected = expected.to(dtype)
    # A rank's own slot is not read.
    inbox = torch.full((ranks, num_rows + 3, 200), torch.nan).to(dtype)
    for source in range(ranks):
        if source != rank:
            inbox[source, 1 : num_rows + 1] = parts[source]
    out = torch.full_like(residual, torch.nan)
    add_norm(
        parts[rank],
        inbox[:, 1 : num_rows + 1],
        residual,
        out,
        weight if has_norm else None,
        1e-3,
        rank,
    )
    assert torch.equal(residual, expected)
    torch.testing.assert_close(
        out, rms_norm_torch(expected, weight, 1e-3) if has_norm else expected
    )


# --- the protocol, on simulated GPUs --------------------------------------------------------------


class Stream:
    """A queue of (whether it can run now, what it does). `Machine.run` runs the first of any
    queue."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.queue: list[tuple[Callable[[], bool], Callable[[], object]]] = []
        Machine.streams.append(self)

    def add(self, act: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> None:
        self.queue.append((ready, act))

    def wait_event(self, event: "Event") -> None:
        number = event.recorded
        self.add(lambda: None, lambda: event.done >= number)


class Event:
    recorded = done = 0

    def record(self, stream: Stream) -> None:
        self.recorded += 1
        number = self.recorded
        stream.add(lambda: setattr(self, "done", number))


class Machine:
    """GPUs that share one memory, and do in random order what their streams leave open."""

    streams: list[Stream] = []
    current: Stream

    @classmethod
    def run(cls, rng: random.Random, most: int) -> bool:
        """Whether nothing is left, after at most so many operations."""
        for _ in range(most):
            ready = [stream for stream in cls.streams if stream.queue and stream.queue[0][0]()]
            if not ready:
                break
            rng.choice(ready).queue.pop(0)[1]()
        return not any(stream.queue for stream in cls.streams)

    @classmethod
    @contextmanager
    def using(cls, stream: Stream) -> Iterator[None]:
        before, cls.current = cls.current, stream
        yield
        cls.current = before


def word_at(address: int) -> ctypes.c_uint32:
    return ctypes.c_uint32.from_address(address)


def sum_later(addends, inbox, residual, out, norm_weight, eps, rank) -> None:  # noqa: ANN001
    """For add_norm; the "norm" doubles. `addends` and `residual` are rows of tensors that outlive
    this."""

    def act() -> None:
        total = sum(
            (addends if source == rank else inbox[source] for source in range(len(inbox))), residual
        )
        residual.copy_(total)
        out.copy_(total if norm_weight is None else 2 * total)

    Machine.current.add(act)


def write_later(stream: Stream, word: int, value: int) -> None:
    stream.add(lambda: setattr(word_at(word), "value", value % 2**32))


def wait_later(stream: Stream, word: int, value: int) -> None:
    stream.add(lambda: None, lambda: (word_at(word).value - value) % 2**32 < 2**31)


def copy_later(stream: Stream, target: int, source: int, num_bytes: int) -> None:
    stream.add(lambda: ctypes.memmove(target, source, num_bytes))


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MIN_ROWS": 128,
        "MIN_TOKENS": 256,
        "add_norm": sum_later,
        "_copy": copy_later,
        "_write": write_later,
        "_wait": wait_later,
    }.items():
        monkeypatch.setattr(prefill_all_reduce, name, value)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", Machine.using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Machine.current)
    monkeypatch.setattr(Machine, "streams", [])


class Ranks:
    """What `size` ranks do in a few prefills: a generator for each, that yields between the
    calls."""

    def __init__(self, rng: random.Random, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rng, self.size, self.wrong = rng, size, 0
        most = rng.randrange(256, 700 * size)
        outs = torch.full((size, most, 1), torch.nan)
        inboxes = torch.full((size, size, -(-most // size), 1), torch.nan)
        monkeypatch.setattr(
            prefill_all_reduce,
            "share_memory",
            lambda memory, *_: list(outs if memory.dim() == 2 else inboxes),
        )
        count = rng.choice([0, 2**31 - 3, 2**32 - 4])
        self.words = (ctypes.c_uint32 * (1 + 2 * size**2))(*[count % 2**32] * (1 + 2 * size**2))
        shared = SimpleNamespace(address=ctypes.addressof(self.words), write=self.write)
        self.mains: list[Stream] = []
        self.sums: list[PrefillAllReduce] = []
        self.streams: list[list[Stream]] = []
        self.made: list[list[torch.Tensor]] = [[] for _ in range(size)]
        shape, device = (most, 1), torch.device("cpu")
        for rank in range(size):
            before = len(Machine.streams)
            self.mains.append(Stream())
            sums = PrefillAllReduce(
                rank=rank,
                size=size,
                device=device,
                words=shared,  # type: ignore[arg-type]
                shape=shape,
                dtype=torch.float32,
            )
            sums.count = count
            self.sums.append(sums)
            self.streams.append(Machine.streams[before:])
        # Rows, the residual, and for each sum the ranks' parts, the kind, and the result.
        self.prefills = []
        for _ in range(rng.randrange(1, 4)):
            rows = rng.choice([most, rng.randrange(256, most + 1)])
            hidden, calls = torch.ones(rows, 1), []
            for _ in range(rng.randrange(1, 6)):
                parts, has_norm = torch.randint(-9, 9, (size, rows, 1)).float(), rng.random() < 0.7
                hidden = hidden + parts.sum(0)
                calls.append(
                    (
                        parts,
                        has_norm,
                        rng.choice(["pieces", "arriving", "all"]),
                        hidden * (1 + has_norm),
                    )
                )
            self.prefills.append((rows, calls))
        self.programs = [self.work(rank) for rank in range(size)]

    def write(self, index: int, *values: int) -> None:
        for i, value in enumerate(values, index):
            self.words[i] = value % 2**32

    def check(self, main: Stream, result: torch.Tensor, expected: torch.Tensor) -> None:
        def act() -> None:
            self.wrong += not torch.equal(result, expected)

        main.add(act)

    def work(self, rank: int) -> Iterator[None]:
        main, all_reduce, made = self.mains[rank], self.sums[rank], self.made[rank]
        for num_rows, calls in self.prefills:
            residual, out, last = torch.ones(num_rows, 1), None, None
            for parts, has_norm, how, result in calls:
                if out is not None and how == "arriving":
                    for rows in all_reduce.arriving(num_rows):
                        self.check(main, out[rows], last[rows])
                        yield
                elif out is not None and how == "all":
                    all_reduce.wait_for_all()
                    self.check(main, out, last)

                def compute(rows: slice, out=out, last=last, parts=parts) -> torch.Tensor:
                    if out is not None:
                        self.check(main, out[rows], last[rows])
                    held = [piece.addends.data_ptr() for piece in all_reduce.pending.values()]
                    for old in made:  # the allocator would hand out again what nobody holds
                        if old.data_ptr() not in held:
                            main.add(lambda old=old: old.fill_(torch.nan))
                    part, values = torch.empty(rows.stop - rows.start, 1), parts[rank, rows]
                    made.append(part)
                    main.add(lambda: part.copy_(values))
                    return part

                out, last = (
                    all_reduce(compute, residual, torch.ones(1) if has_norm else None, 0.0),
                    result,
                )
                yield
            all_reduce.wait_for_all()
            self.check(main, out, last)
            yield

    def start(self, ranks: list[int], most: int) -> None:
        """Let the hosts go on in any order, and the GPUs beside them, for so many turns."""
        programs = [(rank, self.programs[rank]) for rank in ranks]
        while programs and most:
            most -= 1
            rank, program = choice = self.rng.choice(programs)
            Machine.current = self.mains[rank]
            if next(program, "ended") == "ended":
                programs.remove(choice)
            Machine.run(self.rng, self.rng.randrange(30))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_order_of_events_gives_the_sums(
    size: int, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(15):
        Machine.streams.clear()
        torch.manual_seed(seed)
        ranks = Ranks(random.Random(seed), size, monkeypatch)
        ranks.start(list(range(size)), most=10**9)
        assert Machine.run(ranks.rng, 10**9), "all wait for each other"
        assert ranks.wrong == 0


def test_a_rank_goes_on_when_the_others_have_died(
    simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(30):
        Machine.streams.clear()
        ranks = Ranks(random.Random(seed), 3, monkeypatch)
        ranks.start([0, 1, 2], most=ranks.rng.randrange(20))
        Machine.streams[:] = ranks.streams[0]
        ranks.start([0], most=ranks.rng.randrange(5))
        ranks.sums[0].release()
        ranks.start([0], most=10**9)
        assert Machine.run(ranks.rng, 10**9)
