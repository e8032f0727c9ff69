"""Ctrl-C and SIGTERM end a job between two answers, and never within one."""

from __future__ import annotations

import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(BaseException):
    """A signal asked the job to end. Like KeyboardInterrupt it is no Exception: nothing on the way
    shall take it for a fault and go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number  # of the signal


class StopSignals:
    """Inside the `with`, the first of the signals raises Interrupted. The second one does what it
    does elsewhere, so that a job that hangs while it ends can be ended.
    """

    def __init__(self) -> None:
        self.held = Held(self)  # `with signals.held:` does not end in the middle
        self.is_held = False
        self.received: int | None = None  # the signal that was sent
        self._handlers = {}
        # Only the main thread may set handlers, and one that is not Python's cannot be put back.
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in SIGNALS}
            self._handlers = {each: old for each, old in handlers.items() if old is not None}

    def __enter__(self) -> StopSignals:
        for number in self._handlers:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.__exit__()
        self.received = number
        if not self.is_held:
            raise Interrupted(number)


class Held:
    """A `with` block that signals wait for. (A generator's would cost more, once a line.)"""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def __enter__(self) -> None:
        self._signals.is_held = True

    def __exit__(self, *error: object) -> None:
        self._signals.is_held = False
        if self._signals.received is not None:
            raise Interrupted(self._signals.received)
