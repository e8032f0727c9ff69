"""Steps of no request, which a model runner runs before it takes any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from nanovllm.utils.context import StepInputs

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.kernels.attention_backend import AttentionBackend


def largest_prefill(
    config: Config, backend: AttentionBackend, to_device: Callable[..., Tensor]
) -> StepInputs:
    """Make the inputs of the largest prefill there can be."""
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    num_tokens = most_tokens(config)
    lengths = [(num_tokens + i) // num_seqs for i in range(num_seqs)]  # as equal as can be
    return dummy_prefill(backend, to_device, lengths, lengths)


def most_tokens(config: Config) -> int:
    """Return how many tokens a step computes at most."""
    num_seqs = min(config.max_num_seqs, config.max_num_batched_tokens)
    return min(config.max_num_batched_tokens, num_seqs * config.max_model_len)


def cached_prefills(
    config: Config, backend: AttentionBackend, to_device: Callable[..., Tensor]
) -> Iterator[StepInputs]:
    """Make the inputs of prefills that read the cache, one for each kernel that does that. Running
    them compiles the kernels, so that no step of a request waits for it.
    """
    for size in backend.prefill_sizes:
        if size > most_tokens(config):
            continue
        columns = -(-(size + 1) // config.kvcache_block_size)
        tables = np.zeros((1, columns), dtype=np.int32)
        yield dummy_prefill(backend, to_device, [size], [size + 1], block_tables=tables)


def dummy_prefill(
    backend: AttentionBackend,
    to_device: Callable[..., Tensor],
    num_new: list[int],
    num_total: list[int],
    block_tables: np.ndarray | None = None,
) -> StepInputs:
    """Make inputs that compute so many tokens of each sequence and store nothing."""
    zeros = to_device([0] * sum(num_new), np.int64)
    ones = to_device([1] * len(num_new), np.int64)
    nowhere = to_device([-1] * sum(num_new), np.int32)
    plan = backend.plan_prefill(num_new, num_total, block_tables, to_device)
    return StepInputs(
        is_prefill=True,
        input_ids=zeros,
        positions=zeros,
        slot_mapping=None if block_tables is None else nowhere,
        attention=plan,
        last_token_rows=plan.cu_seqlens_q[1:] - 1,
        temperatures=ones.float(),
        seeds=ones,
        last_positions=ones,
    )
