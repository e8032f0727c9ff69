"""The step that is running: one object holds its inputs, made once and the same for all layers.

A model's `forward` is called with input ids and positions only, as in the papers. What else a layer
has to know about the step (attention: where K and V go) it fetches by `get_context`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:  # utils import nothing of the package when they run
    from nanovllm.kernels.attention_plan import AttentionPlan


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs of one step, on the model's device.

    The new tokens of all n sequences lie one after the other; the steps of CUDA graphs have padding
    behind them. Example: sequence A computes the last 3 tokens of its prompt, whose first 2 an
    earlier chunk has computed; sequence B computes 2 tokens. Blocks hold 4 tokens; A has the blocks
    7 and 1, B has block 5.

        positions     [2, 3, 4,  0, 1]         input_ids alike
        slot_mapping  [30, 31, 4,  20, 21]     block * 4 + position % 4
        last_token_rows       [2,     4]
    """

    is_prefill: bool = False  # prompts, or chunks of them; else one token of each sequence
    in_graph: bool = False  # of a prefill: whether a CUDA graph launches its kernels
    input_ids: Tensor | None = None  # [num_tokens] int64; None in decode: the last step's samples
    positions: Tensor | None = None  # [num_tokens] int64, of each token in its sequence
    # [num_tokens] int32: where the K and V of each token go; -1: nowhere. None: there is no cache.
    slot_mapping: Tensor | None = None
    attention: AttentionPlan | None = None  # what the attention backend has prepared
    last_token_rows: Tensor | None = None  # [n] int32, in prefill: row of a sequence's last token
    keeps_all_rows: bool = False  # whether the model's output is of all tokens, not the last ones'

    # Sampling: [n] each. A sequence has a row in the model runner's tables while it is admitted.
    table_rows: Tensor | None = None  # int64
    temperatures: Tensor | None = None  # float32
    seeds: Tensor | None = None  # int64
    last_positions: Tensor | None = None  # int64, of the last token; in decode, `positions`


_local = threading.local()  # each thread has its own: engines of two threads do not meet
_NONE = StepInputs()


def get_context() -> StepInputs:
    """Return the inputs of the step that this thread is running; empty ones when it runs none."""
    return getattr(_local, "inputs", _NONE)


def set_context(inputs: StepInputs) -> None:
    """Make `inputs` those of the running step."""
    _local.inputs = inputs


def reset_context() -> None:
    """Say that no step is running."""
    _local.inputs = _NONE


@contextmanager
def running(inputs: StepInputs) -> Iterator[None]:
    """Inside the `with`, the step of `inputs` is running."""
    set_context(inputs)
    try:
        yield
    finally:
        reset_context()
