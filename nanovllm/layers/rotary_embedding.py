"""Rotary position embedding (Su et al., RoFormer, 2021)."""

import torch
from torch import nn
from transformers import PretrainedConfig


def rope_theta(hf_config: PretrainedConfig) -> float:
    """Return the base of the rotation frequencies.

    Raises:
        ValueError: the RoPE is scaled or partial, which is not implemented, or has no base.
    """
    # transformers 5 keeps theta and scaling in rope_parameters, 4 in rope_theta and rope_scaling.
    parameters = getattr(hf_config, "rope_parameters", None)
    if not parameters:
        parameters = getattr(hf_config, "rope_scaling", None) or {}
    theta = parameters.get("rope_theta", getattr(hf_config, "rope_theta", None))
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    factor = parameters.get("partial_rotary_factor", 1.0)
    if rope_type != "default" or factor != 1.0:
        raise ValueError(
            f"RoPE with partial_rotary_factor {factor} and type {rope_type!r} is not supported"
        )
    if not theta or theta <= 0:
        raise ValueError(f"the model's config.json must give a positive rope_theta, not {theta}")
    return float(theta)


class RotaryEmbedding(nn.Module):
    """Tables of the cosines and sines by which `norm_rope_store` rotates q and k.

    `cos` and `sin` are `[max_position, head_dim / 2]` float32. At position p, the pair of elements
    (i, i + head_dim / 2) of a head is rotated by the angle `p * theta^(-2 i / head_dim)`.
    """

    def __init__(self, head_dim: int, max_position: int, theta: float) -> None:
        super().__init__()
        device = torch.get_default_device()
        # On the CPU, in float32, whatever the model's device and dtype: the same table everywhere.
        indices = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
        frequencies = 1.0 / theta ** (indices / head_dim)
        positions = torch.arange(max_position, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies)
        self.register_buffer("cos", angles.cos().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)
