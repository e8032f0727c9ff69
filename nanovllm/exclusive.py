"""Who may use an engine: one call at a time, in the process that made it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from nanovllm.engine.llm_engine import LLMEngine

E = TypeVar("E", bound="LLMEngine")
P = ParamSpec("P")
R = TypeVar("R")


def exclusive(method: Callable[Concatenate[E, P], R]) -> Callable[Concatenate[E, P], R]:
    """Make one method at a time run on an engine: other threads wait until it returns.

    A call from inside another one, by a signal handler or an object's `__del__`, could only wait
    for itself, and is a RuntimeError. So exclusive methods do not call each other.
    """

    @wraps(method)
    def call(self: E, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._check_process()  # first: a fork may have copied a lock that nobody will release
        try:
            # No helper takes the lock: Ctrl-C between its `acquire` and the `with` would keep it.
            with self._lock:
                if self._is_busy:
                    raise RuntimeError(
                        f"{method.__name__} was called from inside another call of this engine, by "
                        "a signal handler or a callback; call it when that one has returned"
                    )
                try:
                    self._is_busy = True
                    return method(self, *args, **kwargs)
                finally:
                    self._is_busy = False
        finally:
            if self._to_abort:  # what came meanwhile, and could not wait
                self._abort_if_idle()

    return call
