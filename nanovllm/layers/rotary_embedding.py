"""Rotary position embedding (Su et al., RoFormer, 2021)."""

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Tables of the cosines and sines by which `norm_rope_store` rotates q and k.

    `cos` and `sin` are `[max_position, rotary_size / 2]` float32. At position p, pair i of a head
    is rotated by the angle `p * frequencies[i]` and multiplied by `factor`. The pair is the
    elements i and i + rotary_size / 2 or, interleaved, 2 i and 2 i + 1. The elements of a head from
    number rotary_size on are left as they are.

    frequencies: `[rotary_size / 2]` float32, on the CPU.
    factor: of q and k, so that the scores get its square; kinds for long contexts have one.
    """

    def __init__(
        self,
        frequencies: Tensor,
        max_position: int,
        factor: float = 1.0,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        device = torch.get_default_device()
        self.interleaved = interleaved
        # On the CPU, in float32, whatever the model's device and dtype: the same table everywhere.
        positions = torch.arange(max_position, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies)
        cos = angles.cos() * factor
        sin = angles.sin() * factor
        self.register_buffer("cos", cos.to(device), persistent=False)
        self.register_buffer("sin", sin.to(device), persistent=False)
