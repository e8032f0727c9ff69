"""Mixture of experts: which experts each token goes to, and the lists by which an expert finds its
tokens.

A router scores every expert for every token, and a token goes to the `top_k` best. The kernels
that follow work expert by expert, so that each expert's weights are read once: the tokens have to
be sorted by expert. That is done without knowing on the host how many tokens an expert gets: every
expert has a *bucket* that could hold all tokens, and a counter. A token takes the next place in the
buckets of its experts. Which place it gets depends on which program comes first, and does not
matter: a product of matrices treats all rows alike.

A *pair* is a token and one of its experts. It has the number `token * top_k + slot`, where slot
says whether it is the token's best expert, the second, and so on.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import (
    launch_next,
    next_power_of_2,
    pdl_options,
    tl,
    triton,
    wait_for_previous,
)
from nanovllm.kernels.gemv import gemv

MAX_SPLIT_TOKENS = 128  # up to here, the router's inner dimension is split


class Routing(NamedTuple):
    """Where the tokens of a step go. All are on the device, and none is ever read by the host."""

    experts: Tensor  # [n, top_k] int32
    weights: Tensor  # [n, top_k] float32: of each expert's output in the sum
    counts: Tensor  # [num_experts] int32: how many tokens each expert has
    buckets: Tensor  # [num_experts, n] int32: first each expert's pairs, then uninitialised


@triton.jit(do_not_specialize=["num_tokens"])
def _router_kernel(
    x_ptr,
    weight_ptr,
    logits_ptr,
    counts_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    IN_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program computes the logits of EXPERTS experts for TOKENS tokens over SPLIT columns of the
    inner dimension, and clears the experts' counters.
    """
    launch_next(PDL)
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    is_expert = expert < NUM_EXPERTS
    is_token = token < num_tokens
    weight_row = weight_ptr + expert[:, None] * IN_SIZE
    x_row = x_ptr + token.to(tl.int64)[:, None] * IN_SIZE
    # The layer before may have had its counters in the same memory, and may still read them.
    wait_for_previous(PDL)
    if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(counts_ptr + expert, tl.zeros([EXPERTS], tl.int32), mask=is_expert)
    acc = tl.zeros([EXPERTS, TOKENS], tl.float32)
    for first in range(0, SPLIT, CHUNK):
        column = tl.program_id(2) * SPLIT + first + tl.arange(0, CHUNK)[None, :]
        in_row = column < IN_SIZE
        weight = tl.load(weight_row + column, mask=is_expert[:, None] & in_row, other=0.0)
        x = tl.load(x_row + column, mask=is_token[:, None] & in_row, other=0.0)
        acc = tl.dot(weight, tl.trans(x), acc, input_precision="ieee")
    offsets = (tl.program_id(2) * num_tokens + token[None, :]) * NUM_EXPERTS + expert[:, None]
    tl.store(logits_ptr + offsets, acc, mask=is_expert[:, None] & is_token[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    logits_ptr,
    experts_ptr,
    weights_ptr,
    counts_ptr,
    buckets_ptr,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A program chooses the experts of TOKENS tokens. EXPERTS and SLOTS are NUM_EXPERTS and TOP_K,
    rounded up to powers of two.
    """
    launch_next(PDL)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    expert = tl.arange(0, EXPERTS)[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    wait_for_previous(PDL)
    row = tl.minimum(token, num_tokens - 1)  # a program's last rows repeat the last token's
    offsets = row * NUM_EXPERTS + expert
    logits = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for split in tl.static_range(SPLITS):
        split_ptr = logits_ptr + split * num_tokens * NUM_EXPERTS
        logits += tl.load(split_ptr + offsets, mask=expert < NUM_EXPERTS, other=float("-inf"))
    exps = tl.exp(logits - tl.max(logits, axis=1, keep_dims=True))
    scores = exps / tl.sum(exps, axis=1, keep_dims=True)
    # A token whose logits are NaN still has to get experts that exist.
    scores = tl.where(scores == scores, scores, 0.0)
    scores = tl.where(expert < NUM_EXPERTS, scores, -1.0)
    chosen = tl.zeros([TOKENS, SLOTS], tl.int32)
    weights = tl.zeros([TOKENS, SLOTS], tl.float32)
    for i in tl.static_range(TOP_K):
        best = tl.max(scores, axis=1, keep_dims=True)
        # Of experts with the same score the first, as torch.topk has it on a GPU.
        index = tl.min(tl.where(scores == best, expert, EXPERTS), axis=1, keep_dims=True)
        chosen = tl.where(slot == i, index, chosen)
        weights = tl.where(slot == i, best, weights)
        scores = tl.where(expert == index, -1.0, scores)
    if NORMALIZED:
        weights = weights / tl.sum(weights, axis=1, keep_dims=True)
    pair = token * TOP_K + slot
    mask = (token < num_tokens) & (slot < TOP_K)
    tl.store(experts_ptr + pair, chosen, mask=mask)
    tl.store(weights_ptr + pair, weights, mask=mask)
    if buckets_ptr is not None:
        place = tl.atomic_add(counts_ptr + chosen, 1, mask=mask, sem="relaxed")
        tl.store(buckets_ptr + chosen.to(tl.int64) * num_tokens + place, pair, mask=mask)


def route(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    is_normalized: bool,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Routing:
    """Choose the experts of each token: the `top_k` with the largest softmax of the router's
    logits, all in float32.

    With one token, counts and buckets are uninitialised.

    x: `[n, hidden]`, contiguous. router_weight: `[num_experts, hidden]`, contiguous.
    is_normalized: the weights of a token's experts are divided by their sum.
    norm_weight, eps: `[hidden]` and the epsilon of an RMSNorm that x goes through first; for one
        token only. None: x is taken as it is.
    """
    num_tokens = x.shape[0]
    num_experts = router_weight.shape[0]
    assert norm_weight is None or num_tokens == 1
    assert x.is_contiguous() and router_weight.is_contiguous()
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    counts = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    buckets = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=x.device)
    if num_tokens == 1:
        logits = gemv(x, router_weight, norm_weight=norm_weight, eps=eps, out_dtype=torch.float32)
        logits = logits[None]  # one split
    else:
        logits = router_logits(x, router_weight, counts)
    tile_tokens = 4  # a warp each
    _choose_kernel[(triton.cdiv(num_tokens, tile_tokens),)](
        logits,
        experts,
        weights,
        counts,
        None if num_tokens == 1 else buckets,
        num_tokens,
        NUM_EXPERTS=num_experts,
        SPLITS=len(logits),
        TOP_K=top_k,
        NORMALIZED=is_normalized,
        TOKENS=tile_tokens,
        EXPERTS=next_power_of_2(num_experts),
        SLOTS=next_power_of_2(top_k),
        **pdl_options(),
    )
    return Routing(experts, weights, counts, buckets)


def router_logits(x: Tensor, router_weight: Tensor, counts: Tensor) -> Tensor:
    """Return partial sums `[splits, n, num_experts]` float32 of the logits, and clear `counts`.

    For few tokens there are several splits, so that many multiprocessors read the weight.
    """
    num_tokens, in_size = x.shape
    num_experts = router_weight.shape[0]
    if num_tokens <= MAX_SPLIT_TOKENS:
        tile = 16  # of tokens, and of experts
        chunk = 256  # columns that are multiplied at a time
        split = chunk  # columns of a program
    else:
        tile = 64
        chunk = 64
        split = triton.cdiv(in_size, chunk) * chunk  # all of them
    splits = triton.cdiv(in_size, split)
    logits = torch.empty(splits, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(num_experts, tile), triton.cdiv(num_tokens, tile), splits)
    _router_kernel[grid](
        x,
        router_weight,
        logits,
        counts,
        num_tokens,
        NUM_EXPERTS=num_experts,
        IN_SIZE=in_size,
        TOKENS=tile,
        EXPERTS=tile,
        CHUNK=chunk,
        SPLIT=split,
        num_stages=3,
        **pdl_options(),
    )
    return logits


def route_torch(
    x: Tensor, router_weight: Tensor, top_k: int, is_normalized: bool
) -> tuple[Tensor, Tensor]:
    """`Routing.experts` (as int64) and `Routing.weights` in PyTorch: the reference.

    Which of several experts with the same score are chosen is up to torch.topk.
    """
    scores = F.linear(x.float(), router_weight.float()).softmax(-1)
    weights, experts = scores.topk(top_k, dim=-1)
    if is_normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights
