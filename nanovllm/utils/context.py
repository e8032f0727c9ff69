"""Attention metadata of the step that is running.

The model's forward pass takes only token ids and positions, as in a textbook. What the attention layers need
beside them (which sequence a token belongs to, where its K and V go) is the same for all layers, so it stands
here for the duration of a step instead of being handed through every call.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Context:
    """All tensors are int32 on the model's device; see DESIGN for the table of shapes.

    Attributes:
        is_prefill: whether the step computes prompts (or chunks of them) or one token for each sequence.
        slot_mapping: `[num_tokens]`, the cache slot of each new token's K and V; -1: nowhere. None: no cache yet.
        cu_seqlens_q: `[num_seqs + 1]`, prefill: prefix sums of the numbers of new tokens.
        cu_seqlens_k: `[num_seqs + 1]`, prefill: prefix sums of the numbers of tokens to attend to.
        max_seqlen_q, max_seqlen_k: prefill: the largest of those numbers.
        context_lens: `[num_seqs]`, decode: tokens to attend to, the new one included.
        block_tables: `[num_seqs, max_blocks]`, padded with -1. None in a prefill that reads nothing from the cache.
    """

    is_prefill: bool = False
    slot_mapping: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    context_lens: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None


_context = Context()


def get_context() -> Context:
    return _context


def set_context(context: Context) -> None:
    global _context
    _context = context


def reset_context() -> None:
    set_context(Context())
