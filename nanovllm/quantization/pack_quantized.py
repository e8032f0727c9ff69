"""INT4 weights in the layout "pack-quantized" of compressed-tensors (llm-compressor)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanovllm.quantization.int4 import (
    SCALE_TENSORS,
    Int4,
    from_words,
    nibbles,
    read_group_scales,
    words_of,
)
from nanovllm.quantization.weight_format import Shard
from nanovllm.utils.loader import check_shape

ORDER = range(8)  # from the lowest bits on


@dataclass(frozen=True)
class PackQuantized(Int4):
    """`weight_packed` int32 `[out, in / 8]`, `weight_scale` `[out, groups]`, `weight_shape` `[2]`,
    and maybe `weight_zero_point` int32 `[out / 8, groups]` and `weight_g_idx` int32 `[in]`.

    Numbers and zero points are signed, and stored with 8 added to both, which their difference does
    not show.
    """

    @property
    def tensors(self) -> dict[str, tuple[str, ...]]:
        """Zero points and order of the columns must be there if they matter."""
        required: dict[str, tuple[str, ...]] = {
            "weight_packed": ("I32",),
            "weight_scale": SCALE_TENSORS,
            "weight_shape": ("I64", "I32"),
        }
        if not self.is_symmetric:
            required["weight_zero_point"] = ("I32",)
        if self.has_group_index:
            required["weight_g_idx"] = ("I32",)
        return required

    optional_tensors = {"weight_zero_point": ("I32",), "weight_g_idx": ("I32",)}

    def load_tensor(self, layer: Any, kind: str, loaded: Any, shard: Shard) -> None:
        """Copy the shard's part; see `WeightFormat.load`."""
        num_rows, num_columns = shard.full_shape
        num_groups = self.num_groups(shard)
        if kind == "weight_packed":
            check_shape(loaded, (num_rows, -(-num_columns // 8)))
            words = words_of(shard.source_columns)
            packed = loaded[shard.source_rows, words].to(layer.packed.device)
            local = from_words(words, shard.source_columns)
            self.put_values(layer, nibbles(packed, ORDER)[:, local], shard)
        elif kind == "weight_scale":
            check_shape(loaded, (num_rows, num_groups))
            self.put_scales(layer, read_group_scales(loaded, shard.source_rows, layer), shard)
        elif kind == "weight_zero_point":
            check_shape(loaded, (-(-num_rows // 8), num_groups))
            words = words_of(shard.source_rows)
            packed = loaded[words].to(layer.packed.device)
            local = from_words(words, shard.source_rows)
            self.put_zero_points(layer, nibbles(packed.t(), ORDER)[:, local].t(), shard)
        elif kind == "weight_g_idx":
            check_shape(loaded, (num_columns,))
            self.put_group_index(layer, loaded[:], shard)
        else:
            check_shape(loaded, (2,))
            shape = tuple(loaded[:].tolist())
            if shape != shard.full_shape:
                raise ValueError(
                    f"is {shape}, and the model's configuration asks for {shard.full_shape}"
                )
