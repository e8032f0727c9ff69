"""Which replica gets which lines, how many, and what happens to those of one that fails.

This is bookkeeping only: no process, no thread and no clock. `pool.py` acts by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.jobs.lines.line import Answer
from nanovllm.jobs.replicas.look_ahead import LookAhead
from nanovllm.jobs.replicas.suspects import Suspects
from nanovllm.jobs.replicas.task import Task

# Seconds from an answer until the line that takes its place has reached the engine, with a margin:
# the engine may be in a step, and either process may wait for a core.
ROUND_TRIP = 0.2
MIN_RESERVE = 2  # lines
RATE_WINDOW = 1.0  # seconds over which answers are counted
MAX_SILENT_FAILURES = 3  # of a replica in a row, without a good answer
# If no line is left that can tell a broken engine from poisoned lines.
MAX_DOUBTFUL_FAILURES = 6


class AnswerRate:
    """How many answers a second come from a replica."""

    def __init__(self) -> None:
        self.begin = 0.0  # of the window
        self.count = 0  # in it
        self.per_second = 0.0  # in the one before

    def add(self, count: int, now: float) -> None:
        """Count answers that have come at the time `now`, in seconds."""
        self.count += count
        elapsed = now - self.begin
        if elapsed >= RATE_WINDOW:
            self.per_second = self.count / elapsed
            self.count = 0
            self.begin = now


@dataclass(eq=False)
class Slot:
    """The place of a replica, whose process may die and be started anew."""

    index: int
    is_ready: bool = False  # its engine has started
    is_ending: bool = False  # its engine has failed, or its process is about to end
    max_num_seqs: int = 0  # of its engine
    in_flight: dict[int, Task] = field(default_factory=dict)  # by ticket
    rate: AnswerRate = field(default_factory=AnswerRate)
    is_closed: bool = False  # those in flight are suspects, to which no other lines are added
    probe: Task | None = None  # a line in flight alone that was in no failure before
    num_silent_failures: int = 0
    is_given_up: bool = False

    @property
    def takes_lines(self) -> bool:
        """Whether there is an engine."""
        return self.is_ready and not self.is_ending

    @property
    def room(self) -> int:
        """How many more lines its engine can use.

        Those that it can run at once, and a reserve, so that its batch does not drain while an
        answer travels one way and a line the other. More would be taken away from other replicas,
        which are idle when no line is left to read.
        """
        reserve = max(MIN_RESERVE, int(self.rate.per_second * ROUND_TRIP))
        return self.max_num_seqs + reserve - len(self.in_flight)

    @property
    def load(self) -> float:
        """How much of what its engine can run at once it has."""
        return len(self.in_flight) / self.max_num_seqs


@dataclass(frozen=True, slots=True)
class Failure:
    """What follows from the failure of an engine."""

    given_up_lines: list[Task]  # they are to become error lines
    is_replica_given_up: bool  # it is not to be started again


class Dispatcher:
    """Hands lines to replicas, each line to one at a time. Not thread-safe."""

    def __init__(self, num_replicas: int, look_ahead: LookAhead) -> None:
        self.slots = [Slot(index) for index in range(num_replicas)]
        self.look_ahead = look_ahead
        self.suspects = Suspects()
        self._num_tickets = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        waits = self.look_ahead.num_waiting or len(self.suspects)
        return not waits and not any(slot.in_flight for slot in self.slots)

    @property
    def is_hungry(self) -> bool:
        """Whether some replica would take a line if one came."""
        return any(slot.takes_lines and not slot.is_closed and slot.room > 0 for slot in self.slots)

    def assign(self, may_steal: bool = True) -> dict[int, dict[int, Task]]:
        """Take lines for all replicas with room: for the index of each, new lines by ticket.

        may_steal: whether a replica may get a line whose prefix is another's; see `LookAhead`.
        """
        assigned: dict[int, dict[int, Task]] = {}
        ready = [slot for slot in self.slots if slot.takes_lines]
        for slot in ready:
            if not slot.in_flight:
                for task in self._take_alone(slot):
                    self._give(slot, task, assigned)
                slot.is_closed = bool(slot.in_flight)
        hungry = [slot for slot in ready if not slot.is_closed and slot.room > 0]
        while hungry:
            # One line each in turn: where there are few, every replica gets its share.
            slot = min(hungry, key=lambda slot: slot.load)
            next_task = self._take_wanted(slot, may_steal)
            if next_task is None:
                hungry.remove(slot)
                continue
            self._give(slot, next_task, assigned)
            if slot.room <= 0:
                hungry.remove(slot)
        return assigned

    def _take_alone(self, slot: Slot) -> list[Task]:
        """What an idle replica has to run before anything else, and with nothing beside it."""
        slot.probe = None
        if slot.num_silent_failures >= MAX_SILENT_FAILURES - 1:
            # Is it the lines, or is the engine broken? A line that was in no failure can tell.
            slot.probe = self._take_wanted(slot, may_steal=True)
            one = slot.probe or self.suspects.take_one()
            tasks = [] if one is None else [one]
        else:
            tasks = self.suspects.take_group()
        return [task for task in tasks if task is slot.probe or task.begin()]

    def _take_wanted(self, slot: Slot, may_steal: bool) -> Task | None:
        while True:
            task = self.look_ahead.take(slot.index, may_steal)
            if task is None or task.begin():
                return task

    def _give(self, slot: Slot, task: Task, assigned: dict[int, dict[int, Task]]) -> None:
        ticket = self._num_tickets
        self._num_tickets += 1
        slot.in_flight[ticket] = task
        assigned.setdefault(slot.index, {})[ticket] = task

    def start(self, index: int, max_num_seqs: int) -> None:
        """A replica's engine has started."""
        slot = self.slots[index]
        slot.is_ready = True
        slot.max_num_seqs = max_num_seqs

    def answer(self, index: int, ticket: int, answer: Answer) -> Task:
        """A replica has answered a line, and does not have it any more. Returns the line."""
        slot = self.slots[index]
        if answer.error is None:
            slot.num_silent_failures = 0
        return slot.in_flight.pop(ticket)

    def stop(self, index: int) -> None:
        """A replica's process is about to end: no line is sent that would count as one of those
        that were in its engine when it failed.
        """
        self.slots[index].is_ending = True

    def die(self, index: int) -> Failure:
        """A replica's process has ended."""
        slot = self.slots[index]
        tasks = list(slot.in_flight.values())
        slot.in_flight.clear()
        # A line that was in no failure before is innocent, with all likelihood.
        is_innocent = not slot.is_ready or tasks == [slot.probe]
        slot.is_ready = False
        slot.is_ending = False
        slot.is_closed = False
        slot.probe = None
        slot.num_silent_failures += 1
        limit = MAX_SILENT_FAILURES if is_innocent else MAX_DOUBTFUL_FAILURES
        slot.is_given_up = slot.num_silent_failures >= limit
        return Failure(self.suspects.add(tasks), slot.is_given_up)

    def take_all(self) -> list[Task]:
        """Every line that is not answered; nothing is left."""
        tasks: list[Task] = []
        for slot in self.slots:
            tasks += slot.in_flight.values()
            slot.in_flight.clear()
        tasks += [*self.suspects.once, *self.suspects.more_often]
        self.suspects = Suspects()
        while (task := self.look_ahead.take(0)) is not None:
            tasks.append(task)
        return tasks
