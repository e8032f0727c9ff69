"""Memory that an engine gives back while somebody else needs it, and takes again.

A trainer on the same GPU needs, for its optimizer, the memory in which the rollouts have their KV
cache and their weights. What sleeps is really freed, for other processes too. The CUDA graphs hold
addresses, and the memory that is taken again lies elsewhere: so they go with the KV cache, and are
captured again when all is awake.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from nanovllm.kernels.cpu_memory import move_to_huge_pages

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner

TAGS = ("weights", "kv_cache")


class Place(Enum):
    """Where the weights are."""

    DEVICE = auto()  # where steps read them
    HOST = auto()  # copied to pinned memory of the host
    NOWHERE = auto()


@dataclass
class SleepState:
    """Which parts of an engine are awake."""

    weights: Place = Place.DEVICE
    has_cache: bool = True
    loaded: set[str] = field(default_factory=set)  # names of tensors, since the last were dropped
    missing: list[str] = field(default_factory=list)  # those that were dropped, without `loaded`

    @property
    def is_awake(self) -> bool:
        """Whether all parts are where steps need them."""
        return self.weights is Place.DEVICE and self.has_cache

    def check_awake(self) -> None:
        """Raise a RuntimeError unless the engine can run requests."""
        if not self.is_awake:
            parts = [] if self.weights is Place.DEVICE else ["weights"]
            parts += [] if self.has_cache else ["kv_cache"]
            raise RuntimeError(f"the engine sleeps ({', '.join(parts)}); call wake_up() first")
        if self.missing:
            raise RuntimeError(
                f"sleep(level=2) has dropped the weights, and {len(self.missing)} tensors have not "
                f"been loaded since ({self.missing[0]}, ...); call load_weights() with all of them"
            )


def check_level(level: int) -> None:
    """Raise a ValueError for what is no level of sleep."""
    if isinstance(level, bool) or level not in (1, 2):
        raise ValueError(
            f"level must be 1 (weights go to the host) or 2 (they are dropped), not {level!r}"
        )


def checked_tags(tags: str | list[str] | None) -> tuple[str, ...]:
    """The tags as a tuple, all of them for None; a ValueError for one that does not exist."""
    if tags is None:
        return TAGS
    listed = (tags,) if isinstance(tags, str) else tuple(tags)
    for tag in listed:
        if tag not in TAGS:
            raise ValueError(f"tags must be of {', '.join(TAGS)}, or None for all, not {tag!r}")
    return listed


# --- on every rank ------------------------------------------------------------------------------


def free_cache(runner: ModelRunner) -> None:
    """Free the KV cache and the graphs."""
    runner.free_cache()
    give_back(runner)


def weights_to_host(runner: ModelRunner) -> None:
    """Copy the weights to the host, and free them on the device. On a CPU they stay."""
    if not runner.is_cuda:
        return
    for param in runner.model.parameters():
        host = torch.empty(param.shape, dtype=param.dtype, pin_memory=True)
        param.data = host.copy_(param.data, non_blocking=True)
    torch.cuda.synchronize(runner.device)
    give_back(runner)


def drop_weights(runner: ModelRunner) -> None:
    """Free the weights, wherever they are; only their shapes are kept."""
    for param in runner.model.parameters():
        param.data = torch.zeros((), dtype=param.dtype, device=param.device).expand(param.shape)
    give_back(runner)


def restore_weights(runner: ModelRunner, place: Place) -> None:
    """Have memory for the weights on the device again, and in it what was copied to the host."""
    if place is Place.HOST and not runner.is_cuda:
        return
    params = list(runner.model.parameters())
    # All before any is used: where the memory is not there, nothing has changed.
    restored = [
        torch.empty(param.shape, dtype=param.dtype, device=runner.device) for param in params
    ]
    for param, tensor in zip(params, restored, strict=True):
        if place is Place.HOST:
            tensor.copy_(param.data, non_blocking=True)
        param.data = tensor
    if runner.is_cuda:
        torch.cuda.synchronize(runner.device)  # the host's memory may be used anew
    else:
        move_to_huge_pages(runner.model)


def prepare_steps(runner: ModelRunner) -> None:
    """When all is awake: capture the graphs again. If that fails, the cache is free again."""
    try:
        runner.prepare_steps()
    except BaseException:
        free_cache(runner)
        raise


def meet(runner: ModelRunner) -> None:
    """Wait until all ranks have done what they were told."""
    if runner.group is not None:
        dist.barrier()


def give_back(runner: ModelRunner) -> None:
    """Give memory that nothing refers to back to the driver."""
    gc.collect()  # graphs and tensors may be part of a cycle
    if runner.is_cuda:
        torch.cuda.synchronize(runner.device)
        torch.cuda.empty_cache()
