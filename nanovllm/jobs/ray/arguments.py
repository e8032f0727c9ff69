"""What Ray Data is to be told about the actors that run engines."""

from __future__ import annotations

import inspect
from typing import Any

import ray
from ray.data import ActorPoolStrategy

BATCH_SIZE = 128  # rows of a batch, if nobody says
# Rows that an actor holds for each sequence that its engine runs at once. A batch is given back
# when its longest row is done, and until then the places of the others stand empty: with rows that
# take a fourth of the longest one's time, an actor must hold four times what runs.
ROWS_PER_SEQUENCE = 8
MAX_NUM_SEQS = 512  # the engine's default


def worker_arguments(
    *,
    concurrency: int | tuple[int, int] | None = None,
    batch_size: int = BATCH_SIZE,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    num_rows: int | None = None,
    device: str = "auto",
    tensor_parallel_size: int | None = None,
    max_num_seqs: int | None = None,
    **other_options: Any,
) -> dict[str, Any]:
    """What `Dataset.map_batches` is to be told beside a worker's class and its arguments.

    Ray starts dead actors anew, and runs their batches again, as often as it takes (`max_restarts`
    and `max_task_retries` are -1) if nobody tells it otherwise.

    Args:
        concurrency: actors, each with an engine; or the fewest and the most of them. None: as many
            as the cluster's GPUs are enough for; 1 if it has none.
        batch_size: rows that are handed over together.
        num_cpus: what Ray sets aside for each actor. None: nothing.
        num_gpus: the same. None: `tensor_parallel_size`; 0 if the cluster has none or `device` is
            "cpu".
        num_rows: of the dataset, if that is known: no actor then takes more than its share at once,
            when it is the first that is there.
        device: this and the rest are options of the engine.
        tensor_parallel_size: GPUs of an engine. None: 1.
        max_num_seqs: with it grows how many batches an actor works at. None: the engine's default.
        other_options: of the engine or of the worker; they do not matter here.

    Returns:
        Keyword arguments of `Dataset.map_batches`.
    """
    cluster_gpus = int(cluster_resources().get("GPU", 0))
    if num_gpus is None:
        needs_gpus = cluster_gpus > 0 and device != "cpu"
        num_gpus = (tensor_parallel_size or 1) if needs_gpus else 0
    if concurrency is None:
        concurrency = max(1, int(cluster_gpus // num_gpus)) if num_gpus else 1
    fewest, most = (concurrency, concurrency) if isinstance(concurrency, int) else concurrency
    rows_at_once = ROWS_PER_SEQUENCE * (max_num_seqs or MAX_NUM_SEQS)
    if num_rows is not None:
        rows_at_once = min(rows_at_once, num_rows // most)
    batches_at_once = max(2, -(-rows_at_once // batch_size))
    pool: dict[str, Any] = {"min_size": fewest, "max_size": most}
    if fewest == most:
        # Ray would give an actor twice as many, and the others less to do at the end. (Where the
        # number of actors may grow, batches that wait are what makes it grow.)
        pool["max_tasks_in_flight_per_actor"] = batches_at_once
    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "batch_format": "pyarrow",
        "num_cpus": num_cpus or 0,
        "num_gpus": num_gpus,
    }
    if "max_concurrent_calls_per_actor" in inspect.signature(ActorPoolStrategy).parameters:
        pool["max_concurrent_calls_per_actor"] = batches_at_once
    else:  # before Ray 2.59 it is among the actor's own arguments
        arguments["max_concurrency"] = batches_at_once
    return {**arguments, "compute": ActorPoolStrategy(**pool)}


def cluster_resources() -> dict[str, float]:
    """What the cluster has in all, by name; Ray is started if it was not."""
    if not ray.is_initialized():
        ray.init()
    return ray.cluster_resources()
