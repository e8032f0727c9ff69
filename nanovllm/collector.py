"""Python's garbage collector, while prompts and results pile up."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

RARELY = 100_000  # objects that are made between two runs; Python's own number is 700 or 2,000


@contextmanager
def collector_slowed() -> Iterator[None]:
    """Have the garbage collector run less often inside the `with`.

    A job has many small objects that all stay, such as the lists of its prompts' tokens, or a dict
    for each token whose log-probabilities are asked for. The collector goes through all of them
    again each time their number has grown by a quarter, and through the new ones several times
    more: that took about half of the time in which a million entries were made.
    """
    thresholds = gc.get_threshold()
    is_ours = 0 < thresholds[0] < RARELY  # 0: it is off, and may stay so
    if is_ours:
        gc.set_threshold(RARELY, *thresholds[1:])
    try:
        yield
    finally:
        if is_ours:
            gc.set_threshold(*thresholds)
