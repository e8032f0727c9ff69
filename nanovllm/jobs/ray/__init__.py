"""Jobs on a cluster, by Ray Data: rows of a dataset in, the same rows with their answers out.

`map_prompts` is all that most need. `RowWorker` is the class that it gives to
`Dataset.map_batches`, and `worker_arguments` makes the arguments that it gives there, for those who
call that themselves. `run_on_ray` is `nanovllm run-batch --ray`.
"""

from __future__ import annotations

from typing import Any

try:
    from ray.data import Dataset
except ImportError as error:
    raise ImportError(
        f"nanovllm.jobs.ray needs Ray Data ({error}): pip install 'nano-vllm[ray]'"
    ) from error

from nanovllm.jobs.ray.arguments import BATCH_SIZE
from nanovllm.jobs.ray.arguments import worker_arguments as worker_arguments
from nanovllm.jobs.ray.job import run_on_ray as run_on_ray
from nanovllm.jobs.ray.worker import RowWorker as RowWorker


def map_prompts(
    dataset: Dataset,
    *,
    model: str,
    concurrency: int | tuple[int, int] | None = None,
    batch_size: int = BATCH_SIZE,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    num_rows: int | None = None,
    **options: Any,
) -> Dataset:
    """Answer the prompts of a dataset: its rows with the columns of their answers (`RowWorker`).

    Lazy, as Ray Data is; the rows keep no order. Actors that die are started anew, and what they
    had is run again.

    Args:
        dataset: rows with "prompt", "messages" or "body".
        model: directory or hub id; every machine of the cluster must find it.
        concurrency: actors, each with an engine; or the fewest and the most of them. None: as many
            as the cluster's GPUs are enough for; 1 if it has none.
        batch_size: rows that are handed over, and lost if an actor dies, together.
        num_cpus: what Ray sets aside for each actor. None: nothing.
        num_gpus: the same. None: `tensor_parallel_size`; 0 if the cluster has none or `device` is
            "cpu".
        num_rows: of the dataset, if that is known: no actor then takes more than its share at once.
        options: of `RowWorker`: `sampling_params`, `embed`, `form`, and options of `LLM`.
    """
    # What a batch comes to must be one block. An actor that dies after it handed over the first of
    # two may cut them elsewhere when it runs the batch again, which loses rows or doubles them.
    # And many small blocks keep all actors busy, in whatever blocks the dataset was read.
    small_blocks = dataset.repartition(target_num_rows_per_block=batch_size)
    arguments = worker_arguments(
        concurrency=concurrency,
        batch_size=batch_size,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        num_rows=num_rows,
        **options,
    )
    return small_blocks.map_batches(
        RowWorker, fn_constructor_kwargs=dict(model=model, **options), **arguments
    )
