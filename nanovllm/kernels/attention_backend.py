"""The attention backends: interchangeable implementations with the same results.

A backend prepares its plan once a step, on the host; every attention layer of the step then uses
it. What a kernel needs to know about the batch goes into the plan and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels._gluon import TILE_ROWS
from nanovllm.kernels._triton import HAS_TRITON, is_hopper
from nanovllm.kernels.cpu_attention import CpuStep
from nanovllm.kernels.flash_attention import (
    check_flash_attention,
    flash_attention_version,
    flash_decode,
    flash_prefill,
)
from nanovllm.kernels.hopper_prefill import hopper_prefill, serves_hopper_prefill
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_torch
from nanovllm.kernels.prefill_tiles import make_tiles, tiled_prefill
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.shared_prefix import shared_prefix_decode
from nanovllm.kernels.torch_attention import varlen_prefill_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill

# Smaller prefills without a CUDA graph wait for the host, which takes longer to launch this kernel.
HOPPER_MIN_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Many new tokens of each of n sequences. Tensors are int32."""

    cu_seqlens_q: Tensor  # [n + 1]: where each sequence's queries begin, and the last one's end
    cu_seqlens_k: Tensor  # [n + 1]: the same of the keys: new tokens and those in the cache
    max_seqlen_q: int  # the most queries of one sequence
    max_seqlen_k: int  # the most keys of one sequence
    block_tables: Tensor | None = None  # [n, max_blocks], padded with -1; None: nothing is cached
    tiles: Tensor | None = None  # [tiles, 4]: the work list of `HopperBackend`
    cpu: CpuStep | None = None  # the plan of `CpuBackend`


@dataclass(frozen=True, slots=True)
class TiledPlan:
    """A prefill whose launches do not depend on the batch, for a CUDA graph. Tensors are int32."""

    tiles: Tensor  # [max_tiles, 8]: the work list, see prefill_tiles.py and prefill_parts.py
    arrivals: Tensor  # of tiles in parts, see prefill_parts.py
    context_lens: Tensor  # [max_seqs]: keys of each sequence, the new ones included; 0: padding
    block_tables: Tensor  # [max_seqs, max_blocks]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One new token of each of n sequences. Tensors are int32, and padding rows have no context."""

    context_lens: Tensor  # [n]: keys of each sequence, the new one included
    block_tables: Tensor  # [n, max_blocks], of any strides
    cpu: CpuStep | None = None  # the plan of `CpuBackend`
    prefixes: SharedPrefixes | None = None  # what groups of sequences share; None: no groups


AttentionPlan = PrefillPlan | TiledPlan | DecodePlan


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """How the layers of a model attend; those of one model may differ.

    Raises:
        ValueError: a window or a cap that no model can mean.
    """

    scale: float  # the scores' factor, usually head_dim ** -0.5
    window: int | None = None  # a query sees so many keys, up to its own; None: all
    softcap: float | None = None  # a scaled score s becomes softcap * tanh(s / softcap)

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"an attention window of {self.window} tokens is not supported; it must be at "
                "least 1, or null for none"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(
                f"a soft cap of {self.softcap} for attention scores is not supported; it must be "
                "positive, or null for none"
            )


