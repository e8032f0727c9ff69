"""Time the linear layers of one decoder layer with quantised weights against bf16, on a GPU.

    python scripts/bench_quantized.py [8B] [0.6B] [--group-size 128] [--zero-points] [--sweep]

For each number of tokens: microseconds of the four products of a layer, as a decode step runs them
in a CUDA graph (one token: with norm, activation and addition), and how many times as fast as bf16
they are. Below 1 is what no format may be at any size. With --sweep, other tiles than those that
kernels/int4_config.py chooses are tried, and the fastest are printed.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product as combinations

import torch
from torch import Tensor

from bench_attention import microseconds
from nanovllm.kernels.int4_config import (
    Int4GemmConfig,
    Int4GemvConfig,
    int4_gemm_config,
    int4_gemv_config,
)
from nanovllm.kernels.int4_dequantize import int4_dequantize
from nanovllm.kernels.int4_gemm import int4_gemm
from nanovllm.kernels.int4_gemv import int4_gemv
from nanovllm.kernels.int4_layout import Int4Weight, packed_width
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.quantization.int4_matmul import choose_int4_kernel, multiply_int4
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import READER_SUMS, Epilogue

DTYPE = torch.bfloat16
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 4096)
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
Multiply = Callable[[Tensor, Epilogue, RMSNorm | None], object]


def make_int4(layer: Layer, group_size: int, has_zero_points: bool) -> Int4Weight:
    """Random numbers; scales as those of a trained model."""
    width = packed_width(layer.in_size)
    size = layer.in_size if group_size == -1 else group_size
    groups = (layer.out_size, layer.in_size // size)
    zero_points = None
    if has_zero_points:
        zero_points = torch.randint(0, 16, groups, device="cuda").to(torch.uint8)
    return Int4Weight(
        packed=torch.randint(-(2**15), 2**15, (layer.out_size, width), device="cuda").short(),
        scales=torch.full(groups, 0.005, dtype=torch.float16, device="cuda"),
        zero_points=zero_points,
        in_size=layer.in_size,
        group_size=size,
    )


def multiply_bf16(weight: Tensor, x: Tensor, epilogue: Epilogue, norm: RMSNorm | None) -> object:
    return UNQUANTIZED.multiply_matrix(weight, x, None, epilogue, norm)


def multiply_packed(
    weight: Int4Weight, x: Tensor, epilogue: Epilogue, norm: RMSNorm | None
) -> object:
    return multiply_int4(weight, x, None, epilogue, norm)


class Bf16:
    """The weights as they are."""

    def __init__(self, layer: Layer) -> None:
        shape = (layer.out_size, layer.in_size)
        self.bytes = 2 * layer.out_size * layer.in_size
        count = 1 + COLD_BYTES // self.bytes
        self.weights = [torch.randn(shape, dtype=DTYPE, device="cuda") * 0.02 for _ in range(count)]

    def products(self) -> list[Multiply]:
        """A way to multiply with each of the weights."""
        return [partial(multiply_bf16, weight) for weight in self.weights]


class Int4:
    """Numbers of four bits, in groups."""

    def __init__(self, layer: Layer, group_size: int, has_zero_points: bool) -> None:
        self.bytes = layer.out_size * layer.in_size // 2
        count = 1 + COLD_BYTES // self.bytes
        self.weights = [make_int4(layer, group_size, has_zero_points) for _ in range(count)]

    def products(self) -> list[Multiply]:
        """A way to multiply with each of the weights."""
        return [partial(multiply_packed, weight) for weight in self.weights]


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


def time_layer(layer: Layer, products: list[Multiply], num_tokens: int, fuses: bool) -> float:
    """Microseconds of one product, with what a decode step has in the same kernel.

    fuses: whether the activation is a part of it, as it is for one token.
    """
    x = torch.randn(num_tokens, layer.in_size, dtype=DTYPE, device="cuda")
    norm = None
    epilogue = READER_SUMS
    if num_tokens == 1 and layer.reads_norm:
        norm = RMSNorm(layer.in_size, 1e-6).to("cuda", DTYPE)
    if layer.is_gated:
        epilogue = Epilogue(activation="silu") if fuses else Epilogue()
    if not layer.reads_norm:
        epilogue = Epilogue(add_to=torch.zeros(num_tokens, layer.out_size, dtype=DTYPE).cuda())
    return time_in_graph([partial(each, x, epilogue, norm) for each in products])


def compare(model: str, group_size: int, has_zero_points: bool) -> None:
    """Print the times of all layers of a model for each number of tokens."""
    times: dict[tuple[int, str, str], float] = {}
    for layer in MODELS[model]:
        bf16 = Bf16(layer)
        int4 = Int4(layer, group_size, has_zero_points)
        for num_tokens in TOKENS:
            fuses = num_tokens == 1
            for name, form in (("bf16", bf16), ("int4", int4)):
                us = time_layer(layer, form.products(), num_tokens, fuses)
                times[num_tokens, layer.name, name] = us
        del bf16, int4
        torch.cuda.empty_cache()
    names = [layer.name for layer in MODELS[model]]
    print(f"Qwen3-{model}, INT4 in groups of {group_size}; us of bf16 / int4")
    print(f"{'tokens':>6}" + "".join(f"{name:>18}" for name in names) + f"{'ratio of all':>14}")
    for num_tokens in TOKENS:
        cells = ""
        for name in names:
            pair = [times[num_tokens, name, form] for form in ("bf16", "int4")]
            cells += f"{pair[0]:>9.1f} /{pair[1]:>7.1f}"
        total = [sum(times[num_tokens, name, form] for name in names) for form in ("bf16", "int4")]
        print(f"{num_tokens:>6}{cells}{total[0] / total[1]:>13.2f}x")


def gemv_configs(in_size: int) -> Iterable[Int4GemvConfig]:
    """What --sweep tries for one token."""
    for rows, chunks in combinations((1, 2, 4, 8, 16), (1, 2, 4, 8)):
        if chunks * 1024 < 2 * in_size:
            for num_warps in {chunks, max(1, chunks // 2)}:
                yield Int4GemvConfig(rows, chunks, num_warps)


def gemm_configs(num_tokens: int, in_size: int) -> Iterable[Int4GemmConfig]:
    """What --sweep tries for several tokens."""
    chosen = int4_gemm_config(num_tokens, 4096, in_size, 132).tokens
    all_splits = [splits for splits in (1, 2, 3, 4, 6, 8, 12, 16) if splits <= in_size // 256]
    for tokens, rows, splits, stages in combinations(
        {chosen, max(16, chosen // 2), min(128, chosen * 2)}, (64, 128), all_splits, (3, 4, 6)
    ):
        if tokens * rows <= 8192:
            yield Int4GemmConfig(tokens, rows, splits, num_warps=4, num_stages=stages)


def sweep(model: str, group_size: int, has_zero_points: bool) -> None:
    """Print the fastest configurations of each layer, and what the chosen one takes."""
    num_multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    for layer in MODELS[model]:
        form = Int4(layer, group_size, has_zero_points)
        for num_tokens in (1, 2, 8, 16, 32, 64, 128, 256, 512):
            x = torch.randn(num_tokens, layer.in_size, dtype=DTYPE, device="cuda")
            results = []
            if num_tokens == 1:
                activation = "silu" if layer.is_gated else None
                outputs = layer.out_size // 2 if layer.is_gated else layer.out_size
                chosen = int4_gemv_config(outputs, layer.in_size, layer.is_gated)
                run = partial(int4_gemv, x, activation=activation)
                configs = {chosen, *gemv_configs(layer.in_size)}
            else:
                sizes = (num_tokens, layer.out_size, layer.in_size)
                chosen = int4_gemm_config(*sizes, num_multiprocessors)
                run = partial(int4_gemm, x)
                configs = {chosen, *gemm_configs(num_tokens, layer.in_size)}
            for config in configs:
                runs = [partial(run, weight, config=config) for weight in form.weights]
                results.append((try_time(runs), config))
            results.sort(key=lambda result: result[0])
            kernel = choose_int4_kernel(x)
            print(f"Qwen3-{model} {layer.name}, {num_tokens} tokens: {kernel.name} is chosen")
            for us, config in results[:4]:
                print(f"  {us:>8.1f} us {form.bytes / us / 1e3:>6.0f} GB/s {config}")
            (us,) = (us for us, config in results if config == chosen)
            print(f"  {us:>8.1f} us {form.bytes / us / 1e3:>6.0f} GB/s {chosen} (chosen)")
        runs = [partial(int4_dequantize, weight, DTYPE) for weight in form.weights]
        print(f"  {time_in_graph(runs):>8.1f} us to dequantise {layer.name}", flush=True)


def try_time(runs: list[Callable[[], object]]) -> float:
    """`time_in_graph`; infinite for what takes too many registers or too much shared memory."""
    try:
        return time_in_graph(runs)
    except Exception as error:  # noqa: BLE001 (Triton's are of several kinds)
        print(f"  not run: {type(error).__name__}")
        return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], default=list(MODELS))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--zero-points", action="store_true", help="weights that have them (AWQ)")
    parser.add_argument("--sweep", action="store_true", help="try other configurations")
    options = parser.parse_args()
    torch.manual_seed(0)
    for model in options.models:
        if options.sweep:
            sweep(model, options.group_size, options.zero_points)
        else:
            compare(model, options.group_size, options.zero_points)


if __name__ == "__main__":
    main()
