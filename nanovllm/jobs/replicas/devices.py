"""Which GPUs and how many CPU threads each replica gets."""

from __future__ import annotations

import os
from typing import Any

VISIBLE = "CUDA_VISIBLE_DEVICES"


def count_gpus() -> int:
    """The number of GPUs that this process may use. No memory of theirs is taken for it."""
    import torch  # here, as one replica, or several on a CPU, do without

    return torch.cuda.device_count()


def visible_gpus(num_gpus: int) -> list[str]:
    """The names of these GPUs: numbers, or UUIDs where CUDA_VISIBLE_DEVICES has them."""
    value = os.environ.get(VISIBLE)
    if value is None:
        return [str(index) for index in range(num_gpus)]
    # CUDA stops at the first name that is none, so those that it counted come first.
    return [name.strip() for name in value.split(",")][:num_gpus]


def num_ranks(engine_options: dict[str, Any]) -> int:
    """The number of GPUs of one engine. If the option is wrong, 1: the engine says what is."""
    size = engine_options.get("tensor_parallel_size")
    return size if type(size) is int and size > 0 else 1


def replica_environments(
    replicas: int | str, engine_options: dict[str, Any]
) -> list[dict[str, str]]:
    """What each replica has in its environment besides what this process has: its own GPUs, or, on
    a CPU, its share of the cores. One for each replica.

    replicas: how many, or "auto": as many as there are GPUs for; 1 on a CPU.

    Raises:
        TypeError, ValueError: if `replicas` is neither, or there are not enough GPUs.
    """
    if replicas != "auto" and (not isinstance(replicas, int) or isinstance(replicas, bool)):
        raise TypeError(f'replicas must be a number or "auto", not {replicas!r}')
    if isinstance(replicas, int) and replicas < 1:
        raise ValueError(f"replicas must be at least 1, not {replicas}")
    ranks = num_ranks(engine_options)
    if replicas == 1:
        return [{}]  # it takes what there is
    num_gpus = 0 if engine_options.get("device") == "cpu" else count_gpus()
    if num_gpus == 0:
        return cpu_environments(1 if replicas == "auto" else int(replicas), ranks)
    most = num_gpus // ranks
    count = most if replicas == "auto" else int(replicas)
    if count == 0:
        return [{}]  # the engine says that there are not enough GPUs for one
    if count > most:
        raise ValueError(
            f"{count} replicas with tensor_parallel_size {ranks} need {count * ranks} GPUs, and "
            f'{num_gpus} can be seen; pass replicas={max(1, most)}, or "auto"'
        )
    names = visible_gpus(num_gpus)
    return [
        {VISIBLE: ",".join(names[first : first + ranks])}
        for first in range(0, count * ranks, ranks)
    ]


def cpu_environments(count: int, ranks: int) -> list[dict[str, str]]:
    """Share the cores: PyTorch's threads spin while they wait for one another, so those of several
    replicas on one core take its time from one another. OMP_NUM_THREADS counts as it is.
    """
    if count * ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * count
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_threads = max(1, (num_cores or 1) // (count * ranks))
    return [{"OMP_NUM_THREADS": str(num_threads)}] * count
