"""INT4 weights in the layout of AutoAWQ's "GEMM" version (Lin et al., AWQ, 2023).

A matrix is stored transposed, so that the eight numbers of a word are of eight rows of ours, in an
order that suited AWQ's own kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.quantization.int4 import (
    SCALE_TENSORS,
    Int4,
    check_packable,
    from_words,
    nibbles,
    read_group_scales,
    words_of,
)
from nanovllm.quantization.weight_format import Shard
from nanovllm.utils.loader import check_shape

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the rows in a word, from its lowest bits on


@dataclass(frozen=True)
class AWQ(Int4):
    """`qweight` int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]` and `scales`
    `[groups, out]`.
    """

    tensors = {"qweight": ("I32",), "qzeros": ("I32",), "scales": SCALE_TENSORS}

    def load_tensor(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard's part; see `WeightFormat.load`."""
        num_rows, num_columns = shard.full_shape
        num_groups = self.num_groups(shard)
        rows = shard.source_rows
        if kind == "scales":
            check_shape(loaded, (num_groups, num_rows))
            scales = read_group_scales(loaded, (slice(None), rows), layer)
            self.put_scales(layer, scales.t(), shard)
            return
        check_packable(shard, 0)
        words = words_of(rows)
        local = from_words(words, rows)
        if kind == "qweight":
            check_shape(loaded, (num_columns, num_rows // 8))
            packed = loaded[shard.source_columns, words].to(layer.packed.device)
            self.put_values(layer, nibbles(packed, ORDER)[:, local].t(), shard)
        else:
            check_shape(loaded, (num_groups, num_rows // 8))
            packed = loaded[:, words].to(layer.packed.device)
            self.put_zero_points(layer, nibbles(packed, ORDER)[:, local].t(), shard)
