"""Where one decode step's time goes on a GPU: `python scripts/profile_decode.py [--batch 1 16 256]`.

Qwen3-0.6B's shape with random weights, 512 tokens of context. Prints, for each batch size, the wall time of a step
through `LLM.step`, how much of it the GPU was busy, and the kernels by the time they take.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import write_shape  # noqa: E402

from nanovllm import LLM, SamplingParams  # noqa: E402

STEPS = 50


def start_decoding(llm: LLM, batch: int, context: int) -> None:
    """Queue `batch` requests and run until all of them decode."""
    for index in range(batch):
        prompt = [(index * 7919 + i * 31) % 10000 for i in range(context)]
        llm.add_request(prompt, SamplingParams(temperature=0.6, max_tokens=4 * STEPS, ignore_eos=True))
    while llm.step()[1] > 0:
        pass
    for _ in range(5):
        llm.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--top", type=int, default=14, help="kernels to list")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        llm = LLM(write_shape("qwen3-0.6b", scratch), load_format="dummy")
    for batch in args.batch:
        start_decoding(llm, batch, args.context)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS):
            llm.step()
        wall = (time.perf_counter() - start) / STEPS * 1e6
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(STEPS):
                llm.step()
            torch.cuda.synchronize()
        kernels = [event for event in trace.key_averages() if event.self_device_time_total > 0]
        busy = sum(event.self_device_time_total for event in kernels) / STEPS
        print(f"\nbatch {batch}, context {args.context}: {wall:.0f} us a step, GPU busy {busy:.0f} us")
        for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[: args.top]:
            each, count = event.self_device_time_total / event.count, event.count / STEPS
            print(f"{each * count:9.1f} us = {count:6.1f} x {each:7.2f}  {event.key[:90]}")
        llm.reset()
    llm.exit()


if __name__ == "__main__":
    main()
