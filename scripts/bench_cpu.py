"""What a CPU makes of a 135M model: `python scripts/bench_cpu.py [--threads 1] [--dtype bfloat16]`.

Qwen2 in the sizes of SmolLM2-135M, random weights, one process. Prints

- tokens per second of 32 prompts of 100 tokens with 64 new ones, and of one such prompt, through
  the engine and through transformers' padded `generate`. They take turns, and with one thread only
  the time on a core counts, as other programs may use the machine; the ratio is of the best times;
- milliseconds of a decode step of 31 such requests, and of the same beside one of 2,000 tokens;
- with `--profile`, the operations of a decode step by the time that they take;
- with `--busy`, only the seconds that example.py generates for, alone and beside two busy loops.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from nanovllm import DEMO_MODEL, LLM, SamplingParams

SHAPE = Qwen2Config(
    architectures=["Qwen2ForCausalLM"],
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
NEW_TOKENS = 64


def make_prompt(index: int, length: int) -> list[int]:
    """Token ids that begin like those of no other index."""
    return [(index * 7919 + i * 31) % 40000 for i in range(length)]


def seconds(function: Callable[[], object]) -> float:
    """How long a call takes; with one thread, only the time that this process had a core."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    function()
    return clock() - start


def compare(llm: LLM, model: torch.nn.Module, batch: int, rounds: int, new: int) -> None:
    """Print the throughput of the engine and of transformers, on the same load."""
    prompts = [make_prompt(index, 100) for index in range(batch)]
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    ids = torch.tensor(prompts)
    options = dict(do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    def ours() -> None:
        llm.generate(prompts, params, use_tqdm=False)
        llm.reset()  # the next round shall find no cached prefix

    @torch.inference_mode()
    def theirs() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    times = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    our_best, their_best = (min(column) for column in zip(*times, strict=True))
    print(
        f"{batch} prompts: {batch * new / our_best:.1f} tok/s, transformers "
        f"{batch * new / their_best:.1f}: {their_best / our_best:.2f} times "
        f"(in each round: {', '.join(f'{b / a:.2f}' for a, b in times)})",
        flush=True,
    )


def start_decoding(llm: LLM, lengths: list[int]) -> None:
    """Queue a request for each length and run until all of them decode."""
    llm.reset()
    params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
    for index, length in enumerate(lengths):
        llm.add_request(make_prompt(index, length), params)
    while llm.step()[1] > 0:
        pass


def decode_step(llm: LLM, lengths: list[int], steps: int = 20) -> float:
    """Best milliseconds of a decode step of requests with prompts of these lengths."""
    start_decoding(llm, lengths)
    return min(seconds(llm.step) for _ in range(steps)) * 1000


def print_profile(llm: LLM, lengths: list[int], steps: int = 5) -> None:
    """Print the operations of a decode step, by the time that they take."""
    start_decoding(llm, lengths)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        wall = seconds(lambda: [llm.step() for _ in range(steps)]) / steps * 1000
    events = sorted(trace.key_averages(), key=lambda event: -event.self_cpu_time_total)
    print(f"\na step of {len(lengths)}, the longest {max(lengths)}: {wall:.1f} ms (profiled)")
    for event in events[:14]:
        took = event.self_cpu_time_total / steps / 1000
        print(f"  {took:8.2f} ms  {event.count / steps:6.0f} x {event.key}")


def spin() -> None:
    """Keep a core busy."""
    while True:
        pass


def busy(rounds: int) -> None:
    """Print how long example.py's requests take, alone and beside two busy loops."""
    llm = LLM(DEMO_MODEL)
    chats = [
        [{"role": "user", "content": text}]
        for text in ("introduce yourself", "list all prime numbers within 100")
    ]

    def ask() -> None:
        with redirect_stdout(StringIO()):
            llm.chat(chats, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
        llm.reset()

    def wall() -> float:
        start = time.perf_counter()
        ask()
        return time.perf_counter() - start

    ask()
    alone = median(wall() for _ in range(rounds))
    loops = [multiprocessing.Process(target=spin, daemon=True) for _ in range(2)]
    for loop in loops:
        loop.start()
    beside = median(wall() for _ in range(rounds))
    for loop in loops:
        loop.kill()
    print(
        f"example.py: {alone:.2f} s, beside two busy loops {beside:.2f} s: {beside / alone:.1f} x"
    )


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--busy", action="store_true")
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.busy:
        busy(args.rounds)
        return
    llm = LLM("shape", hf_config=SHAPE, load_format="dummy", device="cpu", dtype=args.dtype)
    short, long = [100] * 31, [2000]
    if args.profile:
        for lengths in ([100] * 32, [100], short + long):
            print_profile(llm, lengths)
        return
    model = AutoModelForCausalLM.from_config(SHAPE, dtype=getattr(torch, args.dtype)).eval()
    compare(llm, model, 32, args.rounds, args.new_tokens)
    compare(llm, model, 1, 2 * args.rounds, args.new_tokens)
    without, beside = (decode_step(llm, lengths) for lengths in (short, short + long))
    print(
        f"31 short: {without:.0f} ms; and one of 2,000: {beside:.0f} ms: {beside / without:.2f} x"
    )


if __name__ == "__main__":
    main()
