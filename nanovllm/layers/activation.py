"""The gated half of a SwiGLU MLP (Shazeer, GLU Variants Improve Transformer, 2020)."""

from nanovllm.layers.linear import MergedColumnParallelLinear
from nanovllm.quantization.weight_format import GATED


class SiluGateUpLinear(MergedColumnParallelLinear):
    """`silu(x W_gate^T) * (x W_up^T)`, of x `[n, in]`: `[n, out / tp]`.

    The two matrices, `[output_size, input_size]` each over all ranks, are stacked for one GEMM. For
    a single token the activation is a part of it.
    """

    packed_modules_mapping = {"gate_proj": 0, "up_proj": 1}
    epilogue = GATED

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__(input_size, [output_size, output_size])
