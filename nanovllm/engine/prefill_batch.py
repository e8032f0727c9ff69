"""From the sequences of a prefill step to arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.attention_backend import AttentionBackend
from nanovllm.utils.context import StepInputs


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """What a prefill step of n sequences computes, on the host; see `StepInputs` for an example."""

    # [n] each
    table_rows: np.ndarray  # int64: the sequences' rows in the model runner's tables
    num_new: np.ndarray  # int64: tokens that this step computes
    num_total: np.ndarray  # int64: these and the earlier ones
    temperatures: np.ndarray  # float32
    seeds: np.ndarray  # int64
    block_tables: np.ndarray  # [columns, n] int32, padded with -1

    # [num_tokens] each, one sequence after the other
    input_ids: np.ndarray  # int64
    positions: np.ndarray  # int64, of each token in its sequence
    slots: np.ndarray  # int64, where its K and V go

    @classmethod
    def of(cls, seqs: list[Sequence], block_size: int) -> PrefillBatch:
        """Arrange the scheduled tokens of all sequences."""
        num_new = np.array([seq.num_scheduled_tokens for seq in seqs])
        num_total = np.array([seq.num_computed_tokens for seq in seqs])
        token_ids = [token_id for seq in seqs for token_id in seq.scheduled_token_ids]
        width = max(len(seq.block_table) for seq in seqs)
        block_tables = np.full((width, len(seqs)), -1, np.int32)
        for index, seq in enumerate(seqs):
            block_tables[: len(seq.block_table), index] = seq.block_table
        end_rows = np.cumsum(num_new)  # the row behind each sequence's last token
        # A sequence's positions run ahead of its rows, or behind them, by the same number for all
        # of its tokens.
        positions = np.arange(end_rows[-1]) + np.repeat(num_total - end_rows, num_new)
        seq_of_token = np.repeat(np.arange(len(seqs)), num_new)
        blocks = block_tables[positions // block_size, seq_of_token]
        return cls(
            table_rows=np.array([seq.row for seq in seqs]),
            num_new=num_new,
            num_total=num_total,
            temperatures=np.array([seq.temperature for seq in seqs], np.float32),
            seeds=np.array([seq.seed for seq in seqs], np.int64),
            block_tables=block_tables,
            input_ids=np.array(token_ids, np.int64),
            positions=positions,
            slots=blocks.astype(np.int64) * block_size + positions % block_size,
        )

    def inputs(self, backend: AttentionBackend, to_device: Callable[..., Tensor]) -> StepInputs:
        """Copy the batch to the device.

        to_device: copies an array, as a tensor of a NumPy type if one is given.
        """
        num_new = self.num_new.tolist()
        num_total = self.num_total.tolist()
        block_tables = None
        if num_total != num_new:  # some K and V are read from the cache
            # A copy, so that the stride between columns is 1 even where there is one column only.
            # flash_attn refuses any other, and Triton would compile the kernel again for it.
            block_tables = self.block_tables.T.copy()
        plan = backend.plan_prefill(num_new, num_total, block_tables, to_device)
        return StepInputs(
            is_prefill=True,
            input_ids=to_device(self.input_ids),
            positions=to_device(self.positions),
            slot_mapping=to_device(self.slots, np.int32),
            attention=plan,
            last_token_rows=plan.cu_seqlens_q[1:] - 1,
            table_rows=to_device(self.table_rows),
            temperatures=to_device(self.temperatures),
            seeds=to_device(self.seeds),
            last_positions=to_device(self.num_total - 1),
        )