@dataclass(frozen=True, slots=True)
class AttentionBackend:
    """How to store K and V, and how to attend in the two kinds of step."""

    name: str
    norm_rope_store: Callable[..., Tensor]
    prefill: Callable[..., Tensor]
    decode: Callable[..., Tensor]
    tiled_prefill: Callable[..., Tensor] | None = None  # None: prefills cannot run as CUDA graphs
    shared_decode: Callable[..., Tensor] | None = None  # None: shared prefixes are read as any

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """The fewest tokens of prefills that have a kernel of their own."""
        return (1,)

    def plan_prefill(
        self,
        num_queries: list[int],
        num_keys: list[int],
        block_tables: np.ndarray | None,
        to_device: Callable[[np.ndarray], Tensor],
    ) -> PrefillPlan:
        """Prepare a prefill step.

        num_queries, num_keys: of each sequence; keys include those of tokens in the cache.
        block_tables: `[n, max_blocks]` int32 on the host; None if nothing is cached.
        to_device: copies an array to the model's device, without waiting.
        """
        cu_seqlens_q = np.array([0, *accumulate(num_queries)], dtype=np.int32)
        cu_seqlens_k = np.array([0, *accumulate(num_keys)], dtype=np.int32)
        return PrefillPlan(
            cu_seqlens_q=to_device(cu_seqlens_q),
            cu_seqlens_k=to_device(cu_seqlens_k),
            max_seqlen_q=max(num_queries),
            max_seqlen_k=max(num_keys),
            block_tables=None if block_tables is None else to_device(block_tables),
        )

    def plan_decode(self, context_lens: Tensor, block_tables: Tensor) -> DecodePlan:
        """Prepare a decode step, given the device's buffers, which a CUDA graph may read again."""
        return DecodePlan(context_lens, block_tables)

    def last_tokens_plan(self, plan: PrefillPlan | TiledPlan) -> PrefillPlan | DecodePlan:
        """The plan for each sequence's last query only; keys and values are those of `plan`."""
        if isinstance(plan, TiledPlan):
            # All keys are in the cache, and one query a sequence is what decode attention is for.
            # It may load keys before the kernel ahead of it has ended, and this step has only just
            # stored them. They are there: the kernel ahead, which selects the last tokens' queries,
            # is a plain one. It began when the kernel that stores the keys had ended.
            return DecodePlan(plan.context_lens, plan.block_tables)
        num_seqs = len(plan.cu_seqlens_q) - 1
        one_each = torch.arange(num_seqs + 1, dtype=torch.int32, device=plan.cu_seqlens_q.device)
        return replace(plan, cu_seqlens_q=one_each, max_seqlen_q=1, tiles=None)

    def store(self, plan: AttentionPlan | None, *inputs: Any, **named: Any) -> Tensor:
        """Normalise and rotate q and k, store k and v; the inputs are `norm_rope_store`'s."""
        return self.norm_rope_store(*inputs, **named)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan | None,
        options: AttentionOptions,
    ) -> Tensor:
        """Compute causal attention: a tensor like q `[n, heads, head_dim]`.

        k, v: `[n, kv_heads, head_dim]`, of the new tokens, which the cache holds already.
        k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`.
        """
        if isinstance(plan, DecodePlan):
            # Of a prefix that is longer than its window, a query sees nothing, or a part.
            if plan.prefixes is not None and options.window is None:
                assert self.shared_decode is not None
                return self.shared_decode(
                    q,
                    k_cache,
                    v_cache,
                    plan.prefixes,
                    plan.block_tables,
                    options.scale,
                    softcap=options.softcap,
                )
            return self.decode(
                q,
                k_cache,
                v_cache,
                plan.context_lens,
                plan.block_tables,
                options.scale,
                window=options.window,
                softcap=options.softcap,
            )
        if isinstance(plan, TiledPlan):
            assert self.tiled_prefill is not None
            return self.tiled_prefill(
                q,
                k_cache,
                v_cache,
                plan.tiles,
                plan.block_tables,
                options.scale,
                window=options.window,
                softcap=options.softcap,
                arrivals=plan.arrivals,
            )
        assert plan is not None
        return self.prefill(
            q,
            k,
            v,
            k_cache,
            v_cache,
            plan.cu_seqlens_q,
            plan.cu_seqlens_k,
            plan.max_seqlen_q,
            plan.max_seqlen_k,
            options.scale,
            plan.block_tables,
            window=options.window,
            softcap=options.softcap,
        )


class CpuBackend(AttentionBackend):
    """PyTorch on a CPU. Its functions are the references; a step with a plan has faster ones."""

    def plan_prefill(
        self,
        num_queries: list[int],
        num_keys: list[int],
        block_tables: np.ndarray | None,
        to_device: Callable[[np.ndarray], Tensor],
    ) -> PrefillPlan:
        """Prepare a prefill step."""
        plan = AttentionBackend.plan_prefill(self, num_queries, num_keys, block_tables, to_device)
        return replace(plan, cpu=CpuStep(num_queries, num_keys, block_tables))

    def plan_decode(self, context_lens: Tensor, block_tables: Tensor) -> DecodePlan:
        """Prepare a decode step."""
        # A padding row attends to some token, which does no harm: nobody reads its result.
        lengths = context_lens.clamp(min=1).tolist()
        step = CpuStep([1] * len(lengths), lengths, block_tables.numpy())
        return DecodePlan(context_lens, block_tables, step)

    def last_tokens_plan(self, plan: PrefillPlan | TiledPlan) -> PrefillPlan | DecodePlan:
        """The plan for each sequence's last query only."""
        assert isinstance(plan, PrefillPlan) and plan.cpu is not None
        return replace(AttentionBackend.last_tokens_plan(self, plan), cpu=plan.cpu.last_tokens())

    def store(self, plan: AttentionPlan | None, *inputs: Any, **named: Any) -> Tensor:
        """Normalise, rotate and store."""
        assert isinstance(plan, (PrefillPlan, DecodePlan)) and plan.cpu is not None
        return plan.cpu.norm_rope_store(*inputs, **named)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan | None,
        options: AttentionOptions,
    ) -> Tensor:
        """Compute causal attention."""
        assert isinstance(plan, (PrefillPlan, DecodePlan)) and plan.cpu is not None
        return plan.cpu.attend(q, k, v, k_cache, v_cache, options)


