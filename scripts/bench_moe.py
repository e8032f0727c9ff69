"""Time a mixture-of-experts layer of Qwen3-30B-A3B's size on a GPU, alone.

    python scripts/bench_moe.py [--sweep]      # --sweep tries other tiles too
    python scripts/bench_moe.py --formats fp8 fp8-blocks int4      # against experts in 16 bits

All runs inside a CUDA graph, over inputs that are routed at random. Steps of a decode are limited
by reading the weights of the experts that are chosen: GB/s, against the 3.0 TB/s that an H100
reads. Large prefills are limited by arithmetic: TFLOP/s of the chosen experts.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from attention_work import microseconds
from bench_quantized import FORMS, Layer
from nanovllm.kernels.expert_gemv import (
    ExpertGemvConfig,
    expert_down_gemv,
    expert_gate_up_gemv,
    expert_gemv_config,
)
from nanovllm.kernels.fp8_weight import FP8Weight
from nanovllm.kernels.grouped_gemm import (
    GroupedConfig,
    expert_down,
    expert_gate_up,
    grouped_config,
)
from nanovllm.kernels.moe import MoEWeights, moe_gemv, moe_partial_sums, moe_torch
from nanovllm.kernels.moe_routing import Routing, route
from nanovllm.kernels.rms_norm import add_rms_norm

HIDDEN = 2048
INTERMEDIATE = 768
NUM_EXPERTS = 128
TOP_K = 8
DTYPE = torch.bfloat16
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * DTYPE.itemsize
PAIR_FLOPS = 2 * 3 * HIDDEN * INTERMEDIATE
READ_GB_PER_S = 3000
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# What --sweep tries.
GEMV_CONFIGS = [ExpertGemvConfig(rows, warps) for rows in (1, 2, 4, 8) for warps in (1, 2, 4, 8)]
SMALL_CONFIGS = [  # with the tokens of the chosen configuration
    (rows, chunk, warps, stages)
    for rows in (64, 128)
    for chunk in (64, 128, 256)
    for warps in (4, 8)
    for stages in (2, 3, 4, 6)
]
LARGE_CONFIGS = [  # tokens, rows, chunk, num_warps, num_stages
    GroupedConfig(tokens, rows, 64, warps, stages)
    for tokens in (64, 128, 256)
    for rows in (64, 128)
    for warps in (4, 8)
    for stages in (3, 4, 5)
]


def make_matrices(name: str, out_size: int, in_size: int) -> Any:
    """A random matrix `[out_size, in_size]` for each expert, in the format of this name."""
    matrices = FORMS[name].make(Layer("experts", NUM_EXPERTS * out_size, in_size))
    if isinstance(matrices, FP8Weight):
        return matrices._replace(values=matrices.values.unflatten(0, (NUM_EXPERTS, -1)))
    if isinstance(matrices, torch.Tensor):
        return matrices.unflatten(0, (NUM_EXPERTS, -1))
    return matrices


def make_weights(name: str = "bf16") -> MoEWeights:
    """Random weights; the router's are so large that its choice is random and clear."""
    return MoEWeights(
        router=torch.randn(NUM_EXPERTS, HIDDEN, dtype=DTYPE, device="cuda"),
        gate_up=make_matrices(name, 2 * INTERMEDIATE, HIDDEN),
        down=make_matrices(name, HIDDEN, INTERMEDIATE),
        top_k=TOP_K,
        is_normalized=True,
    )


