"""Which replica gets which lines: by simulation, without processes."""

import heapq
import json
import random
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

import pytest

from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.replicas.dispatcher import MIN_RESERVE, Dispatcher
from nanovllm.jobs.replicas.look_ahead import LookAhead, prefix_keys
from nanovllm.jobs.replicas.run import Run
from nanovllm.jobs.replicas.suspects import MAX_RERUNS
from nanovllm.jobs.replicas.task import FutureTask, Task

BLOCK_SIZE = 16  # so the levels of prefixes are 64, 128, 192, 256, 384, ... bytes


class PlainTask(Task):
    """A line for which nobody waits; `answers` holds the answers to all of a test."""

    def __init__(self, line: Line, answers: list[Answer]) -> None:
        super().__init__(line)
        self.answers = answers
        self.is_wanted = True

    def begin(self) -> bool:
        return self.is_wanted

    def finish(self, answer: Answer) -> None:
        self.answers.append(answer)


def make_task(number: int, prompt: str, answers: list[Answer] | None = None) -> PlainTask:
    data = json.dumps({"custom_id": f"request-{number}", "prompt": prompt}).encode()
    return PlainTask(Line(number, data), [] if answers is None else answers)


def document(name: object, length: int = 300) -> str:
    """A text of `length` characters; no two names give texts that begin with the same block."""
    return (f"Document {name}. " * length)[:length]


def test_an_answered_line_takes_no_memory_while_older_ones_wait() -> None:
    run = Run()
    for make in (run.add_line, FutureTask):
        data = b"x" * 1000
        num_references = sys.getrefcount(data)
        task = make(Line(2, data))
        assert sys.getrefcount(data) > num_references
        task.finish(Answer(2, b"{}"))
        assert sys.getrefcount(data) == num_references


# --- prefixes -------------------------------------------------------------------------------------


def test_lines_have_equal_keys_as_far_as_their_prompts_begin_alike() -> None:
    num_bytes = LookAhead(BLOCK_SIZE).num_bytes
    assert num_bytes[:4] == (64, 128, 192, 256)
    lines = [
        make_task(i, document("a") + end).line for i, end in enumerate(["", "b" * 90, "c" * 90])
    ]
    keys = [prefix_keys(line.data, num_bytes) for line in lines]
    assert [len(each) for each in keys] == [5, 6, 6]  # the last one ends behind the prompt
    assert keys[0][:4] == keys[1][:4] == keys[2][:4]
    assert len({each[4] for each in keys}) == 3
    long, other = (make_task(i, "x" * 100_000 + str(i)).line for i in range(2))
    assert prefix_keys(long.data, num_bytes) == prefix_keys(other.data, num_bytes)
    assert len(prefix_keys(make_task(3, "short").line.data, num_bytes)) == 1


@pytest.mark.parametrize(
    "line",
    [
        {"custom_id": "{}", "body": {"model": "m", "messages": [{"role": "user", "content": "Q"}]}},
        {"custom_id": "{}", "body": {"model": "m", "prompt": "Q"}},
        {"custom_id": "{}", "body": {"model": "m", "input": "Q"}},
        {"id": "{}", "prompt": "Q"},
        {"note": 'a text with "prompt": inside, {}', "prompt": "Q"},
    ],
)
def test_what_comes_before_the_prompt_does_not_count(line: dict) -> None:
    question = "the same long question " * 10
    data = [
        json.dumps(line).replace("{}", str(number)).replace('"Q"', json.dumps(question)).encode()
        for number in range(2)
    ]
    assert data[0] != data[1]
    assert prefix_keys(data[0], (64, 128)) == prefix_keys(data[1], (64, 128))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff" * 100, b"x" * 100_000, b'"prompt":'])
def test_a_broken_line_has_keys_too(data: bytes) -> None:
    assert prefix_keys(data, (64, 128))


# --- the order of lines ---------------------------------------------------------------------------


def take_all(look_ahead: LookAhead, replica: int = 0) -> list[int]:
    numbers = []
    while (task := look_ahead.take(replica)) is not None:
        numbers.append(task.line.number)
    return numbers


def test_lines_that_begin_alike_come_in_a_row_and_others_in_their_order() -> None:
    look_ahead = LookAhead(BLOCK_SIZE)
    prompts = ["a", "b", document("a"), "c", document("b"), document("a"), "d", document("b")]
    for number, prompt in enumerate(prompts):
        look_ahead.add(make_task(number, prompt + f" {number}"))
    assert take_all(look_ahead) == [0, 1, 2, 5, 3, 4, 7, 6]
    assert look_ahead.num_waiting == 0
    assert not look_ahead.root.children and not look_ahead.root.unowned


