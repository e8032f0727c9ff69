"""What the kernels of attention with shared prefixes are given, and hand on."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """The groups of a decode step of n sequences, on the device. Tensors are int32."""

    tiles: Tensor  # [max_tiles, 5]: the work list, see prefix_groups.py
    members: Tensor  # [n]: rows of the step, one group after the other
    prefix_lens: Tensor  # [n]: tokens of each sequence that it shares with its group; else 0
    num_parts: Tensor  # [n]: into so many parts that prefix is cut
    suffix_lens: Tensor  # [n]: tokens behind the prefix; 0 for a padding row
    max_parts: int  # of a prefix


@dataclass(frozen=True, slots=True)
class PartialResults:
    """The attention of n sequences to parts of their contexts, each as if it were all.

    Each sequence has slots for the parts of its prefix, and behind them for the splits of the rest.
    """

    values: Tensor  # [n, heads, num_slots, head_dim] float32
    lse: Tensor  # [n, heads, num_slots] float32: log-sum-exp of the scores, to the base 2

    @property
    def num_slots(self) -> int:
        """The slots of a sequence."""
        return self.lse.shape[2]
