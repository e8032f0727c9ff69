"""Throughput of the engine on ten offline workloads.

    python bench.py                           # GPU: Qwen3-0.6B's shape; CPU: the demo checkpoint
    python bench.py --workload all --repeats 3 --json results.json
    python bench.py --compare transformers    # the same load through transformers' own generate

Throughput is output tokens (for `prefill` and `embed`, input tokens) over the wall time of one call
of `generate` (or `embed`). Random weights cost as much time as trained ones: nothing is downloaded.
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm import DEMO_MODEL, LLM, SamplingParams, StructuredOutputsParams
from nanovllm.config import Config
from nanovllm.trace import Trace
from scripts.bench_options import INT4, parse_args
from scripts.structured_load import make_schema, write_tokenizer
from scripts.transformers_engine import load_transformers, run_transformers
from scripts.workloads import (
    SEQUENCES_CUT,
    SHAPE_KEYS,
    SHAPES,
    TOKEN_IDS,
    WORKLOADS,
    Limits,
    Load,
    Workload,
    make_load,
    write_shape,
)

OURS = "nanovllm"
WARMUP_REPEAT = 5_000  # a repeat that is never timed, so that no timed run meets its prompts
WARMUP_TOKENS = 8
ENGINE_OPTIONS = (
    "device",
    "dtype",
    "kv_cache_dtype",
    "attention_backend",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "enforce_eager",
)
PACKAGES = ("nano-vllm", "torch", "triton", "transformers", "flash-attn", "flash-attn-4")


@dataclass(frozen=True)
class Engine:
    """Something that can be given a load."""

    name: str
    vocab_size: int
    run: Callable[[Load], None]


@dataclass(frozen=True)
class Run:
    """One timed run."""

    repeat: int
    input_tokens: int
    output_tokens: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Result:
    """All runs of a workload on an engine; the best one counts."""

    engine: str
    workload: Workload
    runs: list[Run]

    @property
    def best(self) -> Run:
        """The fastest run."""
        return max(self.runs, key=lambda run: run.tokens_per_second)


# --- what is run --------------------------------------------------------------------------------


def choose_workloads(args: argparse.Namespace, small: bool) -> list[Workload]:
    """The workloads that the command line names, with the limits that it asks for."""
    names = WORKLOADS if "all" in args.workload else dict.fromkeys(args.workload)
    asked_for = {
        name: getattr(args, name)
        for name in ("max_num_seqs", "max_model_len")
        if getattr(args, name) is not None
    }
    chosen = []
    for name in names:
        workload = WORKLOADS[name].small() if small else WORKLOADS[name]
        limits = replace(workload.limits, **asked_for)
        chosen.append(replace(workload, limits=limits))
    return chosen


def group_by_limits(workloads: list[Workload]) -> dict[Limits, list[Workload]]:
    """The workloads of each engine: starting one takes longer than most workloads."""
    groups: dict[Limits, list[Workload]] = {}
    for workload in workloads:
        groups.setdefault(workload.limits, []).append(workload)
    return groups


# --- running a load -----------------------------------------------------------------------------


def run_engine(
    llm: LLM,
    load: Load,
    sampling: dict[str, Any],
    traces: list[Trace] | None = None,
    structured: bool = False,
) -> None:
    """Generate exactly the tokens that `load` asks for.

    Args:
        llm: the engine.
        load: the requests.
        sampling: parameters of all requests.
        traces: None, or a list that is to hold the trace of this run and no other.
        structured: whether each request has a JSON schema of its own.
    """
    if traces is not None:
        with llm.trace() as trace:
            run_engine(llm, load, sampling, structured=structured)
        traces[:] = [trace]
        return
    if load.embeds:
        llm.embed(load.prompts, use_tqdm=False)
        return
    params = [SamplingParams(**sampling, max_tokens=n, ignore_eos=True) for n in load.output_lens]
    if structured:
        forms = [StructuredOutputsParams(json=make_schema(i)) for i in range(len(params))]
        params = [
            replace(each, structured_outputs=form) for each, form in zip(params, forms, strict=True)
        ]
    outputs = llm.generate(load.prompts, params, use_tqdm=False)
    made = sum(len(output["token_ids"]) for output in outputs)
    wanted = sum(load.output_lens)
    if made != wanted:
        raise RuntimeError(f"the engine made {made} tokens of the {wanted} asked for")


def measure(engine: Engine, workload: Workload, repeats: int) -> Result:
    """Warm up, then time `repeats` runs, each with prompts that no prefix cache holds."""
    count = "1 sequence" if workload.sequences == 1 else f"{workload.sequences} sequences"
    print(f"\n{workload.name} on {engine.name}: {count}, {workload.about}", flush=True)
    warmup = make_load(workload, WARMUP_REPEAT, engine.vocab_size)
    output_lens = [min(n, WARMUP_TOKENS) for n in warmup.output_lens]
    engine.run(replace(warmup, output_lens=output_lens))
    runs = []
    for repeat in range(repeats):
        load = make_load(workload, repeat, engine.vocab_size)
        input_tokens = sum(map(len, load.prompts))
        output_tokens = sum(load.output_lens)
        counted = input_tokens if workload.counts_input else output_tokens
        start = time.perf_counter()
        engine.run(load)
        seconds = time.perf_counter() - start
        run = Run(
            repeat=repeat,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            seconds=seconds,
            tokens_per_second=counted / seconds,
        )
        runs.append(run)
        rate = f"{run.tokens_per_second:.2f}tok/s"
        print(f"Total: {counted}tok, Time: {seconds:.2f}s, Throughput: {rate}", flush=True)
    return Result(engine.name, workload, runs)


# --- the two engines ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """The model that is measured."""

    path: str  # a directory or a hub id
    name: str  # as printed
    has_random_weights: bool


def choose_model(args: argparse.Namespace, on_gpu: bool, scratch: str) -> Model:
    """The model that the command line asks for; a shape is written to the directory `scratch`."""
    if args.model:
        return Model(args.model, args.model, has_random_weights=False)
    if args.shape is None and not on_gpu:
        return Model(DEMO_MODEL, "demo checkpoint", has_random_weights=False)
    shape = args.shape or "qwen3-0.6b"
    path = write_shape(shape, scratch, in_int4=args.quantization == INT4)
    if args.structured:
        write_tokenizer(path, SHAPES[shape]["vocab_size"])
    return Model(path, f"{shape} shape, random weights", has_random_weights=True)


def build_llm(args: argparse.Namespace, model: Model, limits: Limits) -> LLM:
    """Our engine.

    Raises:
        ValueError: it refuses an option, or the memory does not hold a sequence of such a length.
    """
    options = {name: getattr(args, name) for name in ENGINE_OPTIONS}
    options["quantization"] = args.quantization if args.quantization != INT4 else None
    load_format = "dummy" if model.has_random_weights else "auto"
    return LLM(model.path, load_format=load_format, **asdict(limits), **options)


def measure_ours(
    llm: LLM, args: argparse.Namespace, workloads: list[Workload], traces: list[Trace] | None
) -> list[Result]:
    """Run these workloads one after the other, except those that the model is too short for.

    Args:
        llm: the engine.
        args: the command line.
        workloads: all with the limits of this engine.
        traces: None, or a list that is to hold the trace of the last run.
    """
    config = llm.config
    run = partial(run_engine, llm, sampling=args.sampling, traces=traces)
    engine = Engine(OURS, config.hf_config.vocab_size, run)
    results = []
    for workload in workloads:
        if workload.longest > config.max_model_len:
            print(
                f"\nLeft out: {workload.name}: it has sequences of up to {workload.longest} "
                f"tokens, and max_model_len is {config.max_model_len}; give --small, or a --shape "
                "or --model that takes more, or raise --max-model-len if that was given"
            )
            continue
        llm.reset()  # one workload must not find another's prompts in the prefix cache
        results.append(measure(engine, workload, args.repeats))
        if args.structured:
            with_schemas = replace(engine, name="structured", run=partial(run, structured=True))
            results.append(measure(with_schemas, workload, args.repeats))
    return results


def compare_transformers(
    args: argparse.Namespace, config: Config, model: Model, workloads: list[Workload]
) -> list[Result]:
    """The same loads through transformers' `generate`: greedily, and in static batches."""
    batch_size = args.compare_batch_size or (256 if config.device == "cuda" else 16)
    print(f"\nNow transformers' generate: greedy, in static batches of {batch_size}")
    theirs = load_transformers(
        model.path, model.has_random_weights, device=config.device, dtype=config.dtype
    )
    run = partial(run_transformers, theirs, batch_size=batch_size)
    engine = Engine("transformers", config.hf_config.vocab_size, run)
    generating = [workload for workload in workloads if not workload.embeds]
    return [measure(engine, workload, args.repeats) for workload in generating]


