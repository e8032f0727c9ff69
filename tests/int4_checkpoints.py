"""INT4 weights in the layouts that checkpoints have, for tests.

The packers follow the published layouts number by number; that of compressed-tensors is in
compressed_checkpoints.py.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from quantized import Quantize, Quantized
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Rounded:
    """A weight `[out, in]` in four bits."""

    numbers: Tensor  # [out, in], 0 to 15
    scales: Tensor  # [out, groups] float16
    zero_points: Tensor  # [out, groups], 0 to 15
    group_index: Tensor  # [in]: the group of each column

    def dequantized(self) -> Tensor:
        numbers = self.numbers - self.zero_points[:, self.group_index]
        return numbers.float() * self.scales.float()[:, self.group_index]


def round_to_int4(
    weight: Tensor, group_size: int, symmetric: bool, act_order: int | None = None
) -> Rounded:
    """Round to the nearest. act_order: a seed, to put the columns into groups in a random order."""
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    group_index = torch.arange(columns) // size
    if act_order is not None:
        generator = torch.Generator().manual_seed(act_order)
        group_index = group_index[torch.randperm(columns, generator=generator)]
    num_groups = int(group_index.max()) + 1
    scales = torch.empty(len(weight), num_groups, dtype=torch.float16)
    zero_points = torch.full(scales.shape, 8)
    for group in range(num_groups):
        members = weight[:, group_index == group].float()
        if symmetric:
            scales[:, group] = members.abs().amax(1) / 7.5
        else:
            low = members.amin(1)
            scales[:, group] = (members.amax(1) - low) / 15
            zero_points[:, group] = (-low / scales[:, group].float()).round().clamp(0, 15).long()
    numbers = weight.float() / scales.float()[:, group_index] + zero_points[:, group_index]
    return Rounded(numbers.round().clamp(0, 15).long(), scales, zero_points, group_index)


def pack(numbers: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Pack the columns of `[rows, 8 n]` into int32 `[rows, n]`: number `order[i]` of eight goes to
    the bits from 4 i on.
    """
    wide = numbers.numpy().astype(np.uint32)
    words = np.zeros((wide.shape[0], wide.shape[1] // 8), dtype=np.uint32)
    for word in range(words.shape[1]):
        for i in range(8):
            words[:, word] |= wide[:, 8 * word + order[i]] << np.uint32(4 * i)
    return torch.from_numpy(words.view(np.int32))


# --- AWQ ------------------------------------------------------------------------------------------


def awq_tensors(rounded: Rounded) -> dict[str, Tensor]:
    return {
        "qweight": pack(rounded.numbers.t(), AWQ_ORDER),
        "qzeros": pack(rounded.zero_points.t(), AWQ_ORDER),
        "scales": rounded.scales.t(),
    }


def awq(group_size: int, symmetric: bool = False) -> Quantize:
    def quantize(name: str, weight: Tensor) -> Quantized:
        rounded = round_to_int4(weight, group_size, symmetric)
        return Quantized(awq_tensors(rounded), rounded.dequantized())

    return quantize


def awq_config(group_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group_size,
        "zero_point": True,
        "modules_to_not_convert": ["mlp.gate"],
        **changes,
    }


# --- GPTQ -----------------------------------------------------------------------------------------


def gptq_tensors(rounded: Rounded, less_one: bool) -> dict[str, Tensor]:
    """less_one: as version 1 has the zero points, which GPTQModel makes of version 2's words."""
    qzeros = pack(rounded.zero_points.t())
    if less_one:
        qzeros = (qzeros.long() - 0x11111111).to(torch.int32)
    return {
        "qweight": pack(rounded.numbers).t(),
        "qzeros": qzeros,
        "scales": rounded.scales.t(),
        "g_idx": rounded.group_index.to(torch.int32),
    }


def seed_of(name: str) -> int:
    """Equal for matrices that read the same input, as their order of columns is."""
    for other, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
        name = name.replace(other, first)
    return sum(map(ord, name))


def gptq(
    group_size: int, symmetric: bool = True, less_one: bool = True, desc_act: bool = False
) -> Quantize:
    def quantize(name: str, weight: Tensor) -> Quantized:
        act_order = seed_of(name) if desc_act else None
        rounded = round_to_int4(weight, group_size, symmetric, act_order)
        return Quantized(gptq_tensors(rounded, less_one), rounded.dequantized())

    return quantize


def gptq_config(group_size: int, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": group_size,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "dynamic": {r"-:.*mlp\.gate$": {}},
        **changes,
    }
