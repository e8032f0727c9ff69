"""How the kernels of INT4 weights divide their work, and which of them is taken.

The numbers were measured on an H100, those of the GEMV in packed_config.py. Those of experts follow
from the compiled code; `scripts/bench_quantized.py` is there to replace them.
"""

from dataclasses import dataclass

from nanovllm.kernels._triton import next_power_of_2
from nanovllm.kernels.int4_layout import packed_width
from nanovllm.kernels.packed_config import PackedGemvConfig, packed_gemv_config


def int4_gemv_config(in_size: int, is_gated: bool) -> PackedGemvConfig:
    """Choose tiles, with more columns for a thread than those of FP8 have: their scaling and their
    sums cost as much as some rows.
    """
    return packed_gemv_config(in_size, packed_width(in_size) // 2, is_gated, thread_columns=48)


@dataclass(frozen=True, slots=True)
class Int4GemmConfig:
    """The tiles of `int4_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile: a power of two, at least 16
    rows: int  # of the weight in a tile: 64 or 128
    splits: int  # of the inner dimension
    num_warps: int
    num_stages: int  # blocks of the weight that are on their way


MAX_GEMM_TOKENS = 256  # above, dequantising the weight for cuBLAS costs less than it saves
MIN_BLOCKS_PER_SPLIT = 4  # fewer than the stages of the pipeline would leave it empty


def int4_gemm_config(
    num_tokens: int,
    out_size: int,
    in_size: int,
    num_multiprocessors: int,
    reader_sums: bool = True,
) -> Int4GemmConfig:
    """Choose tiles that give every multiprocessor some work.

    reader_sums: whether the kernel that reads the product adds up partial sums. Otherwise there is
        one of them, as an addition of its own would cost what splitting gains.
    With 128 rows a weight takes 2.6 instructions, with 64 it takes 3.4, of which half are the
    loop's own.
    """
    tokens = min(64, max(16, next_power_of_2(num_tokens)))
    row_tiles = -(-out_size // 128)
    rows = 64 if tokens <= 32 and row_tiles > num_multiprocessors else 128
    tiles = -(-out_size // rows) * -(-num_tokens // tokens)
    blocks = -(-in_size // 128)
    splits = 1
    if reader_sums:
        programs = (3 if tokens <= 32 else 2) * num_multiprocessors
        splits = max(1, min(programs // tiles, blocks // MIN_BLOCKS_PER_SPLIT, 8))
    return Int4GemmConfig(tokens, rows, splits, num_warps=4, num_stages=4)


def int4_expert_rows(num_slots: int) -> int:
    """Choose the outputs of a program that adds up so many experts: a thread has two for each of
    its experts, so that what it reads of x serves for both.
    """
    return 2 if num_slots >= 4 else 4


@dataclass(frozen=True, slots=True)
class Int4ExpertConfig:
    """The tiles of a grouped GEMM of INT4 weights."""

    tokens: int  # pairs of a token and an expert in a tile: a power of two, at least 16
    rows: int  # of the weight in a tile; of gate and of up each
    num_warps: int
    num_stages: int


def int4_expert_config(num_pairs: int, num_experts: int, itemsize: int) -> Int4ExpertConfig:
    """Choose tiles of which an expert rarely needs two, since each dequantises its weight anew."""
    mean = -(-num_pairs // num_experts)  # pairs of an expert
    tokens = min(64, max(16, next_power_of_2(2 * mean - 1)))
    if itemsize > 2:  # exact products are not for tensor cores
        return Int4ExpertConfig(min(tokens, 32), rows=64, num_warps=4, num_stages=2)
    return Int4ExpertConfig(tokens, rows=64, num_warps=4, num_stages=4 if tokens <= 32 else 3)
