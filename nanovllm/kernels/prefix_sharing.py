"""The groups of a decode step that share a prefix: found when its sequences change, then kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels._triton import device_limits
from nanovllm.kernels.prefix_groups import (
    FIELDS,
    CostModel,
    Groups,
    TileLimits,
    find_groups,
    make_prefix_tiles,
)
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.shared_prefix import prefix_config

if TYPE_CHECKING:  # kernels import nothing of the layers when they run
    from nanovllm.config import Config
    from nanovllm.layers.attention import Attention

# The kernels that a layer has more of take as long as reading so many bytes of what is shared, most
# of which the L2 cache holds; as measured on an H100.
STEP_COST_BYTES = 26 << 20
# Without a CUDA graph, the host takes longer to launch them than the device to run them.
EAGER_STEP_COST_BYTES = 256 << 20
MAX_PARTS = 16  # of a prefix
MIN_KEYS_IN_PART = 256


class PrefixSharing:
    """Finds the groups, and keeps them on the device, where a CUDA graph finds them.

    They depend on the block tables only. While a sequence runs, its block table grows at its end,
    and so the groups stay as they are until a sequence ends or joins.
    """

    def __init__(self, config: Config, layers: list[Attention], device: torch.device) -> None:
        """layers: those of the model, of this rank's heads."""
        layer = layers[0]
        kv_heads = layer.num_kv_heads
        self.block_size = config.kvcache_block_size
        tiles = prefix_config(layer.head_dim, config.dtype, device, self.block_size)
        num_multiprocessors, _ = device_limits(device)
        group = layer.num_heads // kv_heads
        self.limits = TileLimits(
            members=max(1, tiles.block_m // group),
            key_step=tiles.block_n,
            min_keys=MIN_KEYS_IN_PART,
            max_parts=MAX_PARTS,
            # So many that they have half of the multiprocessors. All have suffixes to read, and
            # more parts would take longer to add up.
            num_tiles=max(1, num_multiprocessors // (2 * kv_heads)),
        )
        token_bytes = 2 * kv_heads * layer.head_dim * config.kv_cache_dtype.itemsize
        step_cost_bytes = EAGER_STEP_COST_BYTES if config.enforce_eager else STEP_COST_BYTES
        self.cost = CostModel(step_cost=step_cost_bytes // token_bytes)
        # A layer with a window does not see the beginning of long contexts.
        can_share = any(
            layer.options.window is None and layer.backend.shared_decode is not None
            for layer in layers
        )
        most_to_save = self.cost.saving(np.array(config.max_num_seqs), config.max_model_len)
        # A tile holds whole members. Of more query heads a KV head the last ones would be in none.
        can_share = can_share and group <= tiles.block_m
        self.is_on = can_share and bool(most_to_save > self.cost.step_cost)
        num_numbers = FIELDS * self.max_tiles(config.max_num_seqs) + 3 * config.max_num_seqs
        self.numbers = torch.zeros(num_numbers, dtype=torch.int32, device=device)
        self.forget()

    def graph_sizes(self, decode_sizes: list[int]) -> list[int]:
        """Choose the sizes of steps with groups that have graphs: each takes start-up time."""
        return [
            size for size in decode_sizes if size % 32 == 0 or size in (8, 16, decode_sizes[-1])
        ]

    def max_tiles(self, num_seqs: int) -> int:
        """The most tiles of a step of so many sequences."""
        # A group has four members or more, and may leave its last tile with a single one. A part
        # may be smaller than the average.
        most_rows = num_seqs // 4 + num_seqs // self.limits.members
        return most_rows + self.limits.num_tiles

    def max_parts(self, num_seqs: int) -> int:
        """The most parts of a prefix: less for more sequences, as their results take memory."""
        return min(MAX_PARTS, max(4, 2048 // num_seqs))

    def forget(self) -> None:
        """Rows of the tables may belong to other sequences from now on."""
        self.table_rows = b""  # of the last step
        self.groups: Groups | None = None  # of the last step
        self.uploaded_size = 0  # for so many rows they are on the device; 0: they are not

    def find(
        self, table_rows: np.ndarray, context_lens: np.ndarray, block_tables: np.ndarray
    ) -> bool:
        """Find the groups of a step, and return whether it has any.

        table_rows, context_lens: `[n]`, of its sequences.
        block_tables: `[columns, rows]`, of all sequences.
        """
        if not self.is_on:
            return False
        rows_as_bytes = table_rows.tobytes()  # many times as fast to compare as arrays are
        if rows_as_bytes == self.table_rows:
            return self.groups is not None
        self.forget()
        self.table_rows = rows_as_bytes
        num_full = (context_lens - 1) // self.block_size
        self.groups = find_groups(block_tables, table_rows, num_full, self.block_size, self.cost)
        return self.groups is not None

    def upload(self, size: int) -> None:
        """Send the groups that were found to the device, for a step of `size` rows."""
        if self.uploaded_size == size:  # in an earlier step
            return
        self.uploaded_size = size
        groups = self.groups
        assert groups is not None
        limits = replace(self.limits, max_parts=self.max_parts(size))
        tiles, num_parts = make_prefix_tiles(groups, self.block_size, limits)
        max_tiles = self.max_tiles(size)
        assert len(tiles) <= max_tiles
        numbers = np.zeros(FIELDS * max_tiles + 3 * size, np.int32)
        numbers[: tiles.size] = tiles.ravel()
        members, prefix_lens, parts = numbers[FIELDS * max_tiles :].reshape(3, size)
        prefix_len = groups.prefix_blocks * self.block_size
        members[: len(groups.members)] = groups.members
        prefix_lens[groups.members] = np.repeat(prefix_len, groups.num_members)
        parts[groups.members] = np.repeat(num_parts, groups.num_members)
        host = torch.from_numpy(numbers)
        if self.numbers.is_cuda:
            host = host.pin_memory()
        self.numbers[: len(host)].copy_(host, non_blocking=True)

    def on_device(self, size: int, context_lens: Tensor) -> SharedPrefixes:
        """The groups of a step of `size` rows.

        context_lens: `[size]`, the device's.
        """
        max_tiles = self.max_tiles(size)
        end = FIELDS * max_tiles
        members, prefix_lens, num_parts = self.numbers[end : end + 3 * size].view(3, size)
        return SharedPrefixes(
            tiles=self.numbers[:end].view(max_tiles, FIELDS),
            members=members,
            prefix_lens=prefix_lens,
            num_parts=num_parts,
            suffix_lens=context_lens - prefix_lens,
            max_parts=self.max_parts(size),
        )
