"""How `hopper_gemm` divides its work."""

from dataclasses import dataclass

from nanovllm.kernels._triton import next_power_of_2

MIN_BLOCKS_PER_SPLIT = 4


@dataclass(frozen=True, slots=True)
class HopperGemmConfig:
    """The tiles of `hopper_gemm`; the result does not depend on them but for rounding."""

    tokens: int  # in a tile: 64, 128 or 256
    splits: int  # of the inner dimension
    num_stages: int  # blocks of 128 columns that are on their way


def hopper_gemm_config(
    num_tokens: int,
    out_size: int,
    in_size: int,
    num_multiprocessors: int,
    reader_sums: bool = True,
) -> HopperGemmConfig:
    """Choose tiles that give every multiprocessor some work."""
    tokens = min(128, max(64, next_power_of_2(num_tokens)))
    tiles = -(-out_size // 128) * -(-num_tokens // tokens)
    blocks = -(-in_size // 128)
    splits = 1
    if reader_sums:
        splits = max(1, min(num_multiprocessors // tiles, blocks // MIN_BLOCKS_PER_SPLIT))
    return HopperGemmConfig(tokens, splits, num_stages=4)
