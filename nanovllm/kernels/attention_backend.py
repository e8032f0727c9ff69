"""The attention backends: interchangeable implementations with the same results.

A backend prepares its plan once a step, on the host; every attention layer of the step then uses
it. See attention_plan.py.
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

from nanovllm.checkpoints.kv_scales import FP8
from nanovllm.kernels._gluon import TILE_ROWS
from nanovllm.kernels._triton import HAS_TRITON, is_hopper
from nanovllm.kernels.attention_plan import (
    AttentionOptions,
    AttentionPlan,
    DecodePlan,
    PrefillPlan,
    TiledPlan,
)
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
from nanovllm.kernels.shared_prefix import shared_prefix_decode
from nanovllm.kernels.torch_attention import varlen_prefill_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill

# Smaller prefills without a CUDA graph wait for the host, which takes longer to launch this kernel.
HOPPER_MIN_TOKENS = 4096


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

        k, v: `[n, kv_heads, head_dim]`, of the new tokens, which the cache holds already: the same
            numbers, also if it is FP8.
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
                    v_scale=options.v_scale,
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
                v_scale=options.v_scale,
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
                v_scale=options.v_scale,
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
            v_scale=options.v_scale,
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
        if isinstance(plan, PrefillPlan) and self._serves(plan, k_cache, options):
            assert plan.tiles is not None
            block_size = 0
            if plan.block_tables is not None:
                block_size = k_cache.shape[1]
                k = k_cache.flatten(0, 1)
                v = v_cache.flatten(0, 1)
            return hopper_prefill(
                q,
                k,
                v,
                plan.tiles,
                plan.block_tables,
                block_size,
                scale=options.scale,
                v_scale=options.v_scale,
            )
        return AttentionBackend.attend(self, q, k, v, k_cache, v_cache, plan, options)

    def _serves(self, plan: PrefillPlan, k_cache: Tensor, options: AttentionOptions) -> bool:
        """Whether `hopper_prefill` computes attention. Its keys have 16 bits: those in an FP8 cache
        are read by Triton's kernel, and only where there are earlier ones.
        """
        if plan.tiles is None or options.window is not None or options.softcap is not None:
            return False
        return plan.block_tables is None or k_cache.dtype != FP8


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


def check_fp8(cache_dtype: torch.dtype | None) -> None:
    """Raise a ValueError if Triton has no FP8 on this GPU, and the cache is to be that."""
    if cache_dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        raise ValueError(
            f"kv_cache_dtype 'fp8' needs a GPU from Ada or Hopper on, and this is a "
            f"{torch.cuda.get_device_name()}; pass kv_cache_dtype='auto' or the model's dtype, or "
            "attention_backend='torch'"
        )


def select_backend(
    name: str,
    device: str,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> AttentionBackend:
    """Choose the backend that `name` asks for; "auto" is the fastest that is there.

    block_size, cache_dtype: of the KV cache; None: it has the model's dtype.

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
        check_flash_attention(block_size, head_dim, dtype, cache_dtype)
        return FLASH_ATTN if name == "flash_attn" else FLASH_PREFILL
    if device == "cpu":
        return CPU
    if name == "torch":
        return TORCH
    if name == "auto" and flash_attention_version() == "4" and is_hopper():
        # As measured: faster than our kernel on this card, for prefill only.
        with suppress(ValueError):
            check_flash_attention(block_size, head_dim, dtype, cache_dtype)
            return FLASH_PREFILL
    check_fp8(cache_dtype)
    if serves_hopper_prefill(block_size, head_dim, dtype):
        return HOPPER
    return TRITON
