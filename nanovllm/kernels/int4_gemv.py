"""A linear layer of INT4 weights for one token: `packed_gemv` of eight numbers a word."""

import torch
from torch import Tensor

from nanovllm.kernels.int4_config import int4_gemv_config
from nanovllm.kernels.int4_layout import Int4Weight
from nanovllm.kernels.packed_config import PackedGemvConfig
from nanovllm.kernels.packed_gemv import packed_gemv
from nanovllm.kernels.packed_tile import Tile


def int4_tile(x: Tensor, weight: Int4Weight, halves: int, config: PackedGemvConfig) -> Tile:
    """Return what a kernel knows of its work when it is compiled.

    halves: 2 if the weight is a gate projection above an up projection, else 1.
    """
    return Tile(
        format="int4",
        in_size=weight.in_size,
        row_grain=1,
        column_grain=weight.group_size,
        halves=halves,
        rows=config.rows,
        words=config.words,
        warps=config.warps,
        is_exact=x.dtype == torch.float32,
    )


def int4_gemv(
    x: Tensor,
    weight: Int4Weight,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    config: PackedGemvConfig | None = None,
) -> Tensor:
    """`gemv` with an INT4 weight: `residual + rms_norm(x) W^T + bias`, `[1, out]`.

    The reference is that of `gemv`, with the weight of `dequantize_int4`.

    x, bias, norm_weight, eps, residual, activation: as for `gemv`.
    config: overrides `int4_gemv_config`, for tests and tuning.
    """
    halves = 1 if activation is None else 2
    if config is None:
        config = int4_gemv_config(weight.in_size, halves == 2)
    return packed_gemv(
        x,
        weight.packed,
        weight.scales,
        int4_tile(x, weight, halves, config),
        config.programs,
        zero_points=weight.zero_points,
        column_order=weight.column_order,
        bias=bias,
        norm_weight=norm_weight,
        eps=eps,
        residual=residual,
        activation=activation,
    )
