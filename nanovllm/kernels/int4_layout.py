"""How the weights of an INT4 linear layer lie in memory, whatever checkpoint they came from.

A weight of a row and column is `scale * (n - zero_point)`, with n from 0 to 15. Scale and zero
point are those of its group: `group_size` neighbouring columns of one row. A 16-bit number holds
the n of four columns, so that a thread that reads 16 bytes has 32 of them:

    a block: 128 columns of a row, in 32 numbers (64 bytes)

    bits         0..3       4..7       8..11      12..15
    number 0     column 0   column 32  column 64  column 96
    number 1     column 1   column 33  column 65  column 97
    ...
    number 31    column 31  column 63  column 95  column 127

One shift and one mask so take the n of neighbouring columns out of neighbouring numbers, which are
in neighbouring registers (two numbers a register), in the order in which they meet the inputs, that
are read 16 bytes at a time, too. And since 32 is the smallest group, all that one such step takes
out of a block is of one group.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STRIPE = 32  # neighbouring columns that are taken out in one step; the smallest group
BLOCK = 4 * STRIPE  # columns of a block
SYMMETRIC_ZERO = 8  # the zero point of weights that are stored without one


class Int4Weight(NamedTuple):
    """A matrix `[out, in]` in four bits an element."""

    packed: Tensor  # [out, blocks * 32] int16, contiguous; see above
    scales: Tensor  # [out, groups], contiguous; any float dtype
    zero_points: Tensor | None  # [out, groups] uint8, from 0 to 16; None: 8 everywhere
    in_size: int  # columns; a last block may hold fewer than 128
    group_size: int  # columns of a group: a multiple of 32, or there is one group a row
    # [in] int32: the column of x that each is multiplied with; None: they are in order.
    column_order: Tensor | None = None

    @property
    def out_size(self) -> int:
        """Rows of the matrix."""
        return len(self.packed)


def packed_width(in_size: int) -> int:
    """Return how many 16-bit numbers hold a row of so many columns."""
    return -(-in_size // BLOCK) * STRIPE


def positions_per_group(group_size: int, in_size: int) -> int:
    """Return how many of a block's four steps, one after the other, are surely of one group."""
    if group_size % BLOCK == 0 or group_size >= in_size:
        return 4
    return 2 if group_size % (2 * STRIPE) == 0 else 1


def pack_int4(values: Tensor) -> Tensor:
    """Pack n `[out, in]`, integers from 0 to 15, into `[out, packed_width(in)]` int16."""
    out_size, in_size = values.shape
    num_blocks = -(-in_size // BLOCK)
    padded = F.pad(values.to(torch.int32), (0, num_blocks * BLOCK - in_size))
    positions = padded.view(out_size, num_blocks, 4, STRIPE)
    numbers = positions[:, :, 0].clone()
    for position in range(1, 4):
        numbers |= positions[:, :, position] << 4 * position
    return numbers.view(out_size, -1).to(torch.int16)  # which keeps the lower half


def unpack_int4(packed: Tensor, in_size: int) -> Tensor:
    """Return the n `[out, in]`, uint8, of `[out, packed_width(in)]` int16."""
    out_size = len(packed)
    numbers = packed.view(out_size, -1, 1, STRIPE)
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=packed.device).view(4, 1)
    values = (numbers >> shifts & 15).to(torch.uint8)
    return values.view(out_size, -1)[:, :in_size]


def dequantize_int4(weight: Int4Weight, dtype: torch.dtype) -> Tensor:
    """Return the matrix `[out, in]`, computed in float32: the reference of all kernels.

    Its columns are those of x, in whatever order they are packed.
    """
    values = unpack_int4(weight.packed, weight.in_size).float()
    group = torch.arange(weight.in_size, device=values.device) // weight.group_size
    if weight.zero_points is None:
        values -= SYMMETRIC_ZERO
    else:
        values -= weight.zero_points[:, group].float()
    matrix = values.mul_(weight.scales[:, group].float()).to(dtype)
    if weight.column_order is None:
        return matrix
    ordered = torch.empty_like(matrix)
    ordered[:, weight.column_order.long()] = matrix
    return ordered
