"""Python's garbage collector, kept from going through thousands of prompts again and again."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# The collector runs when so many objects more have been made than freed: 700, or 2,000 in newer
# Pythons. Each time it goes through lists that are new, token by token, to find objects that refer
# to each other in a circle. A step makes no such objects, so it finds nothing.
RARE_THRESHOLD = 100_000

_lock = threading.Lock()
_num_users = 0  # threads inside of `rare_collections`
_usual = gc.get_threshold()  # to be restored by the last of them


@contextmanager
def rare_collections() -> Iterator[None]:
    """Have the garbage collector of this process run rarely until the end of the `with` block.

    It is not turned off: what other code of the process leaves behind is collected, a bit later.
    """
    global _num_users, _usual
    with _lock:
        if _num_users == 0:
            _usual = gc.get_threshold()
            if 0 < _usual[0] < RARE_THRESHOLD:  # 0: the user has turned it off
                gc.set_threshold(RARE_THRESHOLD, *_usual[1:])
        _num_users += 1
    try:
        yield
    finally:
        with _lock:
            _num_users -= 1
            if _num_users == 0:
                gc.set_threshold(*_usual)