def test_a_replica_goes_on_with_the_longest_prefix() -> None:
    """All lines have a header in common; then they are about two documents."""
    look_ahead = LookAhead(BLOCK_SIZE)
    header = document("header", 80)
    for number in range(8):
        look_ahead.add(make_task(number, header + document(number % 2)))
    assert [look_ahead.take(0).line.number for _ in range(2)] == [0, 2]
    assert look_ahead.take(1, may_steal=False) is None  # the header is computed by 0 already
    assert look_ahead.take(1).line.number == 1  # but not this document
    assert look_ahead.take(1, may_steal=False).line.number == 3
    assert look_ahead.take(0).line.number == 4
    assert take_all(look_ahead, replica=1) == [5, 7, 6]


def test_documents_behind_a_long_header_are_told_apart() -> None:
    """Each has several questions, and none of the texts ends where a level does."""
    look_ahead = LookAhead(BLOCK_SIZE)
    header = document("header", 290)
    for number in range(30):
        look_ahead.add(make_task(number, header + document(number % 3, 160) + f"Question {number}"))
    assert take_all(look_ahead) == [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]


def test_who_has_computed_a_prefix_gets_later_lines_of_it() -> None:
    look_ahead = LookAhead(BLOCK_SIZE)
    for number in range(2):
        look_ahead.add(make_task(number, document(number)))
    assert look_ahead.take(0).line.number == 0
    assert look_ahead.take(1).line.number == 1
    for number in range(2, 6):
        look_ahead.add(make_task(number, document(number % 2)))
    assert look_ahead.take(1, may_steal=False).line.number == 3
    assert look_ahead.take(0, may_steal=False).line.number == 2
    assert look_ahead.take(1, may_steal=False).line.number == 5
    assert look_ahead.take(1, may_steal=False) is None
    assert look_ahead.take(1).line.number == 4


def test_no_line_waits_for_ever() -> None:
    look_ahead = LookAhead(BLOCK_SIZE, max_lines=10)
    look_ahead.add(make_task(0, document("popular")))
    assert look_ahead.take(0).line.number == 0
    look_ahead.add(make_task(1, document("rare")))
    for number in range(2, 100):
        look_ahead.add(make_task(number, document("popular")))
        task = look_ahead.take(0)
        if task.line.number == 1:
            break
    assert 15 < number < 25


def test_the_look_ahead_gives_each_line_once_whatever_comes_when() -> None:
    r = random.Random(0)
    look_ahead = LookAhead(BLOCK_SIZE, max_lines=50)
    taken: Counter[int] = Counter()
    num_added = 0
    while num_added < 3000 or look_ahead.num_waiting:
        for _ in range(r.randrange(20)):
            if num_added < 3000 and look_ahead.num_waiting < 50:
                header = document(r.randrange(3), r.choice([0, 10, 100, 2000]))
                look_ahead.add(make_task(num_added, header + document(r.randrange(9))))
                num_added += 1
        for _ in range(r.randrange(20)):
            task = look_ahead.take(r.randrange(3), r.random() < 0.7)
            if task is not None:
                taken[task.line.number] += 1
        waiting = look_ahead.num_waiting
        assert waiting == len(look_ahead.waiting) <= 50
        assert (waiting == 0) == (not look_ahead.root.children)
        assert len(look_ahead.order) <= 150
    assert taken == {number: 1 for number in range(3000)}


# --- many replicas --------------------------------------------------------------------------------


class Engine:
    """Of a simulated replica: runs lines in the order in which they come, `max_num_seqs` at once,
    and keeps as many prefixes as fit its cache.
    """

    def __init__(self, max_num_seqs: int, max_prefixes: int) -> None:
        self.max_num_seqs = max_num_seqs
        self.max_prefixes = max_prefixes
        self.cached: OrderedDict[str, None] = OrderedDict()
        self.waiting: deque[tuple[int, str, float]] = deque()
        self.num_running = 0
        self.num_computed = 0  # prefixes

    def start(self, now: float) -> list[tuple[float, int]]:
        """Begin with what there is room for; returns when which line will have been answered."""
        ends = []
        while self.waiting and self.num_running < self.max_num_seqs:
            ticket, prefix, seconds = self.waiting.popleft()
            self.num_running += 1
            if prefix not in self.cached:
                self.num_computed += 1
                self.cached[prefix] = None
            self.cached.move_to_end(prefix)
            while len(self.cached) > self.max_prefixes:
                self.cached.popitem(last=False)
            ends.append((now + seconds, ticket))
        return ends


