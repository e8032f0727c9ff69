"""An engine whose weights a trainer updates, and whose memory it borrows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.requests import Request
from nanovllm.engine.sequence import Sequence
from nanovllm.exclusive import exclusive
from nanovllm.training.memory import meet, on_rank
from nanovllm.training.sleep import (
    Place,
    SleepState,
    check_level,
    checked_tags,
)
from nanovllm.training.weights import (
    TensorNames,
    Update,
    Weights,
    check_reloadable,
    finish,
    is_repeatable,
    load_on_all_ranks,
    names_of,
    pairs_of,
)
from nanovllm.utils.interrupts import uninterrupted


class Trainable(LLMEngine):
    """What an engine can do between two `generate` calls of a training loop. All ranks do it."""

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(model, **options)
        self._sleep = SleepState()

    @exclusive
    def load_weights(self, weights: Weights) -> set[str]:
        """Replace weights in place: CUDA graphs stay as they are. Cached prefixes are forgotten.

        Args:
            weights: a dict or (name, tensor) pairs, the names and shapes those of the checkpoint,
                as `state_dict()` of transformers has them; or the directory of a checkpoint. What
                is not named stays. Tensors may be on any device, and be bfloat16, float16, float32
                or float64; those of quantised layers are as in the checkpoint. They are copied one
                after the other, so pairs that come from a generator never have to be in memory
                together.

        Returns:
            The names of the model's tensors that were loaded.

        Raises:
            ValueError: for a name that the model does not have, a wrong shape or dtype. Nothing has
                been loaded then of a dict, a list or a directory; of a generator what came before.
            RuntimeError: while requests are unfinished, and while the weights sleep.
        """
        runner = self._idle_runner()
        if self._sleep.weights is not Place.DEVICE:
            raise RuntimeError("the weights sleep; call wake_up(tags=['weights']) first")
        names = names_of(runner)
        if is_repeatable(weights):
            update = Update(names)
            for name, tensor in pairs_of(weights):
                update.choose(name, tensor)
        update = Update(names)
        loaded: set[str] = set()
        try:
            for name, tensor in pairs_of(weights):
                ours = update.choose(name, tensor)
                if ours is not None:
                    with self._on_all_ranks():
                        load_on_all_ranks(runner, ours, tensor)
                    loaded.add(ours)
            with self._on_all_ranks():
                runner.call(finish)
                runner.call(meet)
        finally:
            self.scheduler.block_manager.forget_prefixes()
            self._note_loaded(names, loaded)
        if runner.is_cuda:
            torch.cuda.synchronize(runner.device)  # the caller may change its tensors now
        return loaded

    def _note_loaded(self, names: TensorNames, loaded: set[str]) -> None:
        state = self._sleep
        if state.missing:
            state.loaded |= loaded
            state.missing = names.missing(state.loaded)

    @exclusive
    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes. True, always: requests that run keep the blocks they hold."""
        self._check_alive()
        self.scheduler.block_manager.forget_prefixes()
        return True

    @exclusive
    def sleep(self, level: int = 1) -> None:
        """Give the memory of the KV cache and the weights back, until `wake_up`.

        Args:
            level: 1 copies the weights to pinned memory of the host (on a CPU they stay where they
                are). 2 drops them: after `wake_up` they have to be loaded by `load_weights`.

        Raises:
            ValueError: for another level, or for 2 if the weights could not be loaded again.
            RuntimeError: while requests are unfinished.
        """
        check_level(level)
        runner = self._idle_runner()
        if level == 2:
            check_reloadable(runner.model)
        state = self._sleep
        self.scheduler.block_manager.forget_prefixes()
        with self._on_all_ranks(runner.stream if runner.is_cuda else None):
            if state.has_cache:
                state.has_cache = False
                runner.call(on_rank, "free_cache")
            is_on_device = state.weights is Place.DEVICE
            if level == 1 and is_on_device:
                runner.call(on_rank, "weights_to_host")
                state.weights = Place.HOST
            elif level == 2 and state.weights is not Place.NOWHERE:
                runner.call(on_rank, "drop_weights", is_on_device)
                state.weights = Place.NOWHERE
                state.loaded = set()
                state.missing = names_of(runner).missing(state.loaded)
            runner.call(meet)

    @exclusive
    def wake_up(self, tags: str | list[str] | None = None) -> None:
        """Take the memory again that `sleep` gave back.

        On a GPU the first time takes as long as capturing the CUDA graphs, some seconds; the graphs
        are kept from then on.

        Args:
            tags: what is to wake up, "weights" or "kv_cache" or a list of them; None: both. So a
                trainer can have new weights loaded while it still needs the memory of the cache.

        Raises:
            ValueError: for another tag.
            torch.cuda.OutOfMemoryError: if somebody else holds the memory. The engine sleeps on, if
                it has one rank; of several, it has ended.
        """
        parts = checked_tags(tags)
        runner = self._idle_runner()
        state = self._sleep
        if state.is_awake:
            return
        with self._on_all_ranks(runner.stream if runner.is_cuda else None):
            if "weights" in parts and state.weights is not Place.DEVICE:
                from_host = state.weights is Place.HOST
                runner.call(on_rank, "restore_weights", from_host)
                state.weights = Place.DEVICE
            if "kv_cache" in parts and not state.has_cache:
                runner.call(on_rank, "restore_cache")
                state.has_cache = True
            if state.is_awake and not state.is_prepared:
                state.has_cache = False  # if this fails
                runner.call(on_rank, "prepare_steps")
                state.has_cache = True
                state.is_prepared = True
            runner.call(meet)

    def is_sleeping(self) -> bool:
        """Whether some part of the engine sleeps, so that it takes no requests."""
        return not self._sleep.is_awake

    def _queue(self, request: Request, is_streamed: bool = False) -> list[Sequence]:
        self._sleep.check_awake()
        return super()._queue(request, is_streamed)

    def _check_idle(self) -> None:
        super()._check_idle()
        self._sleep.check_awake()

    def _idle_runner(self) -> ModelRunner:
        """Rank 0's runner; a RuntimeError while requests are unfinished. It may be asleep."""
        runner = self._check_alive()
        super()._check_idle()
        return runner

    @contextmanager
    def _on_all_ranks(self, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
        """Around what all ranks do alike. Ctrl-C must not stop one of them half-way, nor come
        between what is done and what is remembered of it. As in a step, a rank that fails ends the
        engine, and the modes of the user's thread are not ours.

        stream: of CUDA, on which it is done; None: the current one.
        """
        try:
            with (
                uninterrupted(),
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(self.config.device, enabled=False),
                torch.device("cpu"),
                nullcontext() if stream is None else torch.cuda.stream(stream),
            ):
                yield
            if self._channel is not None:
                self._channel.check_workers()
        except BaseException as error:
            if self._channel is not None:
                self._fail(error)
            raise
