"""A line on its way through a `ReplicaPool`, and who waits for its answer."""

from __future__ import annotations

from concurrent.futures import Future

from nanovllm.jobs.lines.line import Answer, Line


class Task:
    """A line and what the pool has to know of it.

    `begin`, `finish` and `fail` tell whoever waits for the answer; a thread of the pool calls them.
    A task that has finished is kept until all older ones have, thousands perhaps. So `finish` drops
    the line, which may be megabytes.
    """

    __slots__ = ("index", "line", "num_deaths", "prefix_keys")

    def __init__(self, line: Line) -> None:
        self.line = line
        self.num_deaths = 0  # runs in which the engine failed while this line was in it
        # For `LookAhead`:
        self.prefix_keys: tuple[int, ...] = ()  # of its first characters, of more, of many
        self.index = -1  # its place among all lines that were added, from 0

    def begin(self) -> bool:
        """Return whether the answer is still wanted; called each time a replica gets the line."""
        raise NotImplementedError

    def finish(self, answer: Answer) -> None:
        """Hand over the answer."""
        raise NotImplementedError

    def fail(self, error: BaseException) -> None:
        """Say that there will be no answer."""
        raise NotImplementedError


class FutureTask(Task):
    """A line whose answer a future awaits."""

    __slots__ = ("future",)

    def __init__(self, line: Line) -> None:
        super().__init__(line)
        self.future: Future[Answer] = Future()

    def begin(self) -> bool:
        """Return whether the answer is still wanted: nobody has cancelled the future."""
        return self.future.running() or self.future.set_running_or_notify_cancel()

    def finish(self, answer: Answer) -> None:
        """Hand over the answer."""
        del self.line
        self.future.set_result(answer)

    def fail(self, error: BaseException) -> None:
        """Say that there will be no answer."""
        if not self.future.cancelled():
            self.future.set_exception(error)