class Simulation:
    """Replicas that run lines of given prefixes and durations; none has room while a line waits."""

    def __init__(self, num_replicas: int, max_num_seqs: int, max_prefixes: int) -> None:
        self.engines = [Engine(max_num_seqs, max_prefixes) for _ in range(num_replicas)]
        self.now = 0.0

    @property
    def num_computed(self) -> int:
        return sum(engine.num_computed for engine in self.engines)

    def run(self, lines: list[tuple[str, float]], max_lines: int, latency: float = 0.0) -> None:
        look_ahead = LookAhead(BLOCK_SIZE, max_lines)
        dispatcher = Dispatcher(len(self.engines), look_ahead)
        for index, engine in enumerate(self.engines):
            dispatcher.start(index, engine.max_num_seqs)
        answers: list[Answer] = []
        tasks = [make_task(i, document(prefix), answers) for i, (prefix, _) in enumerate(lines)]
        unread = deque(tasks)
        # (when, what, replica, tickets): lines arrive in a replica, or one is answered, or its
        # answer arrives here.
        events: list[tuple[float, int, str, int, list[int]]] = []

        def push(when: float, what: str, index: int, tickets: list[int]) -> None:
            heapq.heappush(events, (when, len(events), what, index, tickets))

        while True:
            while unread and look_ahead.num_waiting < max_lines:
                look_ahead.add(unread.popleft())
            assigned_lines = dispatcher.assign()
            has_room = any(slot.room > 0 for slot in dispatcher.slots)
            assert not has_room or not look_ahead.num_waiting
            for index, assigned in assigned_lines.items():
                push(self.now + latency, "lines", index, list(assigned))
            if not events:
                break
            self.now, _, what, index, tickets = heapq.heappop(events)
            engine, slot = self.engines[index], dispatcher.slots[index]
            if what == "lines":
                for ticket in tickets:
                    engine.waiting.append((ticket, *lines[slot.in_flight[ticket].line.number]))
            elif what == "end":
                engine.num_running -= 1
                push(self.now + latency, "answer", index, tickets)
            else:
                (ticket,) = tickets
                slot.rate.add(1, self.now)
                task = dispatcher.answer(index, ticket, Answer(0, b""))
                task.finish(Answer(task.line.number, b""))
            for end, ticket in engine.start(self.now):
                push(end, "end", index, [ticket])
        assert dispatcher.is_idle
        assert sorted(answer.number for answer in answers) == list(range(len(lines)))

    def run_round_robin(self, lines: list[tuple[str, float]]) -> None:
        """The usual way: each replica has its share of the lines, in their order."""
        for index, engine in enumerate(self.engines):
            engine.waiting.extend(
                (i, *line) for i, line in enumerate(lines[index :: len(self.engines)])
            )
            ends = engine.start(0.0)
            heapq.heapify(ends)
            while ends:
                now, _ = heapq.heappop(ends)
                self.now = max(self.now, now)
                engine.num_running -= 1
                for end in engine.start(now):
                    heapq.heappush(ends, end)


def make_lines(
    num_documents: int,
    num_questions: int,
    duration: Callable[[], float],
    order: random.Random | None,
) -> list[tuple[str, float]]:
    lines = [(f"{i}", duration()) for i in range(num_documents) for _ in range(num_questions)]
    if order is not None:
        order.shuffle(lines)
    return lines


@pytest.mark.parametrize("is_shuffled", [False, True])
def test_each_prefix_is_computed_once_where_the_look_ahead_holds_its_lines(
    is_shuffled: bool,
) -> None:
    r = random.Random(1)
    lines = make_lines(100, 10, lambda: r.uniform(1, 2), r if is_shuffled else None)
    simulation = Simulation(4, max_num_seqs=16, max_prefixes=20)
    simulation.run(lines, max_lines=1000)
    # At the end those that are idle take lines of others' prefixes.
    assert 100 <= simulation.num_computed <= 110
    usual = Simulation(4, max_num_seqs=16, max_prefixes=20)
    usual.run_round_robin(lines)
    assert usual.num_computed >= (780 if is_shuffled else 400)
    seconds = sum(seconds for _, seconds in lines) / (4 * 16)
    assert simulation.now < 1.1 * seconds


