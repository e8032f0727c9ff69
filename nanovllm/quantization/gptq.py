"""INT4 weights in the layout of AutoGPTQ and GPTQModel (Frantar et al., GPTQ, 2022).

A matrix is stored transposed, and the eight numbers of a word are of eight columns of ours. With
`desc_act` the columns were quantised in the order of their importance, and each group has columns
from everywhere; `g_idx` says which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
from nanovllm.utils.loader import DTYPES, check_shape

ORDER = range(8)  # from the lowest bits on
ONES = 0x11111111  # 1 in each of a word's eight numbers


@dataclass(frozen=True)
class GPTQ(Int4):
    """`qweight` int32 `[in / 8, out]`, `qzeros` int32 `[groups, out / 8]`, `scales`
    `[groups, out]`, and maybe `g_idx` int32 `[in]`.

    The first version of the format stores the zero points less 1. Early checkpoints have a `bias`
    `[out]` of zeros where the model has none.
    """

    zeros_are_less_one: bool = True

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """`g_idx` must be there only where the columns are out of order."""
        required: dict[str, tuple[str, ...]] = {
            "qweight": ("I32",),
            "qzeros": ("I32",),
            "scales": SCALE_TENSORS,
        }
        if self.has_group_index:
            required["g_idx"] = ("I32",)
        return required

    optional_tensors = {"g_idx": ("I32",), "bias": DTYPES}

    def load_tensor(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard's part; see `WeightFormat.load`."""
        num_rows, num_columns = shard.full_shape
        num_groups = self.num_groups(shard)
        if kind == "qweight":
            check_packable(shard, 1)
            check_shape(loaded, (num_columns // 8, num_rows))
            words = words_of(shard.source_columns)
            packed = loaded[words, shard.source_rows].to(layer.packed.device)
            values = nibbles(packed.t(), ORDER)
            self.put_values(layer, values[:, from_words(words, shard.source_columns)], shard)
        elif kind == "qzeros":
            check_packable(shard, 0)
            check_shape(loaded, (num_groups, num_rows // 8))
            words = words_of(shard.source_rows)
            packed = self.zero_points(loaded[:, words].to(layer.packed.device))
            local = from_words(words, shard.source_rows)
            self.put_zero_points(layer, nibbles(packed, ORDER)[:, local].t(), shard)
        elif kind == "scales":
            check_shape(loaded, (num_groups, num_rows))
            scales = read_group_scales(loaded, (slice(None), shard.source_rows), layer)
            self.put_scales(layer, scales.t(), shard)
        elif kind == "bias":  # of a layer without one: any other loads its bias itself
            check_shape(loaded, (num_rows,))
            if loaded[:].any():
                raise ValueError("is a bias, and the model's configuration has none here")
        else:
            check_shape(loaded, (num_columns,))
            self.put_group_index(layer, loaded[:], shard)

    def zero_points(self, words: Tensor) -> Tensor:
        """Make the first version of the format the second.

        It is made by subtracting 1 from each number of a word, and where a zero point is 0 that
        borrows from the number above. So the 1s are added to the word as a whole, which gives back
        what was borrowed.
        """
        if not self.zeros_are_less_one:
            return words
        return (words.long() + ONES).to(torch.int32)  # the bits above the 32nd are dropped
