"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.rms_norm import rms_norm, rms_norm_torch
from nanovllm.utils.loader import check_shape, set_weight_loader


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        set_weight_loader(self.weight, self.load_weight)

    @staticmethod
    def load_weight(param: nn.Parameter, loaded: Any, shard_id: None = None) -> None:
        """Copy the checkpoint's tensor; every rank has all of it."""
        check_shape(loaded, param.shape)
        param.copy_(loaded[:])

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x `[n, size]`; the result has its shape and dtype."""
        if x.is_cuda:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm_torch(x, self.weight, self.eps)
