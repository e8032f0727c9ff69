"""Attention metadata of the step that is running: the same for all layers, so it is not handed through every call."""

import threading
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Context:
    """All tensors are int32 on the model's device."""

    is_prefill: bool = False  # prompts (or chunks of them), not one token for each sequence
    slot_mapping: Tensor | None = (
        None  # [num_tokens], where new K and V go; -1: nowhere. None: no cache yet
    )
    cu_seqlens_q: Tensor | None = (
        None  # [num_seqs + 1], prefill: prefix sums of the numbers of new tokens
    )
    cu_seqlens_k: Tensor | None = (
        None  # [num_seqs + 1], prefill: the same of the tokens to attend to
    )
    max_seqlen_q: int = 0  # prefill: the largest of those numbers
    max_seqlen_k: int = 0
    context_lens: Tensor | None = (
        None  # [num_seqs], decode: tokens to attend to, the new one included
    )
    block_tables: Tensor | None = (
        None  # [num_seqs, max_blocks], -1 pads; None: prefill with nothing cached
    )


_local = threading.local()  # engines of two threads do not meet


def get_context() -> Context:
    return getattr(_local, "context", Context())


def set_context(context: Context) -> None:
    _local.context = context


def reset_context() -> None:
    set_context(Context())
