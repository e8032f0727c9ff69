"""Small prefills with a padded number of tokens, of sequences and of tiles, as CUDA graphs need."""

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.graphs import PREFILL_SIZES
from nanovllm.engine.prefill_batch import PrefillBatch
from nanovllm.engine.step_buffers import SEQUENCE, TILE, TOKEN, InputArray, StepBuffers
from nanovllm.kernels.attention_plan import TiledPlan
from nanovllm.kernels.prefill_config import prefill_config
from nanovllm.kernels.prefill_parts import PART_FIELDS, cut_keys, make_arrivals, wanted_tiles
from nanovllm.kernels.prefill_tiles import make_tiles, max_tiles
from nanovllm.layers.attention import Attention
from nanovllm.utils.context import StepInputs

# Steps of more sequences run eagerly, those of fewer are padded. That costs little: up to here, the
# LM head takes the time of reading its weight, however many sequences there are, and each sequence
# adds only one tile to the longest list that attention must have room for.
MAX_SEQS = 64


class PaddedPrefill:
    """The inputs of prefills that fit one of a few sizes, at the same addresses in every step.

    All steps of one size have the same shapes. A padding token stores nothing (slot -1) and
    attends to nothing. A padding sequence takes its last token from row 0 and has no context; its
    sample goes into a row of no sequence.
    """

    def __init__(
        self, config: Config, layer: Attention, blocks_per_seq: int, device: torch.device
    ) -> None:
        """layer: any attention layer of the model."""
        # No step has more tokens than `max_tokens`. Larger graphs would have a larger memory pool
        # than the activations of the warm-up, which is what the KV cache leaves room for.
        max_tokens = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
        largest = min(PREFILL_SIZES[-1], max_tokens)
        self.sizes = [size for size in PREFILL_SIZES if size < largest] + [largest]
        self.max_seqs = min(MAX_SEQS, config.max_num_seqs)
        self.tile_rows = prefill_config(
            layer.head_dim, config.dtype, device, config.kvcache_block_size
        ).block_m
        self.wanted_tiles = wanted_tiles(layer.num_heads, device)
        self.arrivals = make_arrivals(layer.num_heads, device)
        self._num_rows = {size: self._count_rows(size) for size in self.sizes}
        self.buffers = StepBuffers(
            {
                "input_ids": InputArray(TOKEN, np.int64),
                "positions": InputArray(TOKEN, np.int64),
                "table_rows": InputArray(SEQUENCE, np.int64, padding=config.max_num_seqs),
                "seeds": InputArray(SEQUENCE, np.int64),
                "last_positions": InputArray(SEQUENCE, np.int64),
                "slots": InputArray(TOKEN, np.int32, padding=-1),
                "tiles": InputArray(TILE, np.int32, columns=PART_FIELDS),
                "last_token_rows": InputArray(SEQUENCE, np.int32),
                "context_lens": InputArray(SEQUENCE, np.int32),
                "temperatures": InputArray(SEQUENCE, np.float32),
            },
            self._num_rows[largest],
            blocks_per_seq,
            device,
        )

    def _count_rows(self, size: int) -> dict[str, int]:
        """How many rows of each kind a step of this size has, with padding."""
        num_seqs = min(size, self.max_seqs)
        num_tiles = max(max_tiles(size, num_seqs, self.tile_rows), self.wanted_tiles)
        return {TOKEN: size, SEQUENCE: num_seqs, TILE: num_tiles}

    def upload(self, batch: PrefillBatch, size: int) -> None:
        """Send a batch, padded to `size` tokens, to the device."""
        tiles = make_tiles(batch.num_new, batch.num_total, size, self.tile_rows)
        inputs = {
            "input_ids": batch.input_ids,
            "positions": batch.positions,
            "table_rows": batch.table_rows,
            "seeds": batch.seeds,
            "last_positions": batch.num_total - 1,
            "slots": batch.slots,
            "tiles": cut_keys(tiles, self.wanted_tiles),
            "last_token_rows": np.cumsum(batch.num_new) - 1,
            "context_lens": batch.num_total,
            "temperatures": batch.temperatures,
        }
        self.buffers.upload(inputs, batch.block_tables, self._num_rows[size])

    def inputs(self, size: int) -> StepInputs:
        """The inputs of a step of this size."""
        arrays = self.buffers.on_device(self._num_rows[size])
        return StepInputs(
            is_prefill=True,
            in_graph=True,
            input_ids=arrays["input_ids"],
            positions=arrays["positions"],
            slot_mapping=arrays["slots"],
            attention=TiledPlan(
                tiles=arrays["tiles"],
                arrivals=self.arrivals,
                context_lens=arrays["context_lens"],
                block_tables=arrays["block_tables"],
            ),
            last_token_rows=arrays["last_token_rows"],
            table_rows=arrays["table_rows"],
            temperatures=arrays["temperatures"],
            seeds=arrays["seeds"],
            last_positions=arrays["last_positions"],
        )