class Work:
    """One number of tokens, with several inputs that take turns."""

    def __init__(self, num_tokens: int, weights: MoEWeights):
        self.num_tokens = num_tokens
        self.weights = weights
        num_inputs = 16 if num_tokens < 64 else 3
        self.inputs = [
            torch.randn(num_tokens, HIDDEN, dtype=DTYPE, device="cuda") for _ in range(num_inputs)
        ]
        self.routings = [route(x, weights.router, TOP_K, True) for x in self.inputs]
        self.activations = [
            torch.randn(num_tokens * TOP_K, INTERMEDIATE, dtype=DTYPE, device="cuda")
            for _ in range(num_inputs)
        ]
        num_used = sum(len(routing.experts.unique()) for routing in self.routings) / num_inputs
        self.bytes = num_used * EXPERT_BYTES
        self.flops = num_tokens * TOP_K * PAIR_FLOPS

    def time(self, run: Callable[..., object], *arguments: Sequence[object]) -> float:
        """Microseconds of one call of `run` with the i-th of each of the arguments, in a graph."""

        def run_all() -> None:
            for values in zip(*arguments, strict=True):
                run(*values)

        run_all()  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run_all()
        return microseconds(graph.replay, len(arguments[0]))

    def report(self, name: object, us: float, share: float = 1.0) -> str:
        """A line for a kernel that reads `share` of the experts' weights in `us` microseconds."""
        rate = share * self.bytes / us / 1000
        teraflops = share * self.flops / us / 1e6
        return (
            f"{name!s:<86}{us:>9.1f} us {share * self.bytes / 2**20:>7.0f} MiB {rate:>6.0f} GB/s "
            f"{rate / READ_GB_PER_S:>5.0%} {teraflops:>5.0f} TFLOP/s"
        )

    def run_layer(self, x: torch.Tensor) -> None:
        """The layer with the addition to the residual, for which x is taken, and a norm."""
        if self.num_tokens == 1:
            moe_gemv(x, self.weights, torch.empty_like(x))
        else:
            norm = self.weights.router[0]
            add_rms_norm(torch.empty_like(x), moe_partial_sums(x, self.weights), norm, 1e-6)

    def run_route(self, x: torch.Tensor) -> None:
        """The routing alone."""
        route(x, self.weights.router, TOP_K, True)

    def gate_up(self, config: object) -> Callable[[torch.Tensor, Routing], object]:
        """The first of the two multiplications, with a configuration."""
        run = expert_gate_up_gemv if self.num_tokens == 1 else expert_gate_up
        return lambda x, routing: run(x, self.weights.gate_up, routing, config=config)

    def down(self, config: object) -> Callable[[torch.Tensor, Routing], object]:
        """The second of the two multiplications, with a configuration."""
        run = expert_down_gemv if self.num_tokens == 1 else expert_down
        return lambda x, routing: run(x, self.weights.down, routing, config=config)

    def check(self) -> None:
        """Print how far the kernels are from the reference."""
        x = self.inputs[0]
        expected = moe_torch(x, self.weights).float()
        if self.num_tokens == 1:
            out = moe_gemv(x, self.weights).float()
        else:
            out = moe_partial_sums(x, self.weights).float().sum(0)
        error = (out - expected).norm() / expected.norm()
        print(f"relative error {error.item():.4f}, should be below 0.01")

    def configs(self, is_gated: bool) -> tuple[object, list[object]]:
        """The configuration in use, and others to try."""
        if self.num_tokens == 1:
            return expert_gemv_config(HIDDEN if is_gated else TOP_K * 1024), list(GEMV_CONFIGS)
        num_pairs = self.num_tokens * TOP_K
        used = grouped_config(num_pairs, NUM_EXPERTS, is_gated, DTYPE, self.inputs[0].device)
        if used.tokens >= 64:
            return used, list(LARGE_CONFIGS)
        return used, [GroupedConfig(used.tokens, *other) for other in SMALL_CONFIGS]


def try_time(run: Callable[[], float]) -> float:
    """What `run` measures; infinity if a configuration asks for more memory than there is."""
    try:
        return run()
    except Exception:
        return float("inf")


def bench(num_tokens: int, weights: MoEWeights, sweep: bool) -> None:
    """Print the layer's time and that of its parts."""
    work = Work(num_tokens, weights)
    print(f"\n{num_tokens} tokens")
    work.check()
    print(work.report("layer", work.time(work.run_layer, work.inputs)))
    print(f"{'  routing':<86}{work.time(work.run_route, work.inputs):>9.1f} us")
    for name, run, values, share in (
        ("gate and up", work.gate_up, work.inputs, 2 / 3),
        ("down", work.down, work.activations, 1 / 3),
    ):
        used, others = work.configs(is_gated=name != "down")
        us = work.time(run(used), values, work.routings)
        print(work.report(f"  {name} {used}", us, share))
        timed = []
        for config in others if sweep else ():
            us = try_time(partial(work.time, run(config), values, work.routings))
            timed.append((us, str(config)))
        for us, config_name in sorted(timed)[:5]:
            print(work.report(f"    {config_name}", us, share))


def compare(names: Sequence[str]) -> None:
    """Print the layer's time in 16 bits, and how many times as fast each format is."""
    times: dict[tuple[str, int], float] = {}
    for name in ("bf16", *names):
        weights = make_weights(name)
        for num_tokens in reversed(SIZES):  # large ones heat the GPU, which makes it slower
            work = Work(num_tokens, weights)
            times[name, num_tokens] = work.time(work.run_layer, work.inputs)
        del weights, work
        torch.cuda.empty_cache()
    print(f"{'tokens':>6}{'us of bf16':>12}" + "".join(f"{name:>20}" for name in names))
    for num_tokens in SIZES:
        plain = times["bf16", num_tokens]
        cells = ""
        for name in names:
            us = times[name, num_tokens]
            cells += f"{us:>13.1f} {plain / us:>5.2f}x"
        print(f"{num_tokens:>6}{plain:>12.1f}{cells}", flush=True)


def main() -> None:
    """Time the layer for several numbers of tokens."""
    parser = argparse.ArgumentParser(description="Time a mixture-of-experts layer on a GPU.")
    parser.add_argument("--sweep", action="store_true", help="try other tile sizes too")
    parser.add_argument("--tokens", type=int, nargs="*", default=SIZES, help="of a step")
    parser.add_argument("--formats", nargs="+", choices=sorted(FORMS), help="of weights, compared")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_moe.py needs a CUDA GPU")
    torch.manual_seed(0)
    print(torch.cuda.get_device_name())
    if arguments.formats:
        compare(arguments.formats)
        return
    weights = make_weights()
    for num_tokens in arguments.tokens:
        bench(num_tokens, weights, arguments.sweep)


if __name__ == "__main__":
    main()
