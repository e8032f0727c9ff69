"""Lines that were in an engine when it failed: one of them may be why."""

from __future__ import annotations

import math
from collections import deque

from nanovllm.jobs.replicas.task import Task

MAX_RERUNS = 2  # of a line


class Suspects:
    """Who is to blame when an engine dies of one of 500 lines, found out in two more runs.

    1. The 500 are run again in groups of about 22, the square root, each group by itself. All
       groups but one are answered.
    2. The engine dies of that group. Its lines are run once more, each by itself, and all but one
       are answered. A line that has been in three failures, and was alone in the last one, is given
       up.

    No line runs more than three times, and two poisoned lines cost at most twice as much. Often no
    line is to blame (somebody killed the process, the machine was out of memory): then all are
    answered in step 1. Only a line that was there by chance all three times is given up wrongly.
    """

    def __init__(self) -> None:
        self.once: deque[Task] = deque()  # were in one failure
        self.more_often: deque[Task] = deque()  # each is run alone
        self.group_size = 1  # of those in `once`

    def __len__(self) -> int:
        return len(self.once) + len(self.more_often)

    def add(self, tasks: list[Task]) -> list[Task]:
        """Take what was in an engine when it failed; returns what is given up."""
        for task in tasks:
            task.num_deaths += 1
        was_alone = len(tasks) == 1
        if was_alone and tasks[0].num_deaths > MAX_RERUNS:
            return tasks
        for task in tasks:
            queue = self.once if task.num_deaths == 1 else self.more_often
            queue.append(task)
        self.group_size = max(self.group_size, math.isqrt(len(self.once)))
        return []

    def take_group(self) -> list[Task]:
        """Take what is to be run next, together and with nothing else; empty if nothing is left."""
        if not self.once:
            return [self.more_often.popleft()] if self.more_often else []
        size = min(self.group_size, len(self.once))
        group = [self.once.popleft() for _ in range(size)]
        if not self.once:
            self.group_size = 1
        return group

    def take_one(self) -> Task | None:
        """Take the line that is least likely to be to blame."""
        queue = self.once or self.more_often
        return queue.popleft() if queue else None
