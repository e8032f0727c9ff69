"""The SwiGLU activation (Shazeer, 2020)."""

import torch
from torch import nn

from nanovllm.kernels.silu_mul import silu_mul, silu_mul_torch


class SiluAndMul(nn.Module):
    """`silu(gate) * up`, where x `[n, 2 * size]` holds gate and up side by side."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silu_mul(x) if x.is_cuda else silu_mul_torch(x)
