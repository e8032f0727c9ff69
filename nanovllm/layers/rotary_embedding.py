"""Rotary position embedding (Su et al., RoFormer, 2021)."""

import torch
from torch import nn
from transformers import PretrainedConfig


def rope_theta(hf_config: PretrainedConfig) -> float:
    """The base of the rotation frequencies; ValueError for a scaled or partial RoPE, which is not implemented."""
    # transformers 5 keeps theta and scaling in rope_parameters, 4 in rope_theta and rope_scaling.
    parameters = (
        getattr(hf_config, "rope_parameters", None)
        or getattr(hf_config, "rope_scaling", None)
        or {}
    )
    theta = parameters.get("rope_theta", getattr(hf_config, "rope_theta", None))
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    part = parameters.get("partial_rotary_factor", 1.0)
    if rope_type != "default" or part != 1.0:
        raise ValueError(
            f"RoPE with partial_rotary_factor {part} and type {rope_type!r} is not supported"
        )
    if not theta or theta <= 0:
        raise ValueError(f"the model's config.json must give a positive rope_theta, not {theta}")
    return float(theta)


class RotaryEmbedding(nn.Module):
    """`cos` and `sin`, `[max_position, head_dim / 2]` float32, of the angle `position * theta^(-2 i / head_dim)`, by
    which `norm_rope_store` rotates the pair (i, i + head_dim / 2)."""

    def __init__(self, head_dim: int, max_position: int, theta: float) -> None:
        super().__init__()
        # Computed on the CPU, in float32, whatever the model's device and dtype: the same table everywhere.
        options, device = dict(dtype=torch.float32, device="cpu"), torch.get_default_device()
        frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, **options) / head_dim)
        angles = torch.outer(torch.arange(max_position, **options), frequencies)
        self.register_buffer("cos", angles.cos().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)
