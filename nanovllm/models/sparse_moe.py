"""The MLP of a mixture-of-experts layer: a router, and experts of which each token uses a few.

Under tensor parallelism every rank has a share of every expert, as of any other MLP: all ranks make
the same choice and have the same work to do, and one all-reduce adds up their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanovllm.kernels.moe import (
    CHUNK_TOKENS,
    MoEWeights,
    moe_gemv,
    moe_in_chunks,
    moe_partial_sums,
    moe_torch,
)
from nanovllm.layers.linear import divide
from nanovllm.models.quantized_experts import QuantizedExperts
from nanovllm.quantization.construction import initial_format
from nanovllm.quantization.quantized import QuantizedFormat
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import (
    PLAIN,
    Epilogue,
    Norm,
    PartialSums,
    WeightFormat,
    uses_gemv,
)
from nanovllm.utils.loader import check_shape, set_weight_loader
from nanovllm.utils.tensor_parallel import get_tensor_parallel


class Router(nn.Module):
    """Scores every expert for every token; every rank has all of it."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)
        set_weight_loader(self.weight, self.load_weight)

    @staticmethod
    def load_weight(param: nn.Parameter, loaded: Any) -> None:
        """Copy the checkpoint's tensor."""
        check_shape(loaded, param.shape)
        param.copy_(loaded[:])


class Experts(nn.Module):
    """This rank's share of all experts' weights, one tensor for each kind."""

    def __init__(self, hidden_size: int, intermediate_size: int, num_experts: int) -> None:
        super().__init__()
        tp = get_tensor_parallel()
        self.full_size = intermediate_size
        self.local_size = divide("moe_intermediate_size", intermediate_size, tp.size)
        self.first = tp.rank * self.local_size  # of the intermediate numbers
        gate_up = torch.empty(num_experts, 2 * self.local_size, hidden_size)
        down = torch.empty(num_experts, hidden_size, self.local_size)
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)  # gate above up
        self.down_proj = nn.Parameter(down, requires_grad=False)

    def checkpoint_tensors(
        self, prefix: str, names: Collection[str]
    ) -> dict[str, Callable[[Any], None]]:
        """Name the checkpoint's tensors, and how each is loaded.

        A checkpoint has two tensors for all experts of a layer, or three for each expert.

        prefix: the name of this module. names: those of all tensors in the checkpoint.
        """
        if f"{prefix}.gate_up_proj" in names:
            return {
                f"{prefix}.gate_up_proj": self.load_gate_up,
                f"{prefix}.down_proj": partial(self.load_down, slice(None)),
            }
        tensors: dict[str, Callable[[Any], None]] = {}
        for expert in range(len(self.down_proj)):
            name = f"{prefix}.{expert}"
            tensors[f"{name}.gate_proj.weight"] = partial(self.load_half, expert, 0)
            tensors[f"{name}.up_proj.weight"] = partial(self.load_half, expert, 1)
            tensors[f"{name}.down_proj.weight"] = partial(self.load_down, expert)
        return tensors

    def load_half(self, expert: int, half: int, loaded: Any) -> None:
        """Copy an expert's gate (half 0) or up projection (half 1), `[intermediate, hidden]`."""
        check_shape(loaded, (self.full_size, self.gate_up_proj.shape[2]))
        target = self.gate_up_proj[expert].unflatten(0, (2, self.local_size))[half]
        target.copy_(loaded[self.first : self.first + self.local_size])

    def load_gate_up(self, loaded: Any) -> None:
        """Copy all experts' gate and up projections, `[experts, 2 * intermediate, hidden]`."""
        num_experts, _, hidden_size = self.gate_up_proj.shape
        check_shape(loaded, (num_experts, 2 * self.full_size, hidden_size))
        target = self.gate_up_proj.unflatten(1, (2, self.local_size))
        for half in range(2):
            first = half * self.full_size + self.first
            target[:, half].copy_(loaded[:, first : first + self.local_size])

    def load_down(self, experts: int | slice, loaded: Any) -> None:
        """Copy the down projection of one expert, `[hidden, intermediate]`, or of all."""
        target = self.down_proj[experts]
        check_shape(loaded, (*target.shape[:-1], self.full_size))
        target.copy_(loaded[..., self.first : self.first + self.local_size])


class SparseMoE(nn.Module):
    """`sum(weight[e] * down[e](silu(gate[e](x)) * up[e](x)))` over the `top_k` experts e that a
    token's router scores highest; the weights are the softmax of all scores.

    The residual stream takes it as it takes a linear layer.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        is_normalized: bool,
    ) -> None:
        """Make a layer of experts with `intermediate_size` over all ranks.

        is_normalized: whether the weights of a token's experts are made to add up to 1.
        """
        super().__init__()
        self.tp = get_tensor_parallel()
        self.output_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.is_normalized = is_normalized
        self.gate = Router(hidden_size, num_experts)
        self.experts: Experts | QuantizedExperts
        self.use_format(initial_format())

    def use_format(self, weight_format: WeightFormat) -> None:
        """Have the experts' weights in this format, uninitialised."""
        if weight_format is UNQUANTIZED:
            self.experts = Experts(self.output_size, self.intermediate_size, self.num_experts)
        elif isinstance(weight_format, QuantizedFormat):
            self.experts = QuantizedExperts(
                self.output_size, self.intermediate_size, self.num_experts, weight_format
            )

    def matmul(
        self, x: Tensor, epilogue: Epilogue, norm: Norm | None = None
    ) -> Tensor | PartialSums:
        """Compute this rank's part of the sum, of x `[n, hidden]`; see `WeightFormat.matmul`."""
        residual = epilogue.add_to
        experts = self.experts
        if isinstance(experts, QuantizedExperts):
            gate_up = experts.gate_up_proj.weights_for(x)
            down = experts.down_proj.weights_for(x)
        else:
            gate_up = experts.gate_up_proj
            down = experts.down_proj
        weights = MoEWeights(
            router=self.gate.weight,
            gate_up=gate_up,
            down=down,
            top_k=self.top_k,
            is_normalized=self.is_normalized,
        )
        if not x.is_cuda:
            product = moe_torch(x, weights)
            return product if residual is None else residual.add_(product)
        if uses_gemv(x):
            return moe_gemv(
                x,
                weights,
                residual,
                norm_weight=None if norm is None else norm.weight,
                eps=0.0 if norm is None else norm.eps,
            )
        assert norm is None and epilogue.out is None
        if len(x) > CHUNK_TOKENS:
            return moe_in_chunks(x, weights, residual)
        sums = PartialSums(moe_partial_sums(x, weights))
        reader_sums = epilogue.reader_sums or residual is not None
        return sums if reader_sums else sums.sum()

    def forward(self, x: Tensor) -> Any:
        """Compute this rank's part as a tensor `[n, hidden]`."""
        return self.matmul(x, PLAIN)
