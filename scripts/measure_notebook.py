"""The GPU results that notebooks/6_what_makes_decode_fast.ipynb shows where there is no GPU.

    python scripts/measure_notebook.py notebooks/data/decode.json      # on a GPU, a few minutes

Qwen3-0.6B's shape in bf16 with random weights: the wall time of a decode step, eager and with CUDA
graphs, for many batch sizes, and two rates of the card: reading memory, and a large matrix product.
`--try` goes through the motions on a CPU with the demo checkpoint: its figures mean nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from workloads import write_shape

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXT = 512  # tokens of each prompt
STEPS = 40  # decode steps, of which the median counts


def decode_step(llm: LLM, batch: int) -> dict[str, float]:
    """Medians over STEPS decode steps of `batch` sequences, in us, and their mean context."""
    llm.reset()
    params = SamplingParams(temperature=0.6, max_tokens=STEPS + 20, ignore_eos=True)
    for index in range(batch):
        llm.add_request([(index * 7919 + i * 31) % 1000 for i in range(CONTEXT)], params)
    while llm.step()[1] > 0:
        pass
    for _ in range(5):
        llm.step()
    context = statistics.mean(len(seq.token_ids) for seq in llm.scheduler.running)
    with llm.trace() as trace:
        for _ in range(STEPS + 1):
            llm.step()
    steps = [step for step in trace.steps if len(step.request_ids) == batch]
    return {
        "wall_us": round(1e6 * statistics.median(step.end - step.start for step in steps), 1),
        "device_us": round(1e6 * statistics.median(step.device_time for step in steps), 1),
        "context": context + STEPS / 2,
    }


def best_time(run: Callable[[], object], is_cuda: bool) -> float:
    """Seconds of one call: the best of ten."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def card_rates(device: str) -> dict[str, float]:
    """Bytes a second of a sum over 4 GiB, and FLOP/s of an 8192-cubed bf16 product.

    On a CPU (`--try`) both are small, and the product is float32.
    """
    is_cuda = device == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    size = 8192 if is_cuda else 256
    numbers = torch.zeros(2**31 if is_cuda else 2**20, dtype=torch.bfloat16, device=device)
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    return {
        "read_bytes_per_second": numbers.nbytes / best_time(numbers.sum, is_cuda),
        "flops_per_second": 2 * size**3 / best_time(lambda: a @ b, is_cuda),
    }


def model_facts(llm: LLM) -> dict[str, int]:
    """What the notebook computes limits from."""
    hf = llm.config.hf_config
    weights = llm.model_runner.model.parameters()
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "kv_bytes_per_token": llm.model_runner.kv_cache[:, :, 0, 0].nbytes,
        "layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "heads": hf.num_attention_heads,
        "head_dim": hf.head_dim,
        "bytes_per_number": llm.config.dtype.itemsize,
    }


def main() -> None:
    """Measure both modes and the card; write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    help_try = "on a CPU, to see that it runs"
    parser.add_argument("--try", dest="is_trial", action="store_true", help=help_try)
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.is_trial:
        sys.exit("measure_notebook.py: there is no GPU; --try runs it on a CPU, as a test only")
    device = "cpu" if args.is_trial else "cuda"
    batches = (1, 4) if args.is_trial else BATCHES
    rows: dict[int, dict[str, Any]] = {batch: {"batch": batch} for batch in batches}
    with tempfile.TemporaryDirectory() as scratch:
        path = DEMO_MODEL if args.is_trial else write_shape("qwen3-0.6b", scratch)
        for mode, eager in (("graphs", False), ("eager", True)):
            llm = LLM(
                path,
                device=device,
                enforce_eager=eager,
                max_model_len=1024,
                load_format="auto" if args.is_trial else "dummy",
            )
            facts = model_facts(llm)
            for batch in batches:
                rows[batch][mode] = decode_step(llm, batch)
                print(mode, rows[batch], flush=True)
            llm.exit()
    device_name = "CPU, a trial: not a measurement"
    if device == "cuda":
        device_name = torch.cuda.get_device_name()
    result = {
        "source": f"scripts/measure_notebook.py, {date.today()}, torch {torch.__version__}",
        "device": device_name,
        "model": "Qwen3-0.6B's shape, random weights, bfloat16",
        **facts,
        **card_rates(device),
        "decode": list(rows.values()),
    }
    args.file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
