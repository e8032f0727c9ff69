"""A progress bar that cannot end what it reports on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm.auto import tqdm

# Of how many more are done, of the values beside the bar, and of how many there are, if that has
# become known meanwhile.
Update = Callable[..., None]


@contextmanager
def progress_bar(**options: Any) -> Iterator[Update]:
    """Show tqdm's bar, or nothing from the moment it cannot be drawn: stderr may be closed, or a
    pipe that nobody reads, and a notebook may lack the widgets. `options` are tqdm's.
    """
    bar: tqdm | None = None
    with suppress(Exception):
        bar = tqdm(**options)

    def update(
        num_done: int = 1, beside: dict[str, str] | None = None, total: int | None = None
    ) -> None:
        nonlocal bar
        if bar is None:
            return
        try:
            if total is not None:
                bar.total = total
            if beside is not None:
                bar.set_postfix(beside, refresh=False)
            bar.update(num_done)
        except Exception:
            bar.disable = True  # or it would be drawn once more when it is collected
            bar = None

    try:
        yield update
    finally:
        if bar is not None:
            with suppress(Exception):
                bar.close()