def test_a_long_shuffled_job_keeps_each_prefix_in_one_cache() -> None:
    """Far more lines than the look-ahead holds, so that each document comes up again and again."""
    r = random.Random(2)
    lines = make_lines(80, 50, lambda: r.uniform(1, 2), r)
    simulation = Simulation(4, max_num_seqs=16, max_prefixes=30)
    simulation.run(lines, max_lines=200)
    usual = Simulation(4, max_num_seqs=16, max_prefixes=30)
    usual.run_round_robin(lines)
    assert simulation.num_computed < 250
    assert usual.num_computed > 2000


@pytest.mark.parametrize("num_replicas", [2, 8])
def test_no_replica_is_idle_at_the_end(num_replicas: int) -> None:
    """All lines have one prefix, and some take ten times as long."""
    r = random.Random(3)
    durations = [r.choice([1.0] * 9 + [10.0]) for _ in range(200 * num_replicas)]
    simulation = Simulation(num_replicas, max_num_seqs=16, max_prefixes=10)
    simulation.run([("a", seconds) for seconds in durations], max_lines=500)
    assert simulation.now < sum(durations) / (16 * num_replicas) + 10.0


def test_few_lines_are_shared_evenly() -> None:
    simulation = Simulation(4, max_num_seqs=64, max_prefixes=10)
    simulation.run([("a", 1.0)] * 40, max_lines=500)
    dispatcher = Dispatcher(4, LookAhead(BLOCK_SIZE))
    for index in range(4):
        dispatcher.start(index, 64)
    for number in range(40):
        dispatcher.look_ahead.add(make_task(number, "p"))
    assert [len(tasks) for tasks in dispatcher.assign().values()] == [10] * 4


def test_the_reserve_covers_a_round_trip_and_no_more() -> None:
    """A batch of 32 stays full although answers and lines travel for 50 ms each way."""
    r = random.Random(4)
    durations = [r.uniform(0.2, 0.4) for _ in range(5000)]
    lines = [(f"{number % 7}", seconds) for number, seconds in enumerate(durations)]
    simulation = Simulation(2, max_num_seqs=32, max_prefixes=10)
    simulation.run(lines, max_lines=500, latency=0.05)
    best = sum(durations) / 64
    assert simulation.now < best * 1.05 + 1.0  # the first second has no reserve to speak of
    slow = Dispatcher(1, LookAhead(BLOCK_SIZE))
    slow.start(0, 32)
    assert slow.slots[0].room == 32 + MIN_RESERVE
    for second in range(10):
        slow.slots[0].rate.add(100, float(second))
    assert slow.slots[0].room == 32 + 20


# --- engines that fail ----------------------------------------------------------------------------


class Job:
    """Runs lines on replicas that die of poisoned ones, or when they are told to."""

    def __init__(self, num_lines: int, poisoned: set[int], num_replicas: int = 1, size: int = 500):
        self.poisoned = poisoned
        self.answers: list[Answer] = []
        self.errors: list[int] = []
        self.num_runs: Counter[int] = Counter()
        self.num_deaths = 0
        self.look_ahead = LookAhead(BLOCK_SIZE)
        self.dispatcher = Dispatcher(num_replicas, self.look_ahead)
        for number in range(num_lines):
            self.look_ahead.add(make_task(number, f"{number}", self.answers))
        self.size = size
        for index in range(num_replicas):
            self.dispatcher.start(index, size)
        self.r = random.Random(num_lines)

    def run(self, may_die: Callable[[], bool] = lambda: False, is_broken: bool = False) -> None:
        """Until all is done, or all replicas are given up."""
        inboxes: dict[int, dict[int, Task]] = {slot.index: {} for slot in self.dispatcher.slots}
        while not self.dispatcher.is_idle:
            if all(slot.is_given_up for slot in self.dispatcher.slots):
                return
            for index, tasks in self.dispatcher.assign().items():
                self.num_runs.update(task.line.number for task in tasks.values())
                inboxes[index].update(tasks)
            for index, inbox in inboxes.items():
                if inbox:
                    self.step(index, inbox, may_die(), is_broken)

    def step(self, index: int, inbox: dict[int, Task], has_to_die: bool, is_broken: bool) -> None:
        """Answer some lines that are there, or die of one that is poisoned."""
        tickets = self.r.sample(list(inbox), min(len(inbox), self.r.randrange(1, 100)))
        numbers = {inbox[ticket].line.number for ticket in tickets}
        if numbers & self.poisoned or has_to_die or is_broken:
            self.num_deaths += 1
            failure = self.dispatcher.die(index)
            self.errors += [task.line.number for task in failure.given_up_lines]
            inbox.clear()
            if not failure.is_replica_given_up:
                self.dispatcher.start(index, self.size)
            return
        for ticket in tickets:
            del inbox[ticket]
            task = self.dispatcher.answer(index, ticket, Answer(0, b""))
            task.finish(Answer(task.line.number, b""))


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize(
    "poisoned", [set(), {0}, {499}, {77}, {77, 78}, {3, 300}, {1, 2, 3}, {5, 250, 700, 1400, 1999}]
)
def test_only_a_line_that_kills_alone_is_given_up(poisoned: set[int], num_replicas: int) -> None:
    job = Job(2000, poisoned, num_replicas)
    job.run()
    assert sorted(job.errors) == sorted(poisoned)
    assert sorted(answer.number for answer in job.answers) == sorted(set(range(2000)) - poisoned)
    assert max(job.num_runs.values()) <= MAX_RERUNS + 1
    assert job.num_deaths <= 3 * len(poisoned)