# --- what is printed and written ----------------------------------------------------------------


def describe(llm: LLM, model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """What somebody would need to know to repeat the measurement."""
    config = llm.config
    device = f"CPU, {torch.get_num_threads()} threads"
    if config.device == "cuda":
        device = torch.cuda.get_device_name()
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "model": model.name,
        "shape": {key: getattr(config.hf_config, key, None) for key in SHAPE_KEYS},
        "device": device,
        "dtype": str(config.dtype).removeprefix("torch."),
        "quantization": args.quantization or config.quantization,  # or as the checkpoint says
        "kv_cache_dtype": str(config.kv_cache_dtype).removeprefix("torch."),
        "attention_backend": config.attention_backend,
        "options": vars(args),
        "python": platform.python_version(),
        "versions": {package: installed[package] for package in PACKAGES if package in installed},
    }


def print_table(results: list[Result]) -> None:
    """One row a result; where two engines ran, how they compare."""
    ours = {r.workload.name: r.best.tokens_per_second for r in results if r.engine == OURS}
    print(
        f"\n{'workload':<10}{'engine':<14}{'seqs':>6}{'input':>9}{'output':>9}"
        f"{'seconds':>9}{'tok/s':>12}"
    )
    for r in results:
        print(
            f"{r.workload.name:<10}{r.engine:<14}{r.workload.sequences:>6}{r.best.input_tokens:>9}"
            f"{r.best.output_tokens:>9}{r.best.seconds:>9.2f}{r.best.tokens_per_second:>12.2f}"
        )
    for r in results:
        if r.engine != OURS:
            ratio = ours[r.workload.name] / r.best.tokens_per_second
            print(f"Ratio {r.workload.name}: {OURS} / {r.engine} = {ratio:.2f}")


