"""The command line of bench.py."""

import argparse
from ast import literal_eval
from pathlib import Path
from typing import Any

from nanovllm import SamplingParams
from scripts.workloads import SHAPES, WORKLOADS

INT4 = "int4"  # of --quantization: no option of the engine, which reads it from a config.json


def make_parser() -> argparse.ArgumentParser:
    """All options; `bench.py --help` shows them."""
    about = "; ".join(f"{workload.name}: {workload.about}" for workload in WORKLOADS.values())
    parser = argparse.ArgumentParser(
        description="Measure throughput.", epilog=f"workloads: {about}"
    )
    add = parser.add_argument
    names = [*WORKLOADS, "all"]
    add(
        "--workload",
        nargs="+",
        choices=names,
        default=["mixed"],
        metavar="NAME",
        help="one or more of those below, or all (default: mixed)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="local directory or hub id (default: see --shape)")
    what.add_argument(
        "--shape",
        choices=SHAPES,
        help="a real model's shape with random weights "
        "(default: qwen3-0.6b on a GPU; on a CPU the demo checkpoint instead)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the full-size load (default on a GPU)")
    size.add_argument("--small", action="store_true", help="a small one (default on a CPU)")
    add("--repeats", type=int, default=1, help="timed runs of each workload; the best counts")
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--json", metavar="FILE", help="write the results there, for machines")
    add(
        "--trace",
        metavar="FILE",
        help="trace the runs; the last one's goes there: .json for ui.perfetto.dev, "
        ".svg or .png for a picture (needs matplotlib)",
    )
    other = "run the same load through another engine, greedily"
    add("--compare", choices=["transformers"], help=other)
    batch = "its static batch (default: 256; on a CPU 16)"
    add("--compare-batch-size", type=int, metavar="N", help=batch)
    devices = ["auto", "cuda", "cpu"]
    add("--device", choices=devices, default="auto", help="auto: cuda if there is a GPU")
    add(
        "--sampling",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="more SamplingParams: top_k=20 top_p=0.95",
    )
    schemas = "also with a JSON schema of its own for each request (needs llguidance)"
    add("--structured", action="store_true", help=schemas)
    add("--dtype", default="auto", help="auto: the checkpoint's, on a CPU float32")
    weights = f"fp8: weights in 16 bits are made FP8; {INT4}: random ones in groups of 128 columns"
    add("--quantization", choices=["fp8", INT4], help=weights)
    caches = "of the KV cache: auto (the checkpoint's, mostly as --dtype), fp8"
    add("--kv-cache-dtype", default="auto", help=caches)
    backends = "auto, triton, flash_attn, flash_attn+triton, torch"
    add("--attention-backend", default="auto", help=backends)
    ranks = "ranks to split the model over"
    add("--tensor-parallel-size", type=int, default=1, metavar="N", help=ranks)
    most = "most sequences at once (default: 512, for job 256; in a small load an eighth of it)"
    add("--max-num-seqs", type=int, metavar="N", help=most)
    longest = "of a sequence (default: 4096 tokens, for long 32768; in a small load less)"
    add("--max-model-len", type=int, metavar="N", help=longest)
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    add("--enforce-eager", action="store_true", help="decode without CUDA graphs")
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked; `sampling` becomes a dict of all sampling parameters."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for option in ("repeats", "compare_batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    if args.quantization == INT4 and args.model:
        parser.error(
            f"--quantization {INT4} is of random weights; leave it out: --model says it itself"
        )
    if args.quantization and args.compare:
        parser.error("--compare has no quantised weights; leave --quantization out")
    try:
        args.sampling = sampling_params(args.temperature, args.sampling)
    except (SyntaxError, TypeError, ValueError) as error:
        parser.error(f"--temperature, --sampling: {error}")
    for option, file in (("--json", args.json), ("--trace", args.trace)):
        if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            parser.error(
                f"{option} {file} cannot be written: it must name a file in a directory that exists"
            )
    return args


def sampling_params(temperature: float, pairs: list[str]) -> dict[str, Any]:
    """The sampling parameters that the command line asks for, checked.

    Args:
        temperature: 0 is greedy.
        pairs: strings such as "top_k=20".
    """
    params: dict[str, Any] = {"temperature": temperature}
    for pair in pairs:
        name, _, value = pair.partition("=")
        params[name] = literal_eval(value)
    SamplingParams(**params)  # raises if one of them is wrong
    fixed = {"max_tokens", "ignore_eos", "stop", "stop_token_ids"} & set(params)
    if fixed:
        raise ValueError(f"{', '.join(sorted(fixed))}: the load says how many tokens there are")
    return params
