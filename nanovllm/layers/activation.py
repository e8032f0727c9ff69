"""The gated half of a SwiGLU or GeGLU MLP (Shazeer, GLU Variants Improve Transformer, 2020)."""

from typing import Any

from torch import Tensor

from nanovllm.kernels.gate_mul import gate_mul, gate_mul_in_place, gate_mul_rounded
from nanovllm.layers.linear import MergedColumnParallelLinear
from nanovllm.layers.residual import Normed
from nanovllm.quantization.weight_format import PLAIN, Epilogue, Reader, uses_gemv


class GateUpLinear(MergedColumnParallelLinear):
    """`act(x W_gate^T) * (x W_up^T)`, of x `[n, in]`: `[n, out / tp]`.

    The two matrices, `[output_size, input_size]` each over all ranks, are stacked for one GEMM. The
    activation, "silu" or "gelu_tanh", is a part of it where the weight format can do that.
    """

    packed_modules_mapping = {"gate_proj": 0, "up_proj": 1}

    def __init__(self, input_size: int, output_size: int, activation: str = "silu") -> None:
        super().__init__(input_size, [output_size, output_size])
        assert activation in ("silu", "gelu_tanh"), activation
        self.activation = activation
        self.gated = Epilogue(activation=activation)

    def forward(self, x: Tensor | Normed, reader: Reader | None = None) -> Any:
        """Multiply, and apply the activation; round the result as `reader` wants its input."""
        hidden = x.hidden if isinstance(x, Normed) else x
        is_fused = uses_gemv(hidden)
        if self.tp.size == 1:  # several ranks may multiply some rows before others have arrived
            is_fused = self.weight_format.applies_activation(self, hidden)
        product = self.project(x, self.gated if is_fused else PLAIN)
        if is_fused:
            return product
        if not product.is_cuda:
            return gate_mul_in_place(product, self.activation)
        rounding = None if reader is None else reader.rounding(product)
        if rounding is None:
            return gate_mul(product, self.activation)
        return gate_mul_rounded(product, self.activation, rounding)
