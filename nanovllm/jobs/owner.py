"""The one thread that runs an engine for all others."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import InvalidStateError
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any
from weakref import finalize

import torch

from nanovllm.collector import collector_slowed
from nanovllm.exclusive import exclusive
from nanovllm.jobs.tickets import Outbox, Streamed, Ticket
from nanovllm.sharing.job_order import job_order

if TYPE_CHECKING:
    from nanovllm.engine.scheduler import Scheduler
    from nanovllm.llm import LLM

LOGGER = logging.getLogger("nanovllm")
CLOSED = "this AsyncLLM was closed; make another"
ENDED = "the engine has ended; make another AsyncLLM"
DROPPED = "the request was dropped by a reset() or a step() of another thread"
MAX_EXIT_SECONDS = 10.0  # so long the interpreter's end waits for the last step


class EngineError(RuntimeError):
    """There is no result because of the engine, and the request itself may be right.

    A step failed, of which `__cause__` is the reason, or the engine was closed or reset.
    """


class EngineOwner:
    """A thread, and what others bring to it.

    They put tickets into its inbox, which never waits, and it looks there between two steps. While
    it has nothing to do it sleeps. It does not know the `AsyncLLM` that it belongs to: when that is
    forgotten, the thread finishes what is in flight, and ends.
    """

    def __init__(self, llm: LLM) -> None:
        self.outbox = Outbox()
        self._llm = llm
        self._pid = os.getpid()
        self._num_threads = torch.get_num_threads()  # of PyTorch on a CPU, as our maker has set it
        # Of this kind of queue, a `put` may come in the middle of another one, from a finalizer.
        self._inbox: SimpleQueue[Ticket | None] = SimpleQueue()  # None only wakes the thread
        self._in_flight: dict[int, Ticket] = {}  # request id -> those that the engine has
        self._streams: list[Streamed] = []  # of them
        self._scheduler = llm.scheduler  # that has their sequences; after a reset there is another
        self.failure: BaseException | None = None  # what has ended the engine, if `close` has not
        self._is_closing = False  # to end at once
        self._is_orphaned = False  # to end when nothing is in flight
        self._has_ended = False  # nobody will look into the inbox
        # A daemon: a program that forgets `close` would wait for any other thread to end.
        self._thread = threading.Thread(target=self._run, name="nanovllm-engine", daemon=True)
        # The interpreter's end ends the thread, and then the engine, whose finalizer is older.
        self._finalizer = finalize(self._thread, self.close, MAX_EXIT_SECONDS)
        self._thread.start()

    # --- for all threads --------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raise an EngineError if there will be no more results."""
        if self._is_closing or self._has_ended:
            raise EngineError(self._reason()) from self.failure

    def _reason(self) -> str:
        return CLOSED if self.failure is None else f"{ENDED}: {self.failure!r}"

    def send(self, ticket: Ticket) -> None:
        """Have a ticket queued, or aborted if it was dropped. This never waits."""
        self._inbox.put(ticket)
        if self._has_ended:  # perhaps just now, and the thread has not seen it
            self._refuse_inbox()

    def close(self, timeout: float | None = None) -> None:
        """End the thread and the engine. What is in flight fails.

        timeout: how many seconds to wait for that; None: until it is done.
        """
        if os.getpid() != self._pid:
            return  # a fork has a copy of this, and not the thread
        self._is_closing = True
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:  # else it is a callback of a future
            self._thread.join(timeout)

    def orphan(self) -> None:
        """Let the thread end when nothing is in flight: nobody can bring anything more."""
        self._is_orphaned = True
        self._inbox.put(None)

    # --- the thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        # Asked for the first time in a thread, PyTorch takes the number that was last set in any
        # other, perhaps for a step of another engine. Only what is set afterwards stays.
        torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        try:
            while self._wait_for_work():
                with collector_slowed():
                    self._work()
        finally:
            self._end()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False: this is the end."""
        while not self._is_closing and self._llm.is_finished():
            if self._is_orphaned and self._inbox.empty():
                return False
            self._receive(waits=True)
        return not self._is_closing

    def _work(self) -> None:
        """Run steps until the engine has nothing to do."""
        while not self._is_closing and not self._llm.is_finished():
            self._run_step()
            self.outbox.flush()
            self._receive()
        if not self._is_closing:
            self._fail_all(DROPPED)  # nothing is left, usually

    def _receive(self, waits: bool = False) -> None:
        """Queue and abort what others have sent. waits: until they have sent something."""
        tickets = [self._inbox.get()] if waits else []
        while not self._inbox.empty():
            tickets.append(self._inbox.get())
        if not tickets:
            return  # nearly always
        dropped: list[Ticket] = []
        new: dict[int, Ticket] = {}
        for ticket in tickets:
            if ticket is None:
                continue
            if not ticket.is_dropped:
                new[ticket.request_id] = ticket
                continue
            new.pop(ticket.request_id, None)
            if self._in_flight.pop(ticket.request_id, None) is not None:
                dropped.append(ticket)
            self._tell(ticket.acknowledge)
        try:
            scheduler = exchange(self._llm, self._scheduler, dropped, list(new.values()))
        except Exception as error:  # it sleeps, and so nothing else is in flight
            self._in_flight |= new
            self._fail_all(str(error), error)
            return
        if scheduler is not self._scheduler:
            self._fail_all(DROPPED)
            self._scheduler = scheduler
        self._in_flight |= new
        self._streams = [
            ticket
            for ticket in (*self._streams, *new.values())
            if isinstance(ticket, Streamed) and ticket.request_id in self._in_flight
        ]

    def _run_step(self) -> None:
        """Run a step, and tell of each request that has ended. On a GPU the next step runs by then:
        the engine has launched it before it waited for this one's tokens.
        """
        try:
            results, _ = self._llm.step()
            if self._streams:
                send_parts(self._llm, self._streams)
        except BaseException as error:  # a panic of a library in Rust is no Exception
            self._recover(error)
            return
        for request_id, result in results:
            ticket = self._in_flight.pop(request_id, None)
            if ticket is not None:  # else it was dropped
                self._tell(ticket.resolve, result)
        if any(stream.is_done for stream in self._streams):
            for stream in self._streams:
                if stream.is_done:
                    del self._in_flight[stream.request_id]
            self._streams = [stream for stream in self._streams if not stream.is_done]

    def _recover(self, error: BaseException) -> None:
        """After a step has failed: empty the engine, find out whether it can go on, and say so."""
        self._llm.reset()
        try:
            self._llm._check_alive()  # it is not after exit(), or when a rank has failed
            if self._llm.config.device == "cuda":
                torch.cuda.synchronize()  # raises the error that has ended the context, if one has
        except Exception:
            # First of all: whoever learns of a lost request looks here.
            self.failure = error
            self._is_closing = True
        self._fail_all(f"a step of the engine failed: {error!r}", error)

    def _tell(self, tell: Callable[..., None], *args: Any) -> None:
        """Call a method of a ticket's. Whatever its callbacks raise, this thread goes on."""
        try:
            tell(*args)
        except InvalidStateError:
            pass  # it was cancelled at the same time
        except BaseException:
            LOGGER.exception("a callback of a request's future has failed")

    def _fail_all(self, reason: str, cause: BaseException | None = None) -> None:
        """Fail all that is in flight, each ticket with an error of its own."""
        tickets = list(self._in_flight.values())
        self._in_flight.clear()
        self._streams.clear()
        for ticket in tickets:
            error = EngineError(reason)
            error.__cause__ = cause
            self._tell(ticket.fail, error)

    def _end(self) -> None:
        """Leave nobody waiting, and free the engine's memory."""
        self._has_ended = True
        self._fail_all(self._reason())
        self._refuse_inbox()
        if self._is_closing:  # an engine that is not referred to any more frees it itself
            with suppress(Exception):  # after a CUDA error every call raises it again
                self._llm.exit()
        del self._llm
        self._finalizer.detach()

    def _refuse_inbox(self) -> None:
        """Fail what comes too late. Several threads may do that at once."""
        while True:
            try:
                ticket = self._inbox.get_nowait()
            except Empty:
                return
            if ticket is None:
                continue
            if ticket.is_dropped:
                self._tell(ticket.acknowledge)
            else:
                self._tell(ticket.fail, EngineError(self._reason()))


@exclusive
def exchange(llm: LLM, scheduler: Scheduler, dropped: list[Ticket], new: list[Ticket]) -> Scheduler:
    """Abort requests of `scheduler`, and queue others; returns the scheduler that has those now.

    What comes at once is ordered as a job is, for the prefix cache. Raises a RuntimeError if the
    engine sleeps.
    """
    if scheduler is llm.scheduler:  # else a reset has dropped them
        for ticket in dropped:
            llm._requests.pop(ticket.request_id, None)  # nobody wants its result
            scheduler.abort(ticket.seqs)
    if new:
        llm._sleep.check_awake()
    streamed = {ticket.request_id for ticket in new if isinstance(ticket, Streamed)}
    for seqs in job_order([ticket.seqs for ticket in new], llm.config):
        llm._queue_sequences(seqs, is_streamed=seqs[0].request_id in streamed)
    return llm.scheduler


@exclusive
def send_parts(llm: LLM, streams: list[Streamed]) -> None:
    """Send what the last step has added to streams."""
    for stream in streams:
        try:
            stream.send_parts()
        except Exception as error:  # of a tokenizer, which must not be the others' failure
            stream.fail(error)
            stream.drop()
