"""A progress bar that cannot end what it reports on."""

from contextlib import suppress
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm


class ProgressBar:
    """tqdm's bar, or nothing from the moment it cannot be drawn: stderr may be closed, or a pipe
    that nobody reads, and a notebook may lack the widgets.
    """

    def __init__(self, **options: Any) -> None:
        """Take tqdm's options."""
        self._bar: tqdm | None = None
        with suppress(Exception):
            self._bar = tqdm(**options)

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        bar = self._bar
        if bar is not None:
            with suppress(Exception):
                bar.close()

    def update(self, num_done: int = 1, beside: dict[str, str] | None = None) -> None:
        """Count so many more as done, and show these values beside the bar."""
        if self._bar is None:
            return
        try:
            if beside is not None:
                self._bar.set_postfix(beside, refresh=False)
            self._bar.update(num_done)
        except Exception:
            self._bar.disable = True  # or it would try again when it is collected
            self._bar = None
