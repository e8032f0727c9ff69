"""Rotary position embedding (Su et al., RoFormer, 2021)."""

import torch
from torch import nn
from transformers import PretrainedConfig


def rope_theta(hf_config: PretrainedConfig) -> float:
    """The base of the rotation frequencies; ValueError for a scaled RoPE, which is not implemented."""
    # transformers 5 keeps theta and scaling in rope_parameters, 4 in rope_theta and rope_scaling.
    parameters = getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {}
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"RoPE type {rope_type!r} is not supported; supported: 'default' (no scaling)")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported; only 1.0 is")
    theta = parameters.get("rope_theta", getattr(hf_config, "rope_theta", None))
    if not theta or theta <= 0:
        raise ValueError(f"the model's config.json must give a positive rope_theta, not {theta}")
    return float(theta)


class RotaryEmbedding(nn.Module):
    """`cos` and `sin`, `[max_position, head_dim / 2]` float32, of `position * theta^(-2 i / head_dim)`.

    By this angle `norm_rope_store` rotates the pair (i, i + head_dim / 2).
    """

    def __init__(self, head_dim: int, max_position: int, theta: float) -> None:
        super().__init__()
        # Computed on the CPU, in float32, whatever the model's device and dtype: the same table everywhere.
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        positions = torch.arange(max_position, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, 1.0 / theta**exponent)
        device = torch.get_default_device()
        self.register_buffer("cos", angles.cos().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(device), persistent=False)
