"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.rms_norm import rms_norm, rms_norm_torch
from nanovllm.utils.loader import check_shape


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.weight.weight_loader = self.weight_loader

    @staticmethod
    def weight_loader(param: nn.Parameter, loaded, shard_id: None = None) -> None:
        check_shape(loaded, param.shape)
        param.copy_(loaded[:])

    def forward(self, x: Tensor) -> Tensor:
        """x `[n, size]` -> the same shape and dtype."""
        return (rms_norm if x.is_cuda else rms_norm_torch)(x, self.weight, self.eps)
