"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import nn

from nanovllm.kernels.rms_norm import rms_norm, rms_norm_torch
from nanovllm.layers.linear import check_shape


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.weight.weight_loader = self.weight_loader

    @staticmethod
    def weight_loader(param: nn.Parameter, loaded, shard_id: None = None) -> None:
        check_shape(loaded, tuple(param.shape))
        param.copy_(loaded[:])

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The normalised x `[n, size]`. With `residual`, x is added to it in place, and the sum is normalised."""
        norm = rms_norm if x.is_cuda else rms_norm_torch
        return norm(x, self.weight, self.eps, residual)
