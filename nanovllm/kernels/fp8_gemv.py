"""A linear layer of FP8 weights for one token: `packed_gemv` of four numbers a word.

Where a row has a single scale, its finished sum is multiplied by that. Where blocks have one each,
what a thread has summed up of a block is, before the threads are added.
"""

from torch import Tensor

from nanovllm.kernels.fp8_config import fp8_gemv_config
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.packed_config import PackedGemvConfig
from nanovllm.kernels.packed_gemv import packed_gemv
from nanovllm.kernels.packed_tile import Tile
from nanovllm.kernels.packed_words import has_assembly

THREAD_COLUMNS = 8  # that a thread reads at a time, or twice as many; they must be of one grain


def fp8_gemv(
    x: Tensor,
    weight: FP8Weight,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    activation: str | None = None,
    config: PackedGemvConfig | None = None,
) -> Tensor:
    """`gemv` with an FP8 weight: `residual + rms_norm(x) W^T + bias`, `[1, out]`.

    The reference is that of `gemv`, with the weight of `dequantize_fp8`.

    weight: its column grain is a multiple of 8, or a whole row.
    x, bias, norm_weight, eps, residual, activation: as for `gemv`.
    config: overrides `fp8_gemv_config`, for tests and tuning.
    """
    halves = 1 if activation is None else 2
    if config is None:
        config = fp8_gemv_config(weight.in_size, weight.column_grain, halves == 2)
    tile = Tile(
        format="fp8",
        in_size=weight.in_size,
        row_grain=weight.row_grain,
        column_grain=weight.column_grain,
        halves=halves,
        rows=config.rows,
        words=config.words,
        warps=config.warps,
        has_assembly=has_assembly(x),
    )
    assert weight.has_whole_rows or weight.column_grain % (4 * config.words) == 0
    assert halves == 1 or weight.out_size // 2 % weight.row_grain == 0
    return packed_gemv(
        x,
        weight.values,
        weight.scales,
        tile,
        config.programs,
        bias=bias,
        norm_weight=norm_weight,
        eps=eps,
        residual=residual,
        activation=activation,
    )
