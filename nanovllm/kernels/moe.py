"""A mixture of experts (Shazeer et al., Outrageously Large Neural Networks, 2017): an MLP of which
each token uses the few parts, the experts, that its router chooses.

On a GPU that is four kernels: the router's logits; the choice, and the experts' lists of tokens;
gate and up of all experts; down of all experts. Nothing is asked back by the host, and what is
launched depends on the number of tokens only, so that a CUDA graph can record it. The sum over a
token's experts is left to the kernel that adds to the residual stream.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels.expert_gemv import expert_down_gemv, expert_gate_up_gemv
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.grouped_gemm import expert_down, expert_gate_up
from nanovllm.kernels.int4_expert_gemv import int4_expert_down_gemv, int4_expert_gate_up_gemv
from nanovllm.kernels.int4_grouped_gemm import int4_expert_down, int4_expert_gate_up
from nanovllm.kernels.int4_layout import Int4Weight
from nanovllm.kernels.moe_routing import route, route_torch
from nanovllm.kernels.rms_norm import add_rms_norm

# Of a prefill. Each token's experts have an output each, so those of 16,384 tokens and 8 experts
# would be 0.5 GB at a hidden size of 2048. With 4,096 tokens and 128 experts the arithmetic already
# takes about as long as reading the weights, which each chunk does once more.
CHUNK_TOKENS = 4096


class MoEWeights(NamedTuple):
    """The weights of a mixture of experts on this rank, and how it chooses."""

    router: Tensor  # [num_experts, hidden]
    gate_up: Tensor | FP8Weight | Int4Weight  # [num_experts, 2 * intermediate, hidden]: gate, up
    down: Tensor | FP8Weight | Int4Weight  # [num_experts, hidden, intermediate]; stored alike
    top_k: int  # experts of a token
    is_normalized: bool  # the routing weights of a token's experts are made to add up to 1


def moe_partial_sums(x: Tensor, weights: MoEWeights) -> Tensor:
    """Return partial sums `[top_k, n, hidden]`, a token's experts, whose sum is `moe_torch`.

    x: `[n, hidden]`, contiguous, n >= 2.
    """
    routing = route(x, weights.router, weights.top_k, weights.is_normalized)
    if isinstance(weights.gate_up, Int4Weight):
        assert isinstance(weights.down, Int4Weight)
        activation = int4_expert_gate_up(x, weights.gate_up, routing)
        return int4_expert_down(activation, weights.down, routing)
    assert not isinstance(weights.down, Int4Weight)
    activation = expert_gate_up(x, weights.gate_up, routing)
    return expert_down(activation, weights.down, routing)


def moe_gemv(
    x: Tensor,
    weights: MoEWeights,
    residual: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`moe_torch` for one token, `[1, hidden]`.

    residual: `[1, hidden]`; added, overwritten with the result, and returned. It may be x.
    norm_weight, eps: `[hidden]` and the epsilon of an RMSNorm that x goes through first, or None.
    """
    routing = route(x, weights.router, weights.top_k, weights.is_normalized, norm_weight, eps)
    if isinstance(weights.gate_up, Int4Weight):
        assert isinstance(weights.down, Int4Weight)
        activation = int4_expert_gate_up_gemv(x, weights.gate_up, routing, norm_weight, eps)
        return int4_expert_down_gemv(activation, weights.down, routing, residual)
    assert not isinstance(weights.down, Int4Weight)
    activation = expert_gate_up_gemv(x, weights.gate_up, routing, norm_weight, eps)
    return expert_down_gemv(activation, weights.down, routing, residual)


def moe_in_chunks(x: Tensor, weights: MoEWeights, residual: Tensor | None = None) -> Tensor:
    """`moe_torch` for a large prefill, `[n, hidden]`, in chunks of tokens that bound the memory.

    residual: `[n, hidden]`, contiguous; added to, in place, and returned.
    """
    out = torch.empty_like(x) if residual is None else residual
    num_chunks = -(-len(x) // CHUNK_TOKENS)
    for rows, out_rows in zip(
        x.tensor_split(num_chunks), out.tensor_split(num_chunks), strict=True
    ):
        partial_sums = moe_partial_sums(rows, weights)
        if residual is None:
            torch.sum(partial_sums, dim=0, out=out_rows)
        else:
            add_rms_norm(out_rows, partial_sums, None, 0.0)
    return out


def moe_torch(x: Tensor, weights: MoEWeights) -> Tensor:
    """The mixture of experts of x `[n, hidden]`, in PyTorch: the reference, and the CPU's path.

    Experts that no token has chosen are left out.
    """
    experts, scores = route_torch(x, weights.router, weights.top_k, weights.is_normalized)
    pairs_by_expert = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=len(weights.router)).tolist()
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    quantized = (FP8Weight, Int4Weight)
    assert not isinstance(weights.gate_up, quantized) and not isinstance(weights.down, quantized)
    for expert, pairs in enumerate(pairs_by_expert.split(counts)):
        if not len(pairs):
            continue
        tokens = pairs // weights.top_k
        gate, up = F.linear(x[tokens], weights.gate_up[expert]).chunk(2, dim=-1)
        output = F.linear(F.silu(gate) * up, weights.down[expert])
        out.index_add_(0, tokens, output * scores.flatten()[pairs, None])
    return out.to(x.dtype)
