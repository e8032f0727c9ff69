"""The SwiGLU activation (Shazeer, 2020)."""

import torch
from torch import nn
from torch.nn import functional as F


class SiluAndMul(nn.Module):
    """`silu(gate) * up`, where x `[n, 2 * size]` holds gate and up side by side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