@pytest.mark.parametrize("num_lines", [1, 2, 3, 10])
def test_small_jobs_of_nothing_but_poison_end_too(num_lines: int) -> None:
    job = Job(num_lines, set(range(num_lines)))
    job.run()
    is_given_up = job.dispatcher.slots[0].is_given_up
    assert is_given_up == (num_lines > 2)
    assert job.num_deaths <= 6


def test_engines_that_are_killed_by_hand_cost_no_line() -> None:
    """Ten kills in a job of 20,000 lines, at moments that are not one soon after another."""
    job = Job(20_000, set(), 2)
    steps = iter(range(1_000_000))
    job.run(may_die=lambda: next(steps) % 60 == 59)
    assert job.num_deaths >= 5
    assert not job.errors
    assert sorted(answer.number for answer in job.answers) == list(range(20_000))


@pytest.mark.parametrize("num_lines, num_deaths", [(10_000, 3), (5, 6)])
def test_a_broken_engine_is_given_up_and_its_lines_are_not_blamed(
    num_lines: int, num_deaths: int
) -> None:
    job = Job(num_lines, set())
    job.run(is_broken=True)
    assert job.dispatcher.slots[0].is_given_up
    assert job.num_deaths == num_deaths
    assert not job.answers
    assert len(job.errors) <= 1  # only if no other line is left that could have told
    assert len(job.dispatcher.take_all()) == num_lines - len(job.errors)
    assert job.dispatcher.is_idle


def test_an_engine_that_cannot_start_again_is_given_up_while_others_go_on() -> None:
    job = Job(5000, set(), num_replicas=2)
    job.dispatcher.assign()
    for _ in range(3):
        failure = job.dispatcher.die(1)
        assert not failure.given_up_lines
    assert failure.is_replica_given_up
    for index, slot in enumerate(job.dispatcher.slots):
        for task in slot.in_flight.values():
            job.look_ahead.add(task)
        slot.in_flight.clear()
        assert slot.is_given_up == (index == 1)
    job.run()
    assert len(job.answers) == 5000


def test_a_replica_that_is_about_to_end_gets_no_more_lines() -> None:
    """They would be in a failure which they have not seen."""
    job = Job(10, set(), size=5)
    (assigned,) = job.dispatcher.assign().values()
    job.dispatcher.stop(0)
    ticket = next(iter(assigned))
    task = job.dispatcher.answer(0, ticket, Answer(0, b""))
    assert not job.dispatcher.is_hungry and not job.dispatcher.assign()
    job.dispatcher.die(0)
    assert not job.dispatcher.assign()
    job.dispatcher.start(0, 5)
    task.finish(Answer(task.line.number, b""))
    job.run()
    assert sorted(answer.number for answer in job.answers) == list(range(10))
    assert job.num_deaths == 0 and not job.errors


def test_a_line_that_nobody_wants_any_more_is_dropped() -> None:
    answers: list[Answer] = []
    look_ahead = LookAhead(BLOCK_SIZE)
    dispatcher = Dispatcher(1, look_ahead)
    dispatcher.start(0, 1)
    tasks = [make_task(number, "p", answers) for number in range(4)]
    for task in tasks:
        look_ahead.add(task)
    tasks[0].is_wanted = tasks[2].is_wanted = False
    (assigned,) = dispatcher.assign().values()
    assert [task.line.number for task in assigned.values()] == [1, 3]
    tasks[3].is_wanted = False
    assert not dispatcher.die(0).given_up_lines
    dispatcher.start(0, 1)
    (assigned,) = dispatcher.assign().values()
    assert [task.line.number for task in assigned.values()] == [1]
    dispatcher.answer(0, next(iter(assigned)), Answer(1, b""))
    dispatcher.assign()
    assert dispatcher.is_idle
