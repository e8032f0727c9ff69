"""Time the linear layers of one decoder layer with quantised weights against bf16, on a GPU.

    python scripts/bench_quantized.py [8B] [0.6B] [--formats int4 fp8 fp8-blocks] [--sweep]

For each number of tokens: microseconds of the four products of a layer, as a decode step runs them
in a CUDA graph (one token: with norm, activation and addition), and how many times as fast as bf16
they are together. Below 1 is what no format may be at any size. With --sweep, other tiles than
those that kernels/int4_config.py and fp8_config.py choose are tried, and the fastest are printed.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product as combinations
from typing import Any

import torch
from torch import Tensor

from attention_work import microseconds
from nanovllm.kernels.fp8_config import (
    FP8GemmConfig,
    fp8_gemm_config,
    fp8_gemv_config,
)
from nanovllm.kernels.fp8_gemm import fp8_gemm
from nanovllm.kernels.fp8_gemv import fp8_gemv
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.int4_config import (
    Int4GemmConfig,
    int4_gemm_config,
    int4_gemv_config,
)
from nanovllm.kernels.int4_gemm import int4_gemm
from nanovllm.kernels.int4_gemv import int4_gemv
from nanovllm.kernels.int4_layout import Int4Weight, packed_width
from nanovllm.kernels.packed_config import PackedGemvConfig
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.quantization.fp8_matmul import multiply_fp8
from nanovllm.quantization.int4_matmul import multiply_int4
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import READER_SUMS, Epilogue

DTYPE = torch.bfloat16
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
SWEPT_TOKENS = (1, 2, 8, 16, 32, 64, 128, 256, 512)
COLD_BYTES = 200 << 20  # of weights that take turns, so that none is in the L2 cache of 50 MB


@dataclass(frozen=True)
class Layer:
    """A linear layer, `[out_size, in_size]` over one rank."""

    name: str
    out_size: int
    in_size: int
    is_gated: bool = False

    @property
    def reads_norm(self) -> bool:
        """Whether it is behind a norm, and not before an addition."""
        return self.name in ("qkv", "gate_up")


def layers_of(hidden: int, intermediate: int, heads: int, kv_heads: int) -> list[Layer]:
    """The four layers of a decoder layer with heads of 128 numbers."""
    return [
        Layer("qkv", (heads + 2 * kv_heads) * 128, hidden),
        Layer("o", hidden, heads * 128),
        Layer("gate_up", 2 * intermediate, hidden, is_gated=True),
        Layer("down", hidden, intermediate),
    ]


MODELS = {
    "8B": layers_of(hidden=4096, intermediate=12288, heads=32, kv_heads=8),
    "0.6B": layers_of(hidden=1024, intermediate=3072, heads=16, kv_heads=8),
}


# --- formats --------------------------------------------------------------------------------------


def make_bf16(layer: Layer) -> Tensor:
    return torch.randn(layer.out_size, layer.in_size, dtype=DTYPE, device="cuda") * 0.02


def make_int4(layer: Layer, group_size: int = 128, has_zero_points: bool = False) -> Int4Weight:
    """Random numbers; scales as those of a trained model."""
    groups = (layer.out_size, layer.in_size // group_size)
    shape = (layer.out_size, packed_width(layer.in_size))
    zero_points = None
    if has_zero_points:
        zero_points = torch.randint(0, 16, groups, device="cuda").to(torch.uint8)
    return Int4Weight(
        packed=torch.randint(-(2**15), 2**15, shape, device="cuda").to(torch.int16),
        scales=torch.full(groups, 0.005, dtype=torch.float16, device="cuda"),
        zero_points=zero_points,
        in_size=layer.in_size,
        group_size=group_size,
    )


def make_fp8(layer: Layer, row_grain: int, column_grain: int | None = None) -> FP8Weight:
    """column_grain: of blocks; None: a row has one scale."""
    scales: tuple[int, ...] = (layer.out_size,)
    if column_grain is not None:
        scales = (layer.out_size // row_grain, layer.in_size // column_grain)
    return FP8Weight(
        values=make_bf16(layer).to(torch.float8_e4m3fn),
        scales=torch.full(scales, 0.005, device="cuda"),
        row_grain=row_grain,
        column_grain=column_grain or layer.in_size,
    )


def multiply_bf16(weight: Tensor, x: Tensor, epilogue: Epilogue, norm: RMSNorm | None) -> object:
    return UNQUANTIZED.multiply_matrix(weight, x, None, epilogue, norm)


def multiply_packed(
    weight: Int4Weight, x: Tensor, epilogue: Epilogue, norm: RMSNorm | None
) -> object:
    return multiply_int4(weight, x, None, epilogue, norm)


def multiply_float8(
    weight: FP8Weight, x: Tensor, epilogue: Epilogue, norm: RMSNorm | None
) -> object:
    return multiply_fp8(weight, x, None, epilogue, norm, quantizes_input=True)


@dataclass(frozen=True)
class Form:
    """A format: its weights, and how one multiplies with them."""

    make: Callable[[Layer], Any]
    multiply: Callable[[Any, Tensor, Epilogue, RMSNorm | None], object]
    bits: int

    def weights(self, layer: Layer) -> list[Any]:
        """As many weights as the cache cannot hold."""
        count = 1 + COLD_BYTES // self.bytes_of(layer)
        return [self.make(layer) for _ in range(count)]

    def bytes_of(self, layer: Layer) -> int:
        """The bytes of a weight, without its scales."""
        return layer.out_size * layer.in_size * self.bits // 8


FORMS = {
    "bf16": Form(make_bf16, multiply_bf16, bits=16),
    "fp8": Form(partial(make_fp8, row_grain=1), multiply_float8, bits=8),
    "fp8-blocks": Form(partial(make_fp8, row_grain=128, column_grain=128), multiply_float8, bits=8),
    "int4": Form(make_int4, multiply_packed, bits=4),
    "int4-zeros": Form(partial(make_int4, has_zero_points=True), multiply_packed, bits=4),
    "int4-32": Form(partial(make_int4, group_size=32), multiply_packed, bits=4),
}


# --- timing ---------------------------------------------------------------------------------------


def time_in_graph(runs: list[Callable[[], object]]) -> float:
    """Microseconds of one of the runs, in a CUDA graph of them all."""

    def run_all() -> None:
        for run in runs:
            run()

    run_all()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()
    return microseconds(graph.replay, len(runs))


def try_time(runs: list[Callable[[], object]]) -> float:
    """`time_in_graph`; infinite for what takes too many registers or too much shared memory."""
    try:
        return time_in_graph(runs)
    except Exception as error:  # noqa: BLE001 (Triton's are of several kinds)
        print(f"  not run: {type(error).__name__}")
        return float("inf")


def time_layer(layer: Layer, form: Form, weights: list[Any], num_tokens: int) -> float:
    """Microseconds of one product, with what a decode step has in the same kernel."""
    x = torch.randn(num_tokens, layer.in_size, dtype=DTYPE, device="cuda")
    norm = None
    epilogue = READER_SUMS
    if num_tokens == 1 and layer.reads_norm:
        norm = RMSNorm(layer.in_size, 1e-6).to("cuda", DTYPE)
    if layer.is_gated:
        epilogue = Epilogue(activation="silu") if num_tokens == 1 else Epilogue()
    if not layer.reads_norm:
        hidden = torch.zeros(num_tokens, layer.out_size, dtype=DTYPE, device="cuda")
        epilogue = Epilogue(add_to=hidden)
    return time_in_graph([partial(form.multiply, each, x, epilogue, norm) for each in weights])


def compare(model: str, formats: list[str]) -> None:
    """Print the times of all layers of a model for each number of tokens and format."""
    times: dict[tuple[str, int, str], float] = {}
    for layer in MODELS[model]:
        for name in ("bf16", *formats):
            form = FORMS[name]
            weights = form.weights(layer)
            for num_tokens in reversed(TOKENS):  # large products heat the GPU, which slows it down
                times[name, num_tokens, layer.name] = time_layer(layer, form, weights, num_tokens)
            del weights
            torch.cuda.empty_cache()
    names = [layer.name for layer in MODELS[model]]
    for name in formats:
        print(f"Qwen3-{model}, us of bf16 / {name}")
        print(f"{'tokens':>6}" + "".join(f"{layer:>18}" for layer in names) + f"{'all':>11}")
        for num_tokens in TOKENS:
            cells = ""
            for layer_name in names:
                plain = times["bf16", num_tokens, layer_name]
                cells += f"{plain:>9.1f} /{times[name, num_tokens, layer_name]:>7.1f}"
            total = [sum(times[each, num_tokens, n] for n in names) for each in ("bf16", name)]
            print(f"{num_tokens:>6}{cells}{total[0] / total[1]:>10.2f}x", flush=True)


# --- other tiles ----------------------------------------------------------------------------------


def gemv_configs(
    chosen: PackedGemvConfig, in_size: int, is_gated: bool
) -> Iterable[PackedGemvConfig]:
    """What to try for one token: from 16 to 100 columns a thread, and all programs that fit."""
    for warps, rows, programs in combinations((1, 2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 3, 4, 6, 8)):
        if 16 <= in_size // (32 * warps) <= 100 and rows * (1 + is_gated) <= 8:
            yield PackedGemvConfig(rows, chosen.words, warps, programs * max(1, 4 // warps))


def gemm_tiles(tokens: int, in_size: int) -> Iterable[tuple[int, int, int, int]]:
    """Tokens, rows, splits and stages to try for several tokens."""
    all_splits = [splits for splits in (1, 2, 3, 4, 6, 8, 12, 16) if splits <= in_size // 256]
    all_tokens = {tokens, max(16, tokens // 2), min(128, tokens * 2)}
    for tile in combinations(all_tokens, (64, 128), all_splits, (3, 4, 6)):
        if tile[0] * tile[1] <= 8192:
            yield tile


def int4_runs(layer: Layer, num_tokens: int, activation: str | None) -> tuple[Any, Any, set[Any]]:
    """The kernel, its chosen configuration, and all that are tried."""
    if num_tokens == 1:
        chosen = int4_gemv_config(layer.in_size, layer.is_gated)
        tried_gemvs = gemv_configs(chosen, layer.in_size, layer.is_gated)
        return partial(int4_gemv, activation=activation), chosen, {chosen, *tried_gemvs}
    best = int4_gemm_config(num_tokens, layer.out_size, layer.in_size, num_multiprocessors())
    tiles = gemm_tiles(best.tokens, layer.in_size)
    tried = {
        Int4GemmConfig(tokens, rows, splits, num_warps=4, num_stages=stages)
        for tokens, rows, splits, stages in tiles
    }
    return int4_gemm, best, {best, *tried}


def fp8_runs(
    layer: Layer, num_tokens: int, activation: str | None, column_grain: int
) -> tuple[Any, Any, set[Any]]:
    """The kernel, its chosen configuration, and all that are tried."""
    if num_tokens == 1:
        chosen = fp8_gemv_config(layer.in_size, column_grain, layer.is_gated)
        tried_gemvs = gemv_configs(chosen, layer.in_size, layer.is_gated)
        return partial(fp8_gemv, activation=activation), chosen, {chosen, *tried_gemvs}
    sizes_of_layer = (num_tokens, layer.out_size, layer.in_size, column_grain)
    best = fp8_gemm_config(*sizes_of_layer, num_multiprocessors())
    tried = {
        FP8GemmConfig(tokens, rows, chunk, splits, num_warps=4, num_stages=stages)
        for tokens, rows, splits, stages in gemm_tiles(best.tokens, layer.in_size)
        for chunk in (128, 256)
        if chunk <= column_grain
    }
    return fp8_gemm, best, {best, *tried}


def num_multiprocessors() -> int:
    return torch.cuda.get_device_properties(0).multi_processor_count


def sweep(model: str, name: str) -> None:
    """Print the fastest configurations of each layer, and what the chosen one takes."""
    for layer in MODELS[model]:
        weights = FORMS[name].weights(layer)
        for num_tokens in SWEPT_TOKENS:
            activation = "silu" if layer.is_gated else None
            if name.startswith("fp8"):
                grain = weights[0].column_grain
                run, chosen, tried = fp8_runs(layer, num_tokens, activation, grain)
            else:
                run, chosen, tried = int4_runs(layer, num_tokens, activation)
            x = torch.randn(num_tokens, layer.in_size, dtype=DTYPE, device="cuda")
            times = {
                config: try_time([partial(run, x, weight, config=config) for weight in weights])
                for config in tried
            }
            print(f"Qwen3-{model} {layer.name} {name}, {num_tokens} tokens")
            for config in [*sorted(times, key=lambda each: times[each])[:4], chosen]:
                rate = FORMS[name].bytes_of(layer) / times[config] / 1000
                note = " (chosen)" if config == chosen else ""
                print(f"  {times[config]:>8.1f} us {rate:>6.0f} GB/s {config}{note}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="8B, 0.6B")
    formats = [name for name in FORMS if name != "bf16"]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats)
    parser.add_argument("--sweep", action="store_true", help="try other tiles")
    options = parser.parse_args()
    torch.manual_seed(0)
    for model in options.models:
        if not options.sweep:
            compare(model, options.formats)
            continue
        for name in options.formats:
            sweep(model, name)


if __name__ == "__main__":
    main()
