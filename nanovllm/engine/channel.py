"""Commands from rank 0 to the worker processes, through shared memory; and how those end."""

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
    """A shared-memory block, of a fresh name, that rank 0 writes and every worker reads; and one for the GPUs' words.

    Each worker has two semaphores: `ready` (a frame is there) and `taken` (the worker is up, and has copied the last
    one out). Rank 0 waits for all `taken` before it writes again; a long message takes several frames. They are not
    Events: setting one waits for those that wait for it, for ever if one of them was killed.
    """

    def __init__(self, num_workers: int, size: int = 1 << 20) -> None:
        context = multiprocessing.get_context("spawn")
        self.memory = SharedMemory(create=True, size=size)
        self.words = SharedMemory(create=True, size=4096)  # see HostWords
        self.ready = [context.Semaphore(0) for _ in range(num_workers)]
        self.taken = [context.Semaphore(0) for _ in range(num_workers)]
        self.errors = context.SimpleQueue()  # (rank, traceback) of workers that raised
        self.processes: list[multiprocessing.process.BaseProcess] = []
        self.is_closing, self.failure = False, ""
        self.is_whole = True  # no message was left half sent
        self.lock = threading.RLock()  # of whoever finds a dead worker first: a call, or `watch`
        self.on_death: Callable[[], None] = lambda: None  # ends what this rank's GPU is waiting for
        self.on_close: Callable[[], None] = lambda: None

    def __getstate__(self) -> dict[str, Any]:
        # A worker's copy needs no handles of its siblings.
        return {**self.__dict__, "processes": [], "lock": None, "on_death": None, "on_close": None}

    def send(self, method: str, args: tuple) -> None:
        """Rank 0: have every worker call `method(*args)`; RuntimeError if one has died, or a call was cut short."""
        if not self.is_whole:
            raise RuntimeError(
                "an exception cut a command to the tensor-parallel ranks short; make a new LLM"
            )
        message = pickle.dumps((method, args), protocol=pickle.HIGHEST_PROTOCOL)
        capacity, self.is_whole = self.memory.size - HEADER.size, False
        for start in range(0, len(message), capacity):
            frame = message[start : start + capacity]
            self._wait_taken()
            HEADER.pack_into(self.memory.buf, 0, len(message), len(frame))
            self.memory.buf[HEADER.size : HEADER.size + len(frame)] = frame
            for ready in self.ready:
                ready.release()
        self.is_whole = True

    def _wait_taken(self) -> None:
        for taken in self.taken:
            while not taken.acquire(timeout=1.0):
                self.check_workers()

    def wait_until_up(self) -> None:
        """Rank 0: wait until every worker is up; RuntimeError if one has died."""
        self._wait_taken()
        for taken in self.taken:
            taken.release()

    def receive(self, rank: int) -> tuple[str, tuple]:
        """Worker: wait for the next command."""
        message, length = b"", 1
        while len(message) < length:
            self.ready[rank - 1].acquire()
            length, frame_length = HEADER.unpack_from(self.memory.buf, 0)
            message += bytes(self.memory.buf[HEADER.size : HEADER.size + frame_length])
            self.taken[rank - 1].release()
        return pickle.loads(message)

    def watch(self) -> None:
        """Rank 0, in a thread: `kill` when a worker dies, so that nothing goes on waiting for it."""
        multiprocessing.connection.wait([process.sentinel for process in self.processes])
        if not self.is_closing:
            self.kill()

    def check_workers(self) -> None:
        """Rank 0: raise a RuntimeError, with the worker's traceback, if one has failed."""
        with self.lock:
            dead = [
                (rank, process)
                for rank, process in enumerate(self.processes, start=1)
                if not process.is_alive()
            ]
            if (
                not self.failure and not self.errors.empty()
            ):  # after is_alive: a worker says why before it dies
                rank, traceback = self.errors.get()
                self.failure = f"tensor-parallel rank {rank} failed:\n{traceback}"
            if not self.failure and dead:
                rank, process = dead[0]
                self.failure = (
                    f"tensor-parallel rank {rank} died with exit code {process.exitcode} (if it never started: does "
                    "the script guard its main part with `if __name__ == '__main__'`?)"
                )
        if self.failure:
            raise RuntimeError(self.failure)

    def kill(self) -> RuntimeError | None:
        """Rank 0: end the workers wherever they are, and then what this rank's GPU is waiting for.

        Returns what `check_workers` had to say of them.
        """
        if not self.is_closing:
            time.sleep(0.5)  # a worker that failed first is about to say why
        with self.lock:
            failure = None
            try:
                self.check_workers()
            except RuntimeError as error:
                failure = error
            if not self.is_closing:
                self.is_closing = True
                for process in self.processes:
                    process.kill()
                    process.join()
                with suppress(Exception):  # what it says would hide why it was called
                    self.on_death()
        return failure

    def close(self) -> None:
        """Rank 0: end the workers that have not ended by themselves, and free the shared memory."""
        with self.lock:
            for process in self.processes:
                process.join(timeout=5.0)
                if process.is_alive():
                    process.kill()
                    process.join()
            self.processes.clear()
            self.on_close()
            self.on_death = self.on_close = lambda: None  # they refer to who refers to this
            for memory in (self.memory, self.words):
                memory.close()
                memory.unlink()