def write_trace(trace: Trace, file: str) -> None:
    """Print the summary of a trace; write it as the name of the file says."""
    print(f"\nThe last run, written to {file}:")
    trace.summary()
    if file.endswith((".svg", ".png")):
        trace.plot().savefig(file)
    else:
        trace.save(file)


def announce(facts: dict[str, Any], small: bool, vocab_size: int) -> None:
    """Print what is measured, and on what."""
    numbers = facts["dtype"]
    if facts["quantization"]:
        numbers += f", weights {facts['quantization']}"
    if facts["kv_cache_dtype"] != facts["dtype"]:
        numbers += f", KV cache {facts['kv_cache_dtype']}"
    attention = f"attention: {facts['attention_backend']}"
    print(f"{facts['model']} | {facts['device']} | {numbers} | {attention}")
    if small:
        cuts = sorted({workload.lengths_cut for workload in WORKLOADS.values()})
        lengths = " or ".join(f"1/{cut}" for cut in cuts)
        print(f"Small load: 1/{SEQUENCES_CUT} of the sequences, {lengths} of each length")
    if vocab_size <= TOKEN_IDS:
        print(f"Token ids 0 to {TOKEN_IDS} are taken modulo the vocabulary of {vocab_size}")


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for; print it, and write it as JSON."""
    args = parse_args(argv)
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    small = args.small or not (on_gpu or args.full)
    groups = group_by_limits(choose_workloads(args, small))
    facts: dict[str, Any] = {}
    traces: list[Trace] | None = [] if args.trace else None
    results: list[Result] = []

    with tempfile.TemporaryDirectory() as scratch:
        model = choose_model(args, on_gpu, scratch)
        for limits, workloads in groups.items():
            start = time.perf_counter()
            try:
                llm = build_llm(args, model, limits)
            except ValueError as error:  # it says what to change; a traceback would only hide it
                if not facts:
                    sys.exit(f"bench.py: {error}")
                names = ", ".join(workload.name for workload in workloads)
                print(f"\nLeft out: {names}: {error}")
                continue  # what the engines before it have measured is still reported
            startup = time.perf_counter() - start
            config = llm.config
            if not facts:  # the first engine
                facts = describe(llm, model, args)
                facts |= {"startup_seconds": startup, "load": "small" if small else "full"}
                announce(facts, small, config.hf_config.vocab_size)
            else:
                print()
            print(
                f"Start-up: {startup:.2f}s from LLM(...) to ready, for up to {config.max_num_seqs} "
                f"sequences of up to {config.max_model_len} tokens",
                flush=True,
            )
            results += measure_ours(llm, args, workloads, traces)
            llm.exit()
            del llm  # else its memory would not be there for the next engine, or for transformers
            gc.collect()
            torch.cuda.empty_cache()
        if not results:
            sys.exit("bench.py: no workload is left to run")
        if traces:
            write_trace(traces[0], args.trace)
        if args.compare:
            ran = [result.workload for result in results]
            results += compare_transformers(args, config, model, ran)

    if len(results) > 1:
        print_table(results)
    if args.json:
        rows = [asdict(result) | {"best": asdict(result.best)} for result in results]
        Path(args.json).write_text(json.dumps(facts | {"results": rows}, indent=2) + "\n")


# Worker processes import this file: without the guard, each would start all over again.
if __name__ == "__main__":
    main()
