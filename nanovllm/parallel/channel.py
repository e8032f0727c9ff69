"""Rank 0's line to the worker processes: commands through shared memory, and how workers are ended.

ranks.py starts these processes; its `kill_ranks` tells in order how a fault ends all of them.
"""

import multiprocessing
import multiprocessing.connection
import pickle
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from typing import Any

HEADER = struct.Struct("<QQ")  # bytes of the whole message, bytes of it in this frame


class Channel:
    """Shared memory that rank 0 writes and every worker reads, and the workers' processes.

    A message (the name of a method, and its arguments) is cut into frames of the memory's size.
    Each worker has two semaphores: `ready` says that there is a frame to copy out; `taken` that the
    worker has copied the last frame out or, at the beginning, that it is up. Rank 0 waits for all
    `taken` before it writes the next frame. They are not Events: `Event.set` waits for those that
    wait for the event, and so for ever if one of them was killed meanwhile.
    """

    def __init__(self, num_workers: int, size: int = 1 << 20) -> None:
        context = multiprocessing.get_context("spawn")
        # Both have names that are chosen fresh, so two engines never meet in one.
        self.memory = SharedMemory(create=True, size=size)
        self.words = SharedMemory(create=True, size=4096)  # for the GPUs, see HostWords
        self.ready = [context.Semaphore(0) for _ in range(num_workers)]
        self.taken = [context.Semaphore(0) for _ in range(num_workers)]
        self.errors = context.SimpleQueue()  # (rank, traceback) of workers that raised
        # The rest is for rank 0 only.
        self.is_whole = True  # no message was left half sent
        self.processes: list[multiprocessing.process.BaseProcess] = []  # of ranks 1, 2, ...
        self.is_closing = False  # workers that end from now on have not failed
        self.failure = ""  # what the first worker that failed has failed of
        # A call of the user's and the thread of `watch` may both find a dead worker. The lock is
        # held by the one that deals with it, and guards `processes`, `is_closing` and `failure`.
        self.lock = threading.RLock()
        self.on_death: Callable[[], None] = lambda: None  # ends what this rank's GPU waits for
        self.on_close: Callable[[], None] = lambda: None  # called before the memory is freed

    def __getstate__(self) -> dict[str, Any]:
        # A worker needs no handles of its siblings, and locks cannot be sent.
        return {**self.__dict__, "processes": [], "lock": None, "on_death": None, "on_close": None}

    def send(self, method: str | Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Rank 0: have workers call a method, or a function of a module. Raises a RuntimeError if
        one has died, or a command was cut off.
        """
        if not self.is_whole:
            raise RuntimeError(
                "an exception cut a command to the tensor-parallel ranks short; make a new LLM"
            )
        message = pickle.dumps((method, args), protocol=pickle.HIGHEST_PROTOCOL)
        capacity = self.memory.size - HEADER.size
        self.is_whole = False
        for start in range(0, len(message), capacity):
            frame = message[start : start + capacity]
            self._wait_taken()
            HEADER.pack_into(self._buffer, 0, len(message), len(frame))
            self._buffer[HEADER.size : HEADER.size + len(frame)] = frame
            for ready in self.ready:
                ready.release()
        self.is_whole = True

    def receive(self, rank: int) -> tuple[str | Callable[..., Any], tuple[Any, ...]]:
        """Worker: wait for the next command; returns the method and its arguments."""
        message = b""
        while True:
            self.ready[rank - 1].acquire()
            message_length, frame_length = HEADER.unpack_from(self._buffer, 0)
            message += bytes(self._buffer[HEADER.size : HEADER.size + frame_length])
            self.taken[rank - 1].release()
            if len(message) == message_length:
                return pickle.loads(message)

    @property
    def _buffer(self) -> memoryview:
        assert self.memory.buf is not None  # it is, until `close`
        return self.memory.buf

    def _wait_taken(self) -> None:
        """Rank 0: wait until all have copied the last frame; RuntimeError if one has died."""
        for taken in self.taken:
            while not taken.acquire(timeout=1.0):
                self.check_workers()

    def report_up(self, rank: int) -> None:
        """Worker: say that it is up."""
        self.taken[rank - 1].release()

    def wait_until_up(self) -> None:
        """Rank 0: wait until every worker is up; RuntimeError if one has died."""
        self._wait_taken()
        for taken in self.taken:  # the first `send` waits for them again
            taken.release()

    def watch(self) -> None:
        """Rank 0, in a thread: `kill` when a worker dies, so that nothing waits for it for ever."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes])
        if not self.is_closing:
            self.kill()

    def check_workers(self) -> None:
        """Rank 0: raise RuntimeError, with a worker's traceback, if one has failed."""
        with self.lock:
            self._find_failure()
        if self.failure:
            raise RuntimeError(self.failure)

    def _find_failure(self) -> None:
        if self.failure or not self.processes:
            return
        ranks = enumerate(self.processes, start=1)
        dead = [(rank, worker.exitcode) for rank, worker in ranks if not worker.is_alive()]
        # Only now: a worker says why before it dies, so those in `dead` have said it.
        if not self.errors.empty():
            rank, traceback = self.errors.get()
            self.failure = f"tensor-parallel rank {rank} failed:\n{traceback}"
        elif dead:
            rank, exit_code = dead[0]
            self.failure = (
                f"tensor-parallel rank {rank} died with exit code {exit_code} (if it never "
                "started: does the script guard its main part with `if __name__ == '__main__'`?)"
            )

    def kill(self) -> RuntimeError | None:
        """Rank 0: end the workers, wherever they are, and then what its own GPU is waiting for.

        The first call does it; any other, from whatever thread, waits for that and does nothing.
        Returns an error that says what worker has failed of what, if one has.
        """
        if not self.is_closing:
            time.sleep(0.5)  # a worker that failed may be about to say why
        with self.lock:
            self._find_failure()
            if not self.is_closing:
                self.is_closing = True
                for process in self.processes:
                    process.kill()
                    process.join()
                with suppress(Exception):  # an error here would hide the one that this is about
                    self.on_death()
            return RuntimeError(self.failure) if self.failure else None

    def close(self) -> None:
        """Rank 0: end the workers that have not ended yet, and free the shared memory."""
        with self.lock:
            for process in self.processes:
                process.join(timeout=5.0)
                if process.is_alive():
                    process.kill()
                    process.join()
            self.processes.clear()
            self.on_close()
            # They are methods of objects that refer to this channel: a reference cycle, which would
            # keep them until Python's cycle collector comes round.
            self.on_death = lambda: None
            self.on_close = lambda: None
            for memory in (self.memory, self.words):
                memory.close()
                memory.unlink()
            # Their names go with the last reference, and the engine may keep this channel for long.
            del self.ready, self.taken, self.errors
