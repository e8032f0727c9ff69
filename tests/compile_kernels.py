"""Compile the Triton kernels for a Hopper GPU, which need not be there, and print the name of each.

    python tests/compile_kernels.py [attention|formats|rest|names]

Without a word, all three parts; with "names", only the names of all, which takes a few seconds.

The interpreter, in which the other tests run them, allows what the compiler does not: a variable
that is a tensor in one branch and a constant before it, say. Run without TRITON_INTERPRET. Shapes
are those of a rank of Qwen3-8B: 8 query heads, 2 KV heads, 4096 hidden numbers.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nanovllm.checkpoints.kv_scales import FP8, KVScales
from nanovllm.kernels import (
    _gluon,
    all_reduce,
    copy_blocks,
    fp8_dequantize,
    fp8_gemm,
    fp8_gemv,
    fp8_quantize,
    fp8_scaled_gemm,
    gate_mul,
    gate_up_gemm,
    gemv,
    grouped_gemm,
    gumbel,
    hopper_gemm,
    hopper_prefill,
    int4_dequantize,
    int4_gemm,
    int4_gemv,
    int4_grouped_gemm,
    moe,
    norm_rope_store,
    paged_decode,
    penalties,
    prefill_all_reduce,
    prefill_parts,
    prefill_tiles,
    prefix_tensors,
    projection_norm,
    rms_norm,
    shared_prefix,
    split_gemm,
    threshold,
    token_mask,
    token_ranks,
    varlen_prefill,
)
from nanovllm.kernels.fp8_weight import FP8Weight, Rounding
from nanovllm.kernels.int4_config import Int4GemmConfig
from nanovllm.kernels.int4_layout import Int4Weight, packed_width
from nanovllm.sharing.copy_on_write import BlockCopy

HIDDEN, HEADS, KV_HEADS, DIM, EPS = 4096, 8, 2, 128, 1e-6
PDL = {"PDL": True, "launch_pdl": True}
target = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)
run = JITFunction.run
compiled: set[str] = set()  # the hashes of all kernels


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    if "APPROX" in options:
        options["APPROX"] = True  # as on a GPU
    if "NATIVE" in options:
        options["NATIVE"] = True  # likewise
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    compiled.add(kernel.hash)
    assert kernel.metadata.shared <= 227 << 10, (self.__name__, kernel.metadata.shared)
    if options.get("TILE_ROWS") == 128 and options["maxnreg"] <= 80:
        # Of `hopper_gemm` two programs are to share a multiprocessor, which keeps 1 KB for each.
        assert 2 * (kernel.metadata.shared + 1024) <= 228 << 10, kernel.metadata.shared
    if "READ_AHEAD" in options:
        # If Triton did not pipeline the loop, nothing would be read ahead. If it does, it keeps all
        # tiles of K and V but one in shared memory.
        tile = options["BLOCK_N"] * options["HEAD_DIM"] * args[1].itemsize  # of the cache
        least = 2 * (options["num_stages"] - 1) * tile
        assert kernel.metadata.shared >= least, (self.__name__, kernel.metadata.shared)
    if kernel.asm["ptx"].count("e4m3x2.f32"):  # numbers are stored in an FP8 cache
        assert "cvt.rn.satfinite.e4m3x2.f32" in kernel.asm["ptx"]
        # Where numbers are cut to the range of FP8 before, NaN stays NaN.
        assert "min.xorsign" not in kernel.asm["ptx"], self.__name__
    print(self.__name__)


def print_name(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    print(self.__name__)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return numbers(*shape, dtype=torch.int32)


def compile_attention_options() -> None:
    """Windows and soft caps, with the heads of Qwen3-8B and those of Gemma 3."""
    for dim, window, softcap in ((DIM, 512, 50.0), (DIM, None, 50.0), (256, 512, None)):
        q, k, v = numbers(16, HEADS + 2 * KV_HEADS, dim).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        caches = [numbers(4, 256, KV_HEADS, dim) for _ in range(2)]
        options: dict[str, Any] = {"window": window, "softcap": softcap}
        for splits in (1, 8):
            config = paged_decode.DecodeConfig(64, splits)
            tables = ints(16, 16).t()
            paged_decode.paged_decode(q, *caches, ints(16), tables, 1.0, config=config, **options)
        for block_tables in (None, ints(2, 16)):
            inputs = (q, k, v, *caches, ints(3), ints(3), 9, 9, 1.0, block_tables)
            varlen_prefill.varlen_prefill(*inputs, **options)
        prefill_tiles.tiled_prefill(q, *caches, ints(9, 4), ints(16, 2).t(), 1.0, **options)
        options["arrivals"] = prefill_parts.make_arrivals(HEADS, q.device)
        prefill_tiles.tiled_prefill(q, *caches, ints(9, 8), ints(16, 2).t(), 1.0, **options)


def compile_gluon() -> None:
    """The kernels for Hopper, where the installed Triton has Gluon."""
    if not _gluon.HAS_GLUON:
        print("no Gluon")
        return
    gate_up_gemm.gate_up_gemm(numbers(16, HIDDEN), numbers(512, HIDDEN))
    q, _, _ = numbers(16, HEADS + 2 * KV_HEADS, DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    slots = numbers(1024, KV_HEADS, DIM)
    hopper_prefill.hopper_prefill(q, slots, slots, ints(3, 4), ints(16, 2).t(), 256, 1.0)
    compile_hopper_gemm()


def compile_hopper_gemm() -> None:
    """INT4 with groups of 32, of a block, and of a row; FP8 with scales of rows and of blocks."""
    rows = FP8Weight(numbers(256, HIDDEN).to(FP8), numbers(256).float(), 1, HIDDEN)
    blocks = rows._replace(scales=numbers(2, 32).float(), row_grain=128, column_grain=128)
    for weight in (int4_weight(128, True), int4_weight(32, False), rows, blocks):
        for num_tokens in (16, 64, 200):
            hopper_gemm.hopper_gemm(numbers(num_tokens, HIDDEN), weight, numbers(256))
        for num_tokens in (16, 48, 64):  # FP8: tiles of 64 rows up to 16 tokens
            x = numbers(num_tokens, HIDDEN)
            hopper_gemm.hopper_gemm(x, weight, activation="silu")
    hopper_gemm.hopper_gemm(numbers(32, 960).half(), int4_weight(960, True, in_size=960))
    hopper_gemm.hopper_gemm(numbers(128, HIDDEN).half(), rows)
    # The largest tile, of 256 tokens, leaves the least shared memory for all else.
    hopper_gemm.hopper_gemm(numbers(1000, HIDDEN), int4_weight(128, True, out_size=1024))


def shared_prefixes() -> prefix_tensors.SharedPrefixes:
    return prefix_tensors.SharedPrefixes(
        tiles=ints(9, 5),
        members=ints(16),
        prefix_lens=ints(16),
        num_parts=ints(16),
        suffix_lens=ints(16),
        max_parts=8,
    )


def compile_shared_prefixes() -> None:
    """Groups in decode: blocks that hold whole tiles or do not, suffixes in splits or in one."""
    for dim, block_size, splits, softcap in (
        (DIM, 256, 1, None),
        (DIM, 48, 1, 50.0),
        (80, 20, 8, None),
    ):
        q = numbers(16, HEADS + 2 * KV_HEADS, dim)[:, :HEADS]
        caches = [numbers(4, block_size, KV_HEADS, dim) for _ in range(2)]
        config = None
        if splits > 1:
            config = paged_decode.DecodeConfig(64, splits)
        tables = ints(16, 16).t()
        shared_prefix.shared_prefix_decode(
            q, *caches, shared_prefixes(), tables, 1.0, softcap=softcap, config=config
        )


def int4_weight(
    group_size: int, is_symmetric: bool, in_size: int = HIDDEN, out_size: int = 256
) -> Int4Weight:
    groups = in_size // group_size
    return Int4Weight(
        packed=torch.empty(out_size, packed_width(in_size), dtype=torch.int16),
        scales=numbers(out_size, groups, dtype=torch.float16),
        zero_points=None if is_symmetric else numbers(out_size, groups, dtype=torch.uint8),
        in_size=in_size,
        group_size=group_size,
    )


def compile_int4() -> None:
    """INT4 weights: groups in one block, of a whole block, and over several; columns in order or
    not, and a row that does not fill its last block.
    """
    how = {torch.bfloat16: int4_gemm.BFLOAT16, torch.float16: int4_gemm.FLOAT16}
    for module in (int4_gemm, int4_grouped_gemm):
        module.dequantization = lambda x: how[x.dtype]
    norm = numbers(HIDDEN)
    for weight in (
        int4_weight(32, is_symmetric=False),
        int4_weight(HIDDEN, is_symmetric=True),
        int4_weight(192, is_symmetric=False, in_size=960),
    ):
        x = numbers(16, weight.in_size)
        weights = {"norm_weight": norm[: weight.in_size], "eps": EPS}
        int4_gemv.int4_gemv(x[:1], weight, numbers(256), **weights, residual=numbers(1, 256))
        int4_dequantize.int4_dequantize(weight, torch.bfloat16)
        int4_gemm.int4_gemm(x, weight, numbers(256))
    weight = int4_weight(128, is_symmetric=True)
    int4_gemv.int4_gemv(numbers(1, HIDDEN).half(), weight)
    ordered = weight._replace(column_order=ints(HIDDEN))
    int4_gemv.int4_gemv(numbers(1, HIDDEN), ordered, None, norm, EPS, activation="silu")
    for tokens, rows in ((16, 128), (64, 64), (128, 64)):
        config = Int4GemmConfig(tokens, rows, splits=4, num_warps=4, num_stages=4)
        int4_gemm.int4_gemm(numbers(tokens, HIDDEN), weight, config=config)
    int4_gemm.int4_gemm(numbers(32, HIDDEN).half(), weight)
    experts = moe.MoEWeights(
        router=numbers(16, 2048),
        gate_up=int4_weight(128, True, in_size=2048, out_size=16 * 2 * 768),
        down=int4_weight(64, False, in_size=768, out_size=16 * 2048),
        top_k=8,
        is_normalized=True,
    )
    moe.moe_gemv(numbers(1, 2048), experts, numbers(1, 2048), numbers(2048), EPS)
    for num_tokens in (2, 200):  # tiles of 16 and 64 pairs
        moe.moe_partial_sums(numbers(num_tokens, 2048), experts)


def compile_fp8_cache() -> None:
    """Everything that stores to a KV cache in FP8, or attends from it."""
    scales = KVScales(0.5, 0.25)
    caches = [numbers(4, 256, KV_HEADS, DIM).to(FP8) for _ in range(2)]
    qkv = numbers(16, HEADS + 2 * KV_HEADS, DIM)
    positions = numbers(16, dtype=torch.int64)
    angles = numbers(99, DIM // 2, dtype=torch.float32)
    inputs = (positions, angles, angles, numbers(DIM), numbers(DIM), EPS, *caches, ints(16), HEADS)
    norm_rope_store.norm_rope_store(qkv, *inputs, scales=scales)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    options: dict[str, Any] = {"v_scale": scales.v}
    for block_n, splits, registers in ((64, 1, 128), (64, 8, None)):
        config = paged_decode.DecodeConfig(block_n, splits, max_registers=registers)
        tables = ints(16, 16).t()
        paged_decode.paged_decode(q, *caches, ints(16), tables, 1.0, config=config, **options)
    varlen_prefill.varlen_prefill(
        q, k, v, *caches, ints(3), ints(3), 9, 9, 1.0, ints(2, 16), window=512, **options
    )
    arrivals = prefill_parts.make_arrivals(HEADS, q.device)
    tables = ints(16, 2).t()
    prefill_tiles.tiled_prefill(q, *caches, ints(9, 8), tables, 1.0, arrivals=arrivals, **options)
    if _gluon.HAS_GLUON:  # it attends to new keys only, which are in 16 bits
        hopper_prefill.hopper_prefill(q, k, v, ints(3, 4), None, 0, 1.0, scales.v)
    for block_size in (256, 20):
        caches = [numbers(4, block_size, KV_HEADS, DIM).to(FP8) for _ in range(2)]
        shared_prefix.shared_prefix_decode(
            q, *caches, shared_prefixes(), ints(16, 16), 1.0, **options
        )


def compile_fp8() -> None:
    """FP8 weights: a scale for a row, for a block that is larger than a tile, and for a small one.

    The conversions have to be single instructions: for two numbers, to fp16 and from float32.
    """
    fp8_gemv.has_assembly = lambda x: True
    norm, bias = numbers(HIDDEN), numbers(256)
    for row_grain, column_grain in ((1, HIDDEN), (128, 128), (32, 32)):
        scales = numbers(256 // row_grain, HIDDEN // column_grain, dtype=torch.float32)
        weight = FP8Weight(numbers(256, HIDDEN).to(FP8), scales, row_grain, column_grain)
        x = numbers(1, HIDDEN)
        fp8_gemv.fp8_gemv(x, weight, bias, norm, EPS, numbers(1, 256))
        fp8_gemv.fp8_gemv(x, weight, None, norm.float(), EPS, activation="silu")
        fp8_gemv.fp8_gemv(x.half(), weight)
        for num_tokens in (32, 64, 128) if row_grain != 32 else ():
            fp8_gemm.fp8_gemm(numbers(num_tokens, HIDDEN), weight)
        fp8_gemm.fp8_gemm(x.half().expand(16, -1).contiguous(), weight)
        fp8_gemm.fp8_gemm(numbers(2, HIDDEN), weight, bias, reader_sums=False)
        fp8_dequantize.fp8_dequantize(weight, torch.bfloat16)
        for num_tokens in (128, 512):
            rounding = Rounding(column_grain, num_tokens)
            quantized = fp8_quantize.quantize_input(numbers(num_tokens, HIDDEN), rounding)
            for reader_sums in (False, True):
                fp8_scaled_gemm.fp8_scaled_gemm(quantized, weight, bias, reader_sums)
        compile_rounding(column_grain)
    for row_grain, column_grain in ((1, 0), (128, 128)):  # experts of Qwen3-30B-A3B
        matrices = []
        for rows, columns in ((2 * 768, 2048), (2048, 768)):
            grain = column_grain or columns
            scales = numbers(128 * rows // row_grain, columns // grain, dtype=torch.float32)
            values = torch.empty(128, rows, columns, dtype=FP8)
            matrices.append(FP8Weight(values, scales, row_grain, grain))
        experts = moe.MoEWeights(numbers(128, 2048), *matrices, top_k=8, is_normalized=True)
        moe.moe_gemv(numbers(1, 2048), experts, numbers(1, 2048), numbers(2048), EPS)
        for num_tokens in (2, 600):
            moe.moe_partial_sums(numbers(num_tokens, 2048), experts)


def compile_rounding(group_size: int) -> None:
    """Whatever computes an input in FP8: one kernel for all numbers of tokens. Otherwise a prompt
    would wait for the compiler, as Triton makes a variant for numbers that 16 divides.
    """
    num_kernels = []
    for num_tokens in (16, 77):
        rounding = Rounding(group_size, num_tokens)
        residual, sums = numbers(num_tokens, HIDDEN), numbers(1, num_tokens, HIDDEN)
        fp8_quantize.quantize_input(residual, rounding)
        rms_norm.add_rms_norm(residual, sums, numbers(HIDDEN), EPS, rounding=rounding)
        gate_mul.gate_mul_rounded(numbers(num_tokens, 2 * HIDDEN), "silu", rounding)
        num_kernels.append(len(compiled))
    assert num_kernels[0] == num_kernels[1], "a kernel is compiled for some numbers of tokens"


def compile_attention() -> None:
    """In 16 bits: decode and prefill, with options and without, and groups with shared prefixes."""
    caches = [numbers(4, 256, KV_HEADS, DIM) for _ in range(2)]
    q, k, v = numbers(16, HEADS + 2 * KV_HEADS, DIM).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    for block_n, splits, registers in ((32, 1, 128), (64, 1, None), (64, 8, None)):
        config = paged_decode.DecodeConfig(block_n, splits, max_registers=registers)
        paged_decode.paged_decode(q, *caches, ints(16), ints(16, 16), 1.0, config=config)
    for tables in (None, ints(2, 16)):
        varlen_prefill.varlen_prefill(q, k, v, *caches, ints(3), ints(3), 9, 9, 1.0, tables)
    prefill_tiles.tiled_prefill(q, *caches, ints(9, 4), ints(16, 2).t(), 1.0)
    compile_attention_options()
    compile_shared_prefixes()


def compile_formats() -> None:
    """FP8 and INT4: weights and the KV cache."""
    compile_int4()
    compile_fp8_cache()
    compile_fp8()


def compile_rest() -> None:
    """Products and experts in 16 bits, what stands between them, sampling, all-reduce."""
    compile_gluon()
    copy_blocks.copy_blocks_triton(
        numbers(2, 2, 4, 16, 2, 8), [BlockCopy(0, 1, 9)], torch.from_numpy
    )
    norm, x, bias = numbers(HIDDEN), numbers(16, HIDDEN), numbers(256)
    token_ranks.token_ranks(x, torch.zeros(16, dtype=torch.int64))
    rms_norm.rms_norm(x, norm, EPS)
    for activation in ("silu", "gelu_tanh"):
        gate_mul.gate_mul(x, activation)
        gemv.gemv(x[:1], numbers(256, HIDDEN), None, norm.float(), EPS, activation=activation)
    for weight in (norm, None):
        rms_norm.add_rms_norm(x, numbers(3, 16, HIDDEN), weight, EPS)
        rms_norm.add_rms_norm(x, numbers(3, 16, HIDDEN), weight, EPS, norm.float(), EPS)
        rms_norm.add_rms_norm(x, numbers(1, 16, HIDDEN), weight, EPS, scale=0.25)
        prefill_all_reduce.add_norm(x, numbers(4, 16, HIDDEN), x, x, weight, EPS, 1)
    gemv.gemv(x[:1], numbers(256, HIDDEN), bias, norm, EPS, numbers(1, 256))
    for num_tokens in (2, 32, 64, 128):
        for splits in (1, 4, 16):  # in chunks; whole tiles where they fit
            split_gemm.split_gemm(numbers(num_tokens, HIDDEN), numbers(256, HIDDEN), bias, splits)

    # Qwen3-30B-A3B, on one rank
    experts = moe.MoEWeights(
        router=numbers(128, 2048),
        gate_up=torch.empty(128, 2 * 768, 2048, dtype=torch.bfloat16),
        down=torch.empty(128, 2048, 768, dtype=torch.bfloat16),
        top_k=8,
        is_normalized=True,
    )
    moe.moe_gemv(numbers(1, 2048), experts, numbers(1, 2048))
    for num_tokens in (2, 200, 600, 2000):  # tiles of 16, 32, 128 and 128 tokens
        moe.moe_partial_sums(numbers(num_tokens, 2048), experts)
    router = numbers(16, 256, dtype=torch.float32)
    gate_up, down = router.expand(16, 16, 256).contiguous(), router.new_zeros(16, 256, 8)
    for grouped_gemm.has_tma in (lambda: True, lambda: False):
        exact = moe.MoEWeights(router, gate_up, down, top_k=2, is_normalized=False)
        moe.moe_partial_sums(router, exact)
    moe.moe_gemv(numbers(1, 2048), experts, numbers(1, 2048), numbers(2048), EPS)

    positions, angles = numbers(16, dtype=torch.int64), numbers(99, DIM // 2, dtype=torch.float32)
    caches = [numbers(4, 256, KV_HEADS, DIM) for _ in range(2)]
    for shape, weight in (((5,), numbers(DIM)), ((), None)):
        qkv = numbers(*shape, 16, HEADS + 2 * KV_HEADS, DIM)
        norm_rope_store.norm_rope_store(
            qkv, positions, angles, angles, weight, weight, EPS, *caches, ints(16), HEADS
        )
    rows, heads = numbers(16, (HEADS + 2 * KV_HEADS) * DIM), numbers(HEADS * DIM)
    kv_heads = heads[: KV_HEADS * DIM]
    projection_norm.projection_norm(rows, heads, kv_heads, EPS)
    sums = projection_norm.sums_of_squares(rows, len(heads), len(kv_heads))
    projection_norm.projection_norm(rows, heads, kv_heads, EPS, sums, 4)
    qkv = numbers(16, HEADS + 2 * KV_HEADS, DIM)
    for rotated, interleaved in ((0, False), (24, False), (64, True), (24, True)):
        cos = numbers(99, rotated, dtype=torch.float32) if rotated else None
        norm_rope_store.norm_rope_store(
            qkv, positions, cos, cos, None, None, EPS, *caches, ints(16), HEADS, interleaved
        )

    logits, floats = numbers(16, 30000), numbers(16, dtype=torch.float32)
    for thresholds in (floats, None):
        gumbel.gumbel_argmax(logits, floats, positions, positions, 0, thresholds)
    counts = numbers(16, 30000, dtype=torch.int16)
    penalties.penalize(logits, counts, positions, penalties.Penalties(floats, floats, floats))
    threshold.filter_thresholds(logits, floats, threshold.Filters(ints(16), floats, floats))
    token_mask.mask_tokens(logits, token_mask.TokenMasks(positions, ints(16, 938)))

    summed = all_reduce.SmallAllReduce.__new__(all_reduce.SmallAllReduce)
    summed.addresses, summed.rounds = positions, ints(512)
    summed.rank, summed.slice_words = 2, HIDDEN // 2
    for summed.size in (2, 4):
        for num_rows in (8, 256):  # one-shot and, with more than two ranks, two-shot
            rows = numbers(num_rows, HIDDEN)
            summed(rows)
            summed(rows, rows.clone(), norm, EPS)
            summed(numbers(2, num_rows, HIDDEN), rows, norm, EPS)


PARTS = {"attention": compile_attention, "formats": compile_formats, "rest": compile_rest}


def replace_launches(instead: Callable[..., None]) -> None:
    """Have each launch of a kernel do this instead, as if a Hopper GPU were there."""
    driver.set_active(target)
    JITFunction.run = instead
    for name, module in sys.modules.items():
        if name.startswith("nanovllm.kernels.") and hasattr(module, "pdl_options"):
            module.pdl_options = lambda: PDL


def main(part: str | None = None) -> None:
    replace_launches(print_name if part == "names" else compile_only)
    for name, compile_part in PARTS.items():
        if part in (None, "names", name):
            compile_part()


if __name__ == "__main__":
    main(*sys.argv[1:])
