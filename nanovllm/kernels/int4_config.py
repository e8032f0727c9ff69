"""How the kernels of INT4 weights divide their work, and which of them is taken.

Nothing here has been measured yet: the numbers follow from the compiled code (see each), and
`scripts/bench_quantized.py` is there to replace them.
"""

from dataclasses import dataclass

from nanovllm.kernels._triton import next_power_of_2


@dataclass(frozen=True, slots=True)
class Int4GemvConfig:
    """How `int4_gemv` divides the work; the result does not depend on it."""

    rows: int  # of the weight, that a program takes; of the gate and of up as many each
    chunks: int  # of 1,024 columns, that are multiplied at a time: a power of two
    num_warps: int  # at most `chunks`: then each warp reads the part of x that it multiplies with


def int4_gemv_config(out_size: int, in_size: int, is_gated: bool) -> Int4GemvConfig:
    """Choose the rows and columns of a program.

    More rows share the work of loading x and of normalising it, some five instructions an element,
    where a weight takes four. Fewer give every multiprocessor something to do, and leave registers
    where the columns are multiplied in several pieces, all of which are loaded at once.
    """
    chunks = min(4, next_power_of_2(max(1, in_size // 1024)))
    rows = 8 if out_size >= 2048 and in_size <= chunks * 1024 else 4
    if is_gated:
        rows //= 2  # each output needs two rows of the weight
    return Int4GemvConfig(rows=rows, chunks=chunks, num_warps=chunks)


@dataclass(frozen=True, slots=True)
class Int4GemmConfig:
    """The tiles of `int4_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile: a power of two, at least 16
    rows: int  # of the weight in a tile: 64 or 128
    splits: int  # of the inner dimension
    num_warps: int
    num_stages: int  # blocks of the weight that are on their way


MAX_GEMM_TOKENS = 256  # above, dequantising the weight for cuBLAS costs less than it saves
MAX_HOPPER_TOKENS = 2047  # the same for `hopper_gemm`
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
