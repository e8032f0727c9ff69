"""What a step's attention needs to know: of the batch in its plan, and of a layer in its options.

A plan is made once a step, on the host; what a kernel needs to know about the batch is in it and
nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from nanovllm.checkpoints.kv_scales import KVScales
from nanovllm.kernels.prefix_tensors import SharedPrefixes

if TYPE_CHECKING:
    from nanovllm.kernels.cpu_attention import CpuStep


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

    # The scores' factor, usually head_dim ** -0.5; of what an FP8 cache holds, times its K's scale.
    scale: float
    window: int | None = None  # a query sees so many keys, up to its own; None: all
    softcap: float | None = None  # a scaled score s becomes softcap * tanh(s / softcap)
    kv_scales: KVScales | None = None  # of an FP8 cache; None: the cache has the model's dtype

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

    @property
    def v_scale(self) -> float | None:
        """What the result is multiplied by: the scale of V in an FP8 cache."""
        return None if self.kv_scales is None else self.kv_scales.v

    def with_fp8_cache(self, scales: KVScales) -> AttentionOptions:
        """The same for a layer whose cache is FP8, with these scales. It is to be set before the
        first step, since the warm-up compiles the kernels that requests will need.
        """
        return replace(self, scale=self.scale * scales.k, kv_scales=scales)
