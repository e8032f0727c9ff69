"""The thread that serves replicas: it sends them lines, takes their answers, and starts those anew
that have died.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import wait

from nanovllm.jobs.lines.line import Answer, Line
from nanovllm.jobs.replicas.dispatcher import Dispatcher, Failure
from nanovllm.jobs.replicas.look_ahead import LookAhead
from nanovllm.jobs.replicas.replica import Replica
from nanovllm.jobs.replicas.replica_process import MAX_CLOSE_SECONDS, Failed, Ready
from nanovllm.jobs.replicas.run import Run
from nanovllm.jobs.replicas.task import Task

logger = logging.getLogger(__name__)
# So long a replica waits for a line of its own prefixes, seconds after the last line was read,
# before it gets one of another replica's prefixes: the reader may just be at the beginning.
PATIENCE = 0.01
POLL_SECONDS = 1.0  # from one look at what no pipe tells to the next
END_POLL_SECONDS = 0.05  # the same while a process is about to end


class Supervisor:
    """Replicas, and the thread that serves them; all other threads only add tasks."""

    def __init__(
        self,
        order_bytes: bytes,
        environments: list[dict[str, str]],
        block_size: int,
        error_answer: Callable[[Line, str], Answer],
    ) -> None:
        """Start a replica for each of `environments`, and wait until all are ready. Raises what one
        of them cannot start for; then none is left.
        """
        self.num_restarts = 0
        self.failure: BaseException | None = None  # why nothing can be answered any more
        # Taken as it is, and not by `with self.room`: there, Ctrl-C could come between the two.
        self.lock = threading.RLock()
        self.room = threading.Condition(self.lock)  # notified when the look-ahead may have room
        self._order_bytes = order_bytes
        self._environments = environments
        self._error_answer = error_answer
        # These are guarded by the lock.
        self._look_ahead = LookAhead(block_size)
        self._dispatcher = Dispatcher(len(environments), self._look_ahead)
        self._last_added = 0.0  # when, by time.monotonic()
        self._is_hungry = True  # a new line has to wake the thread
        self._is_closing = False
        self._runs: set[Run] = set()
        # The rest is the thread's.
        self._replicas: list[Replica] = []
        self._ending: set[int] = set()  # replicas whose pipe is at its end
        self._last_errors: dict[int, Failed] = {}  # of replicas that said what they failed of
        self._pid = os.getpid()
        self._wake_receiver, self._wake_sender = Pipe(duplex=False)
        try:
            for environment in environments:
                self._replicas.append(Replica(order_bytes, environment))
            self._wait_until_ready()
        except BaseException:
            end_replicas(self._replicas, timeout=0.0)
            raise
        self._thread = threading.Thread(target=self._serve, name="replicas", daemon=True)
        self._thread.start()

    def _wait_until_ready(self) -> None:
        starting = {replica.link: index for index, replica in enumerate(self._replicas)}
        while starting:
            for link in wait(list(starting)):
                index = starting.pop(link)  # type: ignore[call-overload]
                replica = self._replicas[index]
                try:
                    message = replica.receive()
                except EOFError:
                    how = replica.end(timeout=1.0)
                    raise RuntimeError(
                        f"replica {index} ended with {how} while its engine started"
                    ) from None
                if isinstance(message, Failed):
                    raise message.error from RuntimeError(f"in a replica:\n{message.traceback}")
                self._dispatcher.start(index, message.max_num_seqs)

    # --- for other threads -----------------------------------------------------------------------

    def pids(self) -> list[int]:
        """The process ids of the replicas."""
        return [replica.pid for replica in self._replicas if not replica.has_ended]

    @property
    def has_room(self) -> bool:
        """Whether lines should be read ahead; with the lock held."""
        return self._look_ahead.num_waiting < self._look_ahead.max_lines

    def add(self, task: Task) -> None:
        """Have a line answered. Raises a RuntimeError if that is impossible now."""
        with self.lock:
            self.check()
            self._look_ahead.add(task)
            self._last_added = time.monotonic()
            must_wake, self._is_hungry = self._is_hungry, False
        if must_wake:
            self._wake()

    def open(self, run: Run) -> None:
        """Begin a run: it is told if nothing can be answered any more."""
        with self.lock:
            self.check()
            self._runs.add(run)

    def leave(self, run: Run) -> None:
        """End a run: lines of it that still wait are dropped."""
        with self.lock:
            run.is_abandoned = True
            self._runs.discard(run)
            self.room.notify_all()

    def check(self) -> None:
        """Raise a RuntimeError if nothing can be answered any more."""
        if self.failure is not None:
            raise RuntimeError(str(self.failure)) from self.failure
        if self._is_closing:
            raise RuntimeError("this pool of replicas is closed; make a new one")

    def close(self) -> None:
        """End all replicas; what is not answered fails. Returns when they have ended."""
        if os.getpid() != self._pid:  # a fork: they are the parent's
            return
        with self.lock:
            is_first, self._is_closing = not self._is_closing, True
        if is_first:
            self._wake()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(2 * MAX_CLOSE_SECONDS)
        if self._thread.is_alive():  # it waits for a replica that somebody has stopped
            for replica in self._replicas:
                replica.process.kill()
            self._thread.join()

    def _wake(self) -> None:
        self._wake_sender.send_bytes(b"1")

    # --- the thread ------------------------------------------------------------------------------

    def _serve(self) -> None:
        error: BaseException = RuntimeError("the pool of replicas was closed")
        try:
            while not self._is_closing and self.failure is None:
                timeout = self._send_lines()
                self._receive(timeout)
                self._find_dead()
        except BaseException as unexpected:
            error = unexpected
        self._fail(self.failure or error)
        for replica, slot in zip(self._replicas, self._dispatcher.slots, strict=True):
            if not slot.is_ready:  # it reads nothing yet, and would not notice
                replica.process.kill()
        end_replicas(self._replicas, timeout=MAX_CLOSE_SECONDS + 1.0)

    def _send_lines(self) -> float:
        """Send what replicas have room for; returns for how long nothing else is to be sent."""
        look_ahead = self._look_ahead
        dispatcher = self._dispatcher
        with self.lock:
            is_quiet = time.monotonic() - self._last_added >= PATIENCE
            may_steal = is_quiet or not self.has_room
            assigned = dispatcher.assign(may_steal)
            is_impatient = dispatcher.is_hungry and look_ahead.num_waiting > 0
            self._is_hungry = dispatcher.is_hungry
            # Not for every single line: each time costs two changes of the running thread.
            if look_ahead.num_waiting <= look_ahead.max_lines * 7 // 8:
                self.room.notify_all()
        for index, tasks in assigned.items():
            self._replicas[index].send([(ticket, task.line) for ticket, task in tasks.items()])
        if is_impatient:
            return PATIENCE
        return END_POLL_SECONDS if self._ending else POLL_SECONDS

    def _receive(self, timeout: float) -> None:
        """Wait until something happens, and take what has come."""
        links = {
            replica.link: index
            for index, replica in enumerate(self._replicas)
            if index not in self._ending and not replica.link.closed
        }
        for link in wait([self._wake_receiver, *links], timeout):
            if link is self._wake_receiver:
                self._wake_receiver.recv_bytes()
                continue
            index = links[link]  # type: ignore[index]
            try:
                message = self._replicas[index].receive()
            except EOFError:
                self._ending.add(index)
                self._stop(index)
                continue
            if isinstance(message, Ready):
                with self.lock:
                    self._dispatcher.start(index, message.max_num_seqs)
            elif isinstance(message, Failed):
                self._last_errors[index] = message
                self._stop(index)
            else:
                self._take_answers(index, message)

    def _stop(self, index: int) -> None:
        with self.lock:
            self._dispatcher.stop(index)

    def _take_answers(self, index: int, answers: list[tuple[int, Answer]]) -> None:
        dispatcher = self._dispatcher
        with self.lock:
            tasks = [dispatcher.answer(index, ticket, answer) for ticket, answer in answers]
            dispatcher.slots[index].rate.add(len(tasks), time.monotonic())
        # Without the lock: a future's callbacks, which run here, may take locks of their own.
        for task, (_, answer) in zip(tasks, answers, strict=True):
            task.finish(answer)

    def _find_dead(self) -> None:
        """Start replicas anew that have ended."""
        for index, replica in enumerate(self._replicas):
            # The pipe tells of an end at once, unless a fork of this process has it open, too.
            if replica.link.closed or not replica.has_ended:
                continue
            if index not in self._ending and replica.link.poll():
                continue  # it has said something before it ended
            self._ending.discard(index)
            how = replica.end()
            error = self._last_errors.pop(index, None)
            reason = f"{type(error.error).__name__}: {error.error}" if error is not None else how
            with self.lock:
                failure = self._dispatcher.die(index)
            self._give_up_lines(failure, reason)
            if failure.is_replica_given_up:
                logger.error("replica %d has failed too often (%s); it is given up", index, reason)
                self._check_any_left(index, reason, error)
            else:
                logger.warning("replica %d has ended (%s); it is started anew", index, reason)
                self.num_restarts += 1
                self._replicas[index] = Replica(self._order_bytes, self._environments[index])

    def _give_up_lines(self, failure: Failure, reason: str) -> None:
        for task in failure.given_up_lines:
            message = (
                f"the engine failed in all {task.num_deaths} runs of this line, the last of them "
                f"without any other line ({reason})"
            )
            task.finish(self._error_answer(task.line, message))

    def _check_any_left(self, index: int, reason: str, error: Failed | None) -> None:
        slots = self._dispatcher.slots
        if not all(slot.is_given_up for slot in slots):
            return
        times = slots[index].num_silent_failures
        failure = RuntimeError(
            f"the engine failed {times} times in a row without a good answer, the last time with: "
            f"{reason}"
        )
        if error is not None:
            failure.__cause__ = RuntimeError(f"in a replica:\n{error.traceback}")
        self.failure = failure

    def _fail(self, error: BaseException) -> None:
        with self.lock:
            self.failure = error
            tasks = self._dispatcher.take_all()
            runs = list(self._runs)
            self.room.notify_all()  # readers wait for nothing any more
        for task in tasks:
            task.fail(error)
        for run in runs:
            run.fail(error)


def end_replicas(replicas: list[Replica], timeout: float) -> None:
    """End processes: those that run an engine by themselves, the others, or those that take longer
    than `timeout` seconds, by force.
    """
    for replica in replicas:
        replica.hang_up()
    deadline = time.monotonic() + timeout
    for replica in replicas:
        replica.end(max(0.0, deadline - time.monotonic()))
