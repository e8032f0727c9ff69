"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.rms_norm import rms_norm, rms_norm_torch
from nanovllm.utils.loader import check_shape, set_weight_loader


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, computed in float32.

    weight_offset: added to the checkpoint's weight. Gemma stores by how much a weight differs from
        1. The sum is kept in float32, because bfloat16 has no numbers so close to 1.
    """

    def __init__(self, size: int, eps: float, weight_offset: float = 0.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight_offset = weight_offset
        dtype = torch.float32 if weight_offset else torch.get_default_dtype()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)
        set_weight_loader(self.weight, self.load_weight)

    def load_weight(self, param: nn.Parameter, loaded: Any, shard_id: None = None) -> None:
        """Copy the checkpoint's tensor; every rank has all of it."""
        check_shape(loaded, param.shape)
        param.copy_(loaded[:]).add_(self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x `[n, size]`; the result has its shape and dtype."""
        if x.is_cuda:
            return rms_norm(x, self.weight, self.eps)
        return rms_norm_torch(x, self.weight, self.eps)
