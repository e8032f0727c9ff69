"""What `run-batch` costs beside `LLM.generate`, and what a second replica brings.

    python scripts/bench_job.py                          # on a GPU; --replicas 1 2 on two of them
    python scripts/bench_job.py --shape tiny --sequences 64 --replicas 1 2      # on a CPU

The load is `job` of bench.py, as texts: `generate` encodes and decodes them too, so that what is
compared is JSON, files and processes. Weights are random, and so is the tokenizer: each token is a
word of its own, and every text is as long in tokens as bench.py's prompts are. Engines are started
before the clock. Several loads in one job (--loads) make its end, where the batch runs empty, as
short beside the rest as it is in a job that takes long.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm import LLM, SamplingParams
from scripts.workloads import SHAPES, WORKLOADS, Load, Workload, make_load

TINY = {
    **SHAPES["qwen3-0.6b"],
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "eos_token_id": 0,
    "bos_token_id": 1,
}
SUMMARY = re.compile(r"([\d,]+) new ones, in (?:(\d+) min )?([\d.]+) s")


def write_checkpoint(directory: Path, shape: dict[str, object]) -> None:
    """Write a config.json, and a tokenizer of which each word is a token."""
    (directory / "config.json").write_text(json.dumps(shape))
    size = shape["vocab_size"]
    assert isinstance(size, int)
    words = models.WordLevel({word(token_id): token_id for token_id in range(size)}, word(0))
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)


def word(token_id: int) -> str:
    return f"w{token_id}"


def make_job(workload: Workload, vocab_size: int, num_loads: int, repeat: int) -> Load:
    """Several loads one after the other; each repeat has others."""
    first = repeat * num_loads
    loads = [make_load(workload, first + number, vocab_size) for number in range(num_loads)]
    prompts = [prompt for load in loads for prompt in load.prompts]
    return Load(prompts, [length for load in loads for length in load.output_lens])


def texts_of(load: Load) -> list[str]:
    return [" ".join(map(word, prompt)) for prompt in load.prompts]


def time_generate(model: str, options: dict[str, Any], loads: list[Load]) -> list[float]:
    """New tokens a second of each load."""
    llm = LLM(model, **options)
    llm.generate(texts_of(loads[0])[:64], SamplingParams(max_tokens=64), use_tqdm=False)  # compiles
    speeds = []
    for load in loads:
        params = [
            SamplingParams(temperature=0.6, max_tokens=length, ignore_eos=True)
            for length in load.output_lens
        ]
        start = time.perf_counter()
        llm.generate(texts_of(load), params, use_tqdm=False)
        speeds.append(sum(load.output_lens) / (time.perf_counter() - start))
    llm.exit()
    return speeds


def time_run_batch(
    model: str, options: dict[str, Any], replicas: int, load: Load, directory: Path
) -> float:
    """New tokens a second of a load in a file, as the command's own summary states them."""
    lines = directory / "input.jsonl"
    with lines.open("w") as file:
        for text, length in zip(texts_of(load), load.output_lens, strict=True):
            params = dict(temperature=0.6, max_tokens=length, ignore_eos=True)
            file.write(json.dumps({"prompt": text, **params}) + "\n")
    command = [sys.executable, "-m", "nanovllm", "run-batch", "--no-progress", "--overwrite"]
    command += ["-i", str(lines), "-o", str(directory / "output.jsonl"), "--model", model]
    command += ["--replicas", str(replicas)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    found = SUMMARY.search(done.stderr)
    if done.returncode != 0 or found is None:
        raise SystemExit(f"run-batch ended with {done.returncode}:\n{done.stderr}")
    num_tokens = int(found[1].replace(",", ""))
    assert num_tokens == sum(load.output_lens)
    return num_tokens / (60 * int(found[2] or 0) + float(found[3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=["tiny", *SHAPES], default="qwen3-0.6b")
    parser.add_argument("--replicas", type=int, nargs="+", default=[1])
    parser.add_argument("--loads", type=int, default=3, help="of bench.py, that are one job")
    parser.add_argument("--repeats", type=int, default=1, help="of the job")
    parser.add_argument("--sequences", type=int, help="instead of the workload's")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()

    workload = WORKLOADS["job"]
    shape = TINY if args.shape == "tiny" else SHAPES[args.shape]
    vocab_size = shape["vocab_size"]
    assert isinstance(vocab_size, int)
    options: dict[str, Any] = dict(
        load_format="dummy",
        device=args.device,
        max_num_seqs=workload.limits.max_num_seqs,
        max_model_len=workload.limits.max_model_len,
    )
    loads = [make_job(workload, vocab_size, args.loads, each) for each in range(args.repeats)]
    if args.sequences is not None:
        loads = [Load(x.prompts[: args.sequences], x.output_lens[: args.sequences]) for x in loads]
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        model.mkdir()
        write_checkpoint(model, shape)
        generated = median(time_generate(str(model), options, loads))
        print("| | tok/s | of generate |\n|---|---|---|", flush=True)
        print(f"| generate | {generated:,.0f} | 1.000 |", flush=True)
        for replicas in args.replicas:
            speeds = [
                time_run_batch(str(model), options, replicas, load, Path(directory))
                for load in loads
            ]
            name = f"run-batch, {replicas} replica{'s' if replicas > 1 else ''}"
            speed = median(speeds)
            print(f"| {name} | {speed:,.0f} | {speed / generated:.3f} |", flush=True)


if __name__ == "__main__":
    main()
