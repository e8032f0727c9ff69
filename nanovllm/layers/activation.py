"""The gated half of a SwiGLU MLP (Shazeer, GLU Variants Improve Transformer, 2020)."""

from torch import Tensor

from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.silu_mul import silu_mul, silu_mul_torch
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import MergedColumnParallelLinear, takes_gemv


class SiluGateUpLinear(MergedColumnParallelLinear):
    """`silu(x W_gate^T) * (x W_up^T)`; the two matrices are one, for one GEMM."""

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, [output_size, output_size])

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """x `[n, in]` -> `[n, out / tp]`; with a norm, x is normalised first."""
        if takes_gemv(x) and norm is not None:
            return gemv(x, self.weight, None, norm.weight, norm.eps, gated=True)
        gate_up = super().forward(x, norm)
        return (silu_mul if x.is_cuda else silu_mul_torch)(gate_up)
