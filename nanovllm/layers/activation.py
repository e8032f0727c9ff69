"""The gated half of a SwiGLU MLP (Shazeer, GLU Variants Improve Transformer, 2020)."""

from typing import Any

from torch import Tensor

from nanovllm.kernels.silu_mul import silu_mul, silu_mul_in_place
from nanovllm.layers.linear import MergedColumnParallelLinear
from nanovllm.layers.residual import Normed
from nanovllm.quantization.weight_format import GATED, PLAIN, uses_gemv


class SiluGateUpLinear(MergedColumnParallelLinear):
    """`silu(x W_gate^T) * (x W_up^T)`, of x `[n, in]`: `[n, out / tp]`.

    The two matrices, `[output_size, input_size]` each over all ranks, are stacked for one GEMM. For
    a single token the activation is a part of the GEMV.
    """

    packed_modules_mapping = {"gate_proj": 0, "up_proj": 1}

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, [output_size, output_size])

    def forward(self, x: Tensor | Normed) -> Any:
        """Multiply, and apply the activation."""
        is_fused = uses_gemv(x.hidden if isinstance(x, Normed) else x)
        product = self.project(x, GATED if is_fused else PLAIN)
        if is_fused:
            return product
        return silu_mul(product) if product.is_cuda else silu_mul_in_place(product)
