"""Where the time of a step goes on a GPU.

    python scripts/profile_steps.py [--batch 1 16 256] [--shape qwen3-30b-a3b]
    python scripts/profile_steps.py --batch 256 --shared-prefix 2048     # behind a common prefix
    python scripts/profile_steps.py --shape qwen3-8b --quantization fp8 --kv-cache-dtype fp8

A real model's shape (Qwen3-0.6B's) with random weights, 512 tokens of context. Prints, for each
batch size, the wall time of a decode step through `LLM.step`, the sum of its kernels' times, and
the kernels by the time they take; then the same for a prefill step of 16384 tokens. A kernel that
waits for the one before it (programmatic dependent launch) is counted with that wait, so the sum
may exceed the wall time.
"""

import argparse
import tempfile
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bench_options import INT4
from nanovllm import LLM, SamplingParams
from workloads import SHAPES, write_shape

STEPS = 50  # decode steps that are timed, and as many that are profiled
PREFILL_STEPS = 10


def make_prompt(index: int, length: int) -> list[int]:
    """Token ids that begin like those of no other index."""
    return [(index * 7919 + i * 31) % 10000 for i in range(length)]


def start_decoding(llm: LLM, batch: int, context: int, shared_prefix: int) -> None:
    """Queue `batch` requests and run until all of them decode."""
    params = SamplingParams(temperature=0.6, max_tokens=4 * STEPS, ignore_eos=True)
    prefix = make_prompt(-1, shared_prefix)
    for index in range(batch):
        llm.add_request(prefix + make_prompt(index, context), params)
    while llm.step()[1] > 0:
        pass
    for _ in range(5):
        llm.step()


def report(llm: LLM, what: str, steps: int, top: int) -> None:
    """Time `steps` steps, then profile as many; print the `top` kernels that take longest."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        llm.step()
    wall = (time.perf_counter() - start) / steps * 1e6
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            llm.step()
        torch.cuda.synchronize()
    kernels = [event for event in trace.key_averages() if event.self_device_time_total > 0]
    total = sum(event.self_device_time_total for event in kernels) / steps
    print(f"\n{what}: {wall:.0f} us a step, kernels {total:.0f} us")
    for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:top]:
        each = event.self_device_time_total / event.count
        count = event.count / steps  # in one step
        print(f"{each * count:9.1f} us = {count:6.1f} x {each:7.2f}  {event.key[:90]}")


def main() -> None:
    """Profile decode steps of each batch size, then prefill steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens in front of these")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--quantization", choices=["fp8", INT4], help="of the weights")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--top", type=int, default=14, help="kernels to list")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        llm = LLM(
            write_shape(args.shape, scratch, in_int4=args.quantization == INT4),
            load_format="dummy",
            quantization="fp8" if args.quantization == "fp8" else None,
            kv_cache_dtype=args.kv_cache_dtype,
        )
    for batch in args.batch:
        start_decoding(llm, batch, args.context, args.shared_prefix)
        what = f"decode, batch {batch}, context {args.context}"
        if args.shared_prefix:
            what += f" behind a shared prefix of {args.shared_prefix}"
        report(llm, what, STEPS, args.top)
        llm.reset()
    for index in range(8 * 3 * PREFILL_STEPS):
        llm.add_request(make_prompt(index, 2048), SamplingParams(max_tokens=1))
    for _ in range(PREFILL_STEPS // 2):
        llm.step()
    report(llm, "prefill, 8 sequences of 2048", PREFILL_STEPS, args.top)
    llm.exit()


if __name__ == "__main__":
    main()
