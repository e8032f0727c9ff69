"""Requests in the hands of an engine's owner thread, each with who waits for it: a future of any
thread, a coroutine, or the reader of a stream.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nanovllm.text.stream import StreamedCompletion

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence
    from nanovllm.results import RequestOutput, StreamPart

Send = Callable[["Ticket"], None]  # hands a ticket to the owner thread; from any, at once
Finish = Callable[["RequestOutput"], Any]  # makes the caller's result of the engine's own


class Ticket(ABC):
    """The sequences of a request, and who is to learn what has become of them.

    A ticket that is sent to the owner thread is queued. If it is sent again, having been dropped
    meanwhile, its sequences are aborted.
    """

    def __init__(self, seqs: list[Sequence], send: Send) -> None:
        self.seqs = seqs
        self.request_id = seqs[0].request_id
        self._send = send

    @property
    @abstractmethod
    def is_dropped(self) -> bool:
        """Whether nobody waits any more."""

    @abstractmethod
    def resolve(self, result: RequestOutput) -> None:
        """The request has ended. The owner thread calls this or `fail`, once."""

    @abstractmethod
    def fail(self, error: Exception) -> None:
        """The request cannot be completed."""

    @abstractmethod
    def acknowledge(self) -> None:
        """The ticket was dropped, and the owner thread knows it. It may say so several times."""


class RequestFuture(Ticket, Future[Any]):
    """The result of a request, for any thread. `cancel` also ends a request that runs."""

    def __init__(self, seqs: list[Sequence], send: Send, finish: Finish) -> None:
        Ticket.__init__(self, seqs, send)
        Future.__init__(self)
        self._finish: Finish | None = finish
        self._is_acknowledged = False

    @property
    def is_dropped(self) -> bool:
        """Whether it was cancelled."""
        return self.cancelled()

    def cancel(self) -> bool:
        """End the request after the step that it is in; False if it has ended already."""
        is_cancelled = super().cancel()
        if is_cancelled:
            self._send(self)
        return is_cancelled

    def resolve(self, result: RequestOutput) -> None:
        """Set the result."""
        assert self._finish is not None
        finish = self._finish
        # A future may be kept for long, and with it what it refers to.
        self._finish = None
        self.seqs = []
        try:
            value = finish(result)
        except Exception as error:
            self.set_exception(error)
        else:
            self.set_result(value)

    def fail(self, error: Exception) -> None:
        """Set the exception."""
        self.set_exception(error)

    def acknowledge(self) -> None:
        """Tell `concurrent.futures.wait` and the like, which do not learn of it from `cancel`."""
        if not self._is_acknowledged:
            self._is_acknowledged = True
            self.set_running_or_notify_cancel()


# --- tickets of coroutines ------------------------------------------------------------------------


class LoopTicket(Ticket):
    """A ticket of a coroutine, which learns of everything in its event loop."""

    def __init__(self, seqs: list[Sequence], send: Send, outbox: Outbox) -> None:
        super().__init__(seqs, send)
        self.loop = asyncio.get_running_loop()
        self._outbox = outbox
        self._is_dropped = False

    @property
    def is_dropped(self) -> bool:
        """Whether the coroutine was cancelled, or its event loop closed."""
        return self._is_dropped

    def drop(self) -> None:
        """Have the request aborted, if it has not ended."""
        self._is_dropped = True
        self._send(self)

    def fail(self, error: Exception) -> None:
        """Have the error raised in the coroutine."""
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            self.loop.call_soon_threadsafe(self.receive, error)

    def acknowledge(self) -> None:
        """Do nothing: the coroutine has gone."""

    @abstractmethod
    def receive(self, message: Any) -> None:
        """Take a message, an error perhaps, in the event loop."""


class Outbox:
    """What the owner thread has to say to event loops.

    To wake a loop is a system call, after which Python may let the loop's thread run first, for
    milliseconds. So each loop is told only once in a step, of all that has happened in it.
    """

    def __init__(self) -> None:
        self._messages: dict[asyncio.AbstractEventLoop, list[tuple[LoopTicket, Any]]] = {}

    def add(self, ticket: LoopTicket, message: Any) -> None:
        """Put a message in, for `ticket.receive`."""
        self._messages.setdefault(ticket.loop, []).append((ticket, message))

    def flush(self) -> None:
        """Wake all event loops that there are messages for."""
        while self._messages:
            loop, messages = self._messages.popitem()
            try:
                loop.call_soon_threadsafe(deliver, messages)
            except RuntimeError:  # it is closed
                for ticket, _ in messages:
                    ticket.drop()


def deliver(messages: list[tuple[LoopTicket, Any]]) -> None:
    """Pass messages on, in the event loop."""
    for ticket, message in messages:
        ticket.receive(message)


class Awaited(LoopTicket):
    """A request whose result a coroutine awaits."""

    def __init__(self, seqs: list[Sequence], send: Send, outbox: Outbox, finish: Finish) -> None:
        super().__init__(seqs, send, outbox)
        self._finish = finish
        self._future: asyncio.Future[Any] = self.loop.create_future()

    async def result(self) -> Any:
        """Send the ticket, and wait for its result; if the wait is cancelled, so is the request."""
        self._send(self)
        try:
            return await self._future
        except asyncio.CancelledError:
            self.drop()
            raise

    def resolve(self, result: RequestOutput) -> None:
        """Have the result returned in the coroutine."""
        try:
            value = self._finish(result)
        except Exception as error:
            value = error
        self._outbox.add(self, value)

    def receive(self, message: Any) -> None:
        """Wake the coroutine."""
        if self._future.done():
            return  # it was cancelled meanwhile
        if isinstance(message, Exception):
            self._future.set_exception(message)
        else:
            self._future.set_result(message)


class Streamed(LoopTicket):
    """A request whose tokens a coroutine reads while they come.

    They are taken from the sequences when the reader has asked for more. So what waits for a slow
    reader is one list of parts. The next ones are longer then, and cost the owner thread no more.
    """

    def __init__(self, seqs: list[Sequence], send: Send, outbox: Outbox) -> None:
        super().__init__(seqs, send, outbox)
        self._completions = [
            StreamedCompletion(seq, index=0, number=number) for number, seq in enumerate(seqs)
        ]
        self._is_wanted = True  # whether the reader has got all that was sent
        self._messages: asyncio.Queue[list[StreamPart] | Exception] = asyncio.Queue()

    @property
    def is_done(self) -> bool:
        """Whether the last part was sent."""
        return not self._completions

    def send_parts(self) -> None:
        """Send the reader what is new, if it has asked. The owner thread calls this."""
        if not self._is_wanted and not all(seq.is_finished for seq in self.seqs):
            return
        taken = [completion.take() for completion in self._completions]
        parts = [part for part in taken if part is not None]
        if parts:
            self._is_wanted = False
            self._outbox.add(self, parts)
            self._completions = [each for each in self._completions if not each.is_done]

    async def parts(self) -> AsyncGenerator[StreamPart, None]:
        """Send the ticket, and yield all parts; leaving this early ends the request."""
        num_running = len(self.seqs)
        self._send(self)
        try:
            while num_running > 0:
                parts = await self._messages.get()
                if isinstance(parts, Exception):
                    num_running = 0
                    raise parts
                self._is_wanted = True
                num_running -= sum(part.finish_reason is not None for part in parts)
                for part in parts:
                    yield part
        finally:
            if num_running > 0:
                self.drop()

    def resolve(self, result: RequestOutput) -> None:
        """Never called: the engine reports no request whose sequences somebody reads."""
        raise AssertionError("a stream has no result")

    def receive(self, message: list[StreamPart] | Exception) -> None:
        """Wake the reader."""
        self._messages.put_nowait(message)
