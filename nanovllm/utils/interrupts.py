"""Ctrl-C, held back where it would leave something half done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the `with` block, and raise it there."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    # Only the main thread is ever interrupted, and only it may set a handler. A handler that is not
    # Python's reads as None, and could not be put back.
    if not is_main_thread or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    was_pressed = False

    def remember(signal_number: int, frame: FrameType | None) -> None:
        nonlocal was_pressed
        was_pressed = True

    handler = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if was_pressed:
            signal.raise_signal(signal.SIGINT)