class HopperBackend(AttentionBackend):
    """Large prefills by `hopper_prefill`, the rest as the Triton backend does it."""

    @property
    def prefill_sizes(self) -> tuple[int, ...]:
        """The fewest tokens of prefills that have a kernel of their own."""
        return (1, HOPPER_MIN_TOKENS)

    def plan_prefill(
        self,
        num_queries: list[int],
        num_keys: list[int],
        block_tables: np.ndarray | None,
        to_device: Callable[[np.ndarray], Tensor],
    ) -> PrefillPlan:
        """Prepare a prefill step."""
        plan = AttentionBackend.plan_prefill(self, num_queries, num_keys, block_tables, to_device)
        num_tokens = sum(num_queries)
        if num_tokens < HOPPER_MIN_TOKENS:
            return plan
        tiles = make_tiles(np.array(num_queries), np.array(num_keys), num_tokens, TILE_ROWS)
        return replace(plan, tiles=to_device(tiles))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: AttentionPlan | None,
        options: AttentionOptions,
    ) -> Tensor:
        """Compute causal attention."""
        is_plain = options.window is None and options.softcap is None
        if isinstance(plan, PrefillPlan) and plan.tiles is not None and is_plain:
            block_size = 0
            if plan.block_tables is not None:
                block_size = k_cache.shape[1]
                k = k_cache.flatten(0, 1)
                v = v_cache.flatten(0, 1)
            return hopper_prefill(
                q, k, v, plan.tiles, plan.block_tables, block_size, scale=options.scale
            )
        return AttentionBackend.attend(self, q, k, v, k_cache, v_cache, plan, options)


class FlashBackend(AttentionBackend):
    """The flash_attn package for both kinds of step."""

    def plan_decode(self, context_lens: Tensor, block_tables: Tensor) -> DecodePlan:
        """Prepare a decode step."""
        # The package takes only a stride of 1 between columns, even where there is one column. Of
        # one column, `contiguous` would keep whatever stride there is.
        tables = block_tables.clone(memory_format=torch.contiguous_format)
        return DecodePlan(context_lens, tables)


TORCH = AttentionBackend("torch", norm_rope_store_torch, varlen_prefill_torch, paged_decode_torch)
CPU = CpuBackend("torch", norm_rope_store_torch, varlen_prefill_torch, paged_decode_torch)
KERNELS = (norm_rope_store, varlen_prefill, paged_decode, tiled_prefill, shared_prefix_decode)
TRITON = AttentionBackend("triton", *KERNELS)
HOPPER = HopperBackend("triton", *KERNELS)
FLASH_ATTN = FlashBackend("flash_attn", norm_rope_store, flash_prefill, flash_decode)
FLASH_PREFILL = AttentionBackend(
    "flash_attn+triton",
    norm_rope_store,
    flash_prefill,
    paged_decode,
    tiled_prefill,
    shared_prefix_decode,
)


def select_backend(
    name: str, device: str, block_size: int, head_dim: int, dtype: torch.dtype
) -> AttentionBackend:
    """Choose the backend that `name` asks for; "auto" is the fastest that is there.

    Raises:
        ValueError: it cannot serve this device, cache or model.
    """
    if device == "cpu" and name not in ("auto", "torch"):
        raise ValueError(
            f"attention_backend {name!r} needs a GPU and the device is 'cpu'; use 'torch' or 'auto'"
        )
    if device == "cuda" and not HAS_TRITON:
        raise ValueError(
            "device 'cuda' needs Triton, which is not installed: pip install triton, or "
            "device='cpu'"
        )
    if name.startswith("flash_attn"):
        check_flash_attention(block_size, head_dim, dtype)
        return FLASH_ATTN if name == "flash_attn" else FLASH_PREFILL
    if device == "cpu":
        return CPU
    if name == "torch":
        return TORCH
    if name == "auto" and flash_attention_version() == "4" and is_hopper():
        # As measured: faster than our kernel on this card, for prefill only.
        with suppress(ValueError):
            check_flash_attention(block_size, head_dim, dtype)
            return FLASH_PREFILL
    if serves_hopper_prefill(block_size, head_dim, dtype):
        return HOPPER
    return TRITON
