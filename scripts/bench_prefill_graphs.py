"""Small prefills on a GPU: how long a step takes the host and the device, as a graph and eagerly.

    python scripts/bench_prefill_graphs.py [--model qwen3-0.6b] [--cached 0 1024] [--job]

Random weights. Prints start-up time and, for each number of tokens, microseconds: `host` until a
step is launched, `step` with one launched after the other, both of whole `launch_prefill` calls;
`graph` of the graph alone. With --job: the throughput of the workload `job` with prefill graphs,
and without.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nanovllm import LLM, SamplingParams
from nanovllm.engine.sequence import Sequence
from workloads import write_shape

SIZES = (16, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096)
STEPS = 20


def make_seqs(llm: LLM, num_tokens: int, cached: int, longest: int) -> list[Sequence]:
    """Sequences that compute `num_tokens` in all, each after `cached` earlier ones."""
    block_size = llm.config.kvcache_block_size
    seqs = []
    next_block = 0
    while num_tokens:
        num_new = min(num_tokens, longest)
        num_tokens -= num_new
        seq = Sequence([7] * (cached + num_new), SamplingParams(temperature=0.6))
        seq.row = len(seqs)
        num_blocks = -(-(cached + num_new) // block_size)
        seq.block_table = list(range(next_block, next_block + num_blocks))
        next_block += num_blocks
        seq.num_computed_tokens = cached
        seq.schedule(num_new)
        seqs.append(seq)
    return seqs


def microseconds(run: Callable[[], object]) -> tuple[float, float]:
    """The time until a call returns, and the time a call takes when many are queued."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        run()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    ended = time.perf_counter()
    return (launched - start) / STEPS * 1e6, (ended - start) / STEPS * 1e6


def make_job() -> tuple[list[list[int]], list[SamplingParams]]:
    """2048 prompts of 32 to 1024 tokens, 16 to 512 out."""
    r = random.Random(0)
    lengths = [r.randint(32, 1024) for _ in range(2048)]
    prompts = [[r.randint(0, 10000) for _ in range(length)] for length in lengths]
    params = [
        SamplingParams(temperature=0.6, max_tokens=r.randint(16, 512), ignore_eos=True)
        for _ in range(2048)
    ]
    return prompts, params


def profile_job(llm: LLM, steps: int = 120) -> None:
    """Print the share of the time in which the device runs a kernel, amid the job."""
    llm.reset()
    for prompt, param in zip(*make_job(), strict=True):
        llm.add_request(prompt, param)
    for _ in range(400):
        llm.step()
    torch.cuda.synchronize()
    counts = []
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(steps):
            counts.append(llm.step()[1])
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type == DeviceType.CUDA
    )
    busy = 0.0
    gaps = []
    end = spans[0][0]
    for first, last in spans:
        if first > end:
            gaps.append(first - end)
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    total = end - spans[0][0]
    prefills = sorted(count for count in counts if count > 0)
    print(f"{len(prefills)} of {steps} steps are prefills; their tokens: {prefills}")
    long = [gap for gap in gaps if gap > 20]
    print(f"busy {busy / total:.1%} of {total / 1e3:.1f} ms; {len(long)} gaps above 20 us take")
    print(f"{sum(long) / total:.1%}, the others {(sum(gaps) - sum(long)) / total:.1%}")
    print(sorted(round(gap) for gap in long)[-40:])
    kernels = sorted(trace.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in kernels[:24]:
        time_ms = event.self_device_time_total / 1e3
        print(f"{time_ms:8.2f} ms {event.count:6} x  {event.key[:90]}")


def run_job(llm: LLM) -> float:
    """Output tokens per second of the job."""
    prompts, params = make_job()
    llm.reset()
    torch.cuda.synchronize()
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return sum(param.max_tokens or 0 for param in params) / (time.perf_counter() - start)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--cached", type=int, nargs="+", default=[0, 1024])
    parser.add_argument("--longest", type=int, default=512)
    parser.add_argument("--attention-backend", default="triton")
    parser.add_argument("--job", action="store_true")
    parser.add_argument("--profile", action="store_true", help="with --job: both ways, and gaps")
    parser.add_argument("--max-model-len", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = write_shape(args.model, directory)
        for is_last in (False, True):  # with caches cold, and warm
            start = time.perf_counter()
            llm = LLM(
                path,
                load_format="dummy",
                attention_backend=args.attention_backend,
                max_model_len=args.max_model_len,
                max_num_seqs=256,
            )
            torch.cuda.synchronize()
            print(f"start-up {time.perf_counter() - start:.1f} s")
            if args.job or is_last:
                break
            llm.exit()
    runner = llm.model_runner
    graphs = dict(runner.prefill_graphs.graphs)
    if args.job:
        print(f"job, graphs: {run_job(llm):.0f} tok/s", flush=True)
        if args.profile:
            profile_job(llm)
            runner.prefill_graphs.clear()
            print(f"job, no prefill graphs: {run_job(llm):.0f} tok/s")
        llm.exit()
        return
    print("captured in all", torch.cuda.memory_reserved() / 1e9, "GB reserved")
    print("cached tokens   | eager: host  step | graph: host  step graph")
    for cached in args.cached:
        for num_tokens in SIZES:
            seqs = make_seqs(llm, num_tokens, cached, args.longest)
            runner.prefill_graphs.graphs.clear()
            with torch.inference_mode():
                eager = microseconds(lambda seqs=seqs: runner.launch_prefill(seqs))
                runner.prefill_graphs.graphs.update(graphs)
                padded = microseconds(lambda seqs=seqs: runner.launch_prefill(seqs))
                size = runner.prefill_graphs.padded_size(num_tokens)
                _, alone = microseconds(lambda size=size: graphs[size].graph.replay())
            print(
                f"{cached:6} {num_tokens:6}   | {eager[0]:10.0f} {eager[1]:6.0f} "
                f"| {padded[0]:10.0f} {padded[1]:5.0f} {alone:5.0f}"
            )
    llm.exit()


if __name__ == "__main__":
    main()
