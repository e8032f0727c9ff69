"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

import torch
from torch import nn

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

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Without `residual`: the normalised x. With it: (normalised sum, sum), the sum being the new residual."""
        if residual is not None:
            x = residual = x + residual
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        normed = (x32 * scale).to(x.dtype) * self.weight
        return normed if residual is None else (normed, residual)
