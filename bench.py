"""Throughput of the engine on six offline workloads.

    python bench.py                                   # GPU: Qwen3-0.6B's shape, random weights; CPU: the demo
    python bench.py --workload all --repeats 3 --json results.json
    python bench.py --compare transformers            # the same load through transformers' own generate

Throughput is output tokens (for `prefill`, input tokens) over the wall time of one `generate` call. Random
weights cost as much time as trained ones, so nothing has to be downloaded to measure.
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import random
import sys
import tempfile
import time
from ast import literal_eval
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.trace import Trace

OURS = "nanovllm"
MAX_MODEL_LEN = 4096
TOKEN_IDS = 10_000  # prompts are drawn from token ids 0 to 10000, both included
SEQUENCES_CUT, LENGTHS_CUT = (
    8,
    4,
)  # the small load: an eighth of the sequences, a quarter of each length
WARMUP_REPEAT, WARMUP_TOKENS = 5_000, 8


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine: numbers of tokens, as (lowest, highest) where they are drawn."""

    name: str
    about: str
    sequences: int
    input_len: tuple[int, int]
    output_len: tuple[int, int]
    shared_len: int = 0  # tokens that all prompts begin with, before their own input_len
    counts_input: bool = False  # throughput is that of the input tokens

    def small(self) -> "Workload":
        """The load that a CPU is given."""

        def cut(lengths: tuple[int, int]) -> tuple[int, int]:
            return max(1, lengths[0] // LENGTHS_CUT), max(1, lengths[1] // LENGTHS_CUT)

        return replace(
            self,
            sequences=max(1, self.sequences // SEQUENCES_CUT),
            input_len=cut(self.input_len),
            output_len=cut(self.output_len),
            shared_len=self.shared_len // LENGTHS_CUT,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence there can be, prompt and completion."""
        return self.shared_len + self.input_len[1] + self.output_len[1]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mixed", "many lengths in and out", 256, (100, 1024), (100, 1024)),
        Workload("single", "one request, latency", 1, (128, 128), (512, 512)),
        Workload(
            "prefill", "long prompts, one token out", 64, (2048, 2048), (1, 1), counts_input=True
        ),
        Workload(
            "prefix", "one long prefix shared by all", 256, (128, 128), (64, 64), shared_len=2048
        ),
        Workload("queue", "more short requests than run at once", 2048, (16, 128), (64, 64)),
        Workload("small", "a small batch", 16, (128, 128), (256, 256)),
    )
}
SHAPES = ("qwen3-0.6b", "qwen3-8b")
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
ENGINE_OPTIONS = (
    "device",
    "dtype",
    "attention_backend",
    "tensor_parallel_size",
    "max_num_seqs",
    "gpu_memory_utilization",
    "enforce_eager",
)
PACKAGES = ("nano-vllm", "torch", "triton", "transformers", "flash-attn", "flash-attn-4")


@dataclass(frozen=True)
class Load:
    """One run's requests: token ids in, number of tokens out."""

    prompts: list[list[int]]
    output_lens: list[int]


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
        return max(self.runs, key=lambda run: run.tokens_per_second)


def make_load(workload: Workload, repeat: int, vocab_size: int) -> Load:
    """The requests of `workload`; each repeat has the same lengths and other token ids.

    A fixed length is not drawn; ids wrap round in a smaller vocabulary.
    """
    r = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [(r.randint(0, TOKEN_IDS) + repeat) % (TOKEN_IDS + 1) % vocab_size for _ in range(n)]

    def length(bounds: tuple[int, int]) -> int:
        return bounds[0] if bounds[0] == bounds[1] else r.randint(*bounds)

    prefix = tokens(workload.shared_len)
    prompts = [prefix + tokens(length(workload.input_len)) for _ in range(workload.sequences)]
    return Load(prompts, [length(workload.output_len) for _ in prompts])


def run_engine(
    llm: LLM, load: Load, sampling: dict[str, Any], traces: list[Trace] | None = None
) -> None:
    """Generate exactly the tokens that `load` asks for; with `traces`, record it and keep the last record there."""
    params = [SamplingParams(**sampling, max_tokens=n, ignore_eos=True) for n in load.output_lens]
    with nullcontext() if traces is None else llm.trace() as trace:
        outputs = llm.generate(load.prompts, params, use_tqdm=False)
    if traces is not None:
        traces[:] = [trace]
    made = sum(len(output["token_ids"]) for output in outputs)
    if made != sum(load.output_lens):
        raise RuntimeError(
            f"the engine made {made} tokens of the {sum(load.output_lens)} asked for"
        )


@torch.inference_mode()
def run_transformers(model: torch.nn.Module, load: Load, batch_size: int) -> None:
    """The same load in static, left-padded batches, in order, each as long as its longest output."""
    for start in range(0, len(load.prompts), batch_size):
        prompts = load.prompts[start : start + batch_size]
        steps = max(load.output_lens[start : start + batch_size])
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=0,
            do_sample=False,
            min_new_tokens=steps,
            max_new_tokens=steps,
        )
        if out.shape[1] != width + steps:
            raise RuntimeError(
                f"transformers made {out.shape[1] - width} tokens of the {steps} asked for"
            )


def measure(
    engine: str, workload: Workload, repeats: int, vocab_size: int, run: Callable[[Load], None]
) -> Result:
    """Warm up, then time `run` `repeats` times, each with new prompts, which no prefix cache holds."""
    count = "1 sequence" if workload.sequences == 1 else f"{workload.sequences} sequences"
    print(f"\n{workload.name} on {engine}: {count}, {workload.about}", flush=True)
    warmup = make_load(workload, WARMUP_REPEAT, vocab_size)
    run(Load(warmup.prompts, [min(n, WARMUP_TOKENS) for n in warmup.output_lens]))
    runs = []
    for repeat in range(repeats):
        load = make_load(workload, repeat, vocab_size)
        inputs, outputs = sum(map(len, load.prompts)), sum(load.output_lens)
        counted = inputs if workload.counts_input else outputs
        start = time.perf_counter()
        run(load)
        seconds = time.perf_counter() - start
        rate = counted / seconds
        runs.append(Run(repeat, inputs, outputs, seconds, rate))
        print(f"Total: {counted}tok, Time: {seconds:.2f}s, Throughput: {rate:.2f}tok/s", flush=True)
    return Result(engine, workload, runs)


def write_shape(name: str, directory: str) -> str:
    """Write the config.json of a real model to `directory`, for load_format="dummy"."""
    hidden, inter, layers, heads, tied = {
        "qwen3-0.6b": (1024, 3072, 28, 16, True),
        "qwen3-8b": (4096, 12288, 36, 32, False),
    }[name]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 1_000_000,
        "rope_scaling": None,
        "max_position_embeddings": 40960,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": layers,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }
    Path(directory, "config.json").write_text(json.dumps(config, indent=2))
    return directory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    about = "; ".join(f"{w.name}: {w.about}" for w in WORKLOADS.values())
    parser = argparse.ArgumentParser(
        description="Measure throughput.", epilog=f"workloads: {about}"
    )
    add = parser.add_argument
    add(
        "--workload",
        choices=[*WORKLOADS, "all"],
        default="mixed",
        help="default: mixed; all: in one engine",
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
    add(
        "--repeats",
        type=int,
        default=1,
        help="timed runs of each workload, of which the best counts",
    )
    add("--temperature", type=float, default=0.6, help="0 is greedy (default: 0.6)")
    add("--json", metavar="FILE", help="write the results there, for machines")
    add(
        "--trace",
        metavar="FILE",
        help="trace the runs; the last one's goes there: .json for ui.perfetto.dev, "
        ".svg or .png for a picture (needs matplotlib)",
    )
    add(
        "--compare",
        choices=["transformers"],
        help="run the same load through another engine, greedily",
    )
    add(
        "--compare-batch-size",
        type=int,
        metavar="N",
        help="its static batch (default: 256; on a CPU 16)",
    )
    add(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="auto: cuda if there is a GPU",
    )
    add(
        "--sampling",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="more SamplingParams: top_k=20 top_p=0.95",
    )
    add("--dtype", default="auto", help="auto: the checkpoint's, on a CPU float32")
    add(
        "--attention-backend",
        default="auto",
        help="auto, triton, flash_attn, flash_attn+triton, torch",
    )
    add(
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="ranks to split the model over",
    )
    add(
        "--max-num-seqs",
        type=int,
        default=512,
        metavar="N",
        help="most sequences at once (default: 512)",
    )
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="SHARE", help="default: 0.9")
    add("--enforce-eager", action="store_true", help="decode without CUDA graphs")
    args = parser.parse_args(argv)
    for option in ("repeats", "compare_batch_size"):
        if (value := getattr(args, option)) is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} is {value}; it must be at least 1")
    try:
        pairs = (pair.partition("=") for pair in args.sampling)
        args.sampling = {"temperature": args.temperature} | {
            name: literal_eval(value) for name, _, value in pairs
        }
        SamplingParams(**args.sampling)
        if fixed := {"max_tokens", "ignore_eos", "stop", "stop_token_ids"} & set(args.sampling):
            raise ValueError(f"{', '.join(sorted(fixed))}: the load says how many tokens there are")
    except (SyntaxError, TypeError, ValueError) as error:
        parser.error(f"--temperature, --sampling: {error}")
    for option, file in (("--json", args.json), ("--trace", args.trace)):
        if file and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
            parser.error(
                f"{option} {file} cannot be written: it must name a file in a directory that exists"
            )
    return args


def build_engine(args: argparse.Namespace, on_gpu: bool, scratch: str) -> tuple[LLM, str, bool]:
    """The engine, what to call its model, and whether the weights are random."""
    options = {name: getattr(args, name) for name in ENGINE_OPTIONS} | {
        "max_model_len": MAX_MODEL_LEN
    }
    path, name = args.model or DEMO_MODEL, args.model or "demo checkpoint"
    shape = args.shape or (SHAPES[0] if on_gpu and not args.model else None)
    if shape:
        path, name = write_shape(shape, scratch), f"{shape} shape, random weights"
        options["load_format"] = "dummy"
    try:
        return LLM(path, **options), name, bool(shape)
    except ValueError as error:  # the message says what to change; a traceback would only hide it
        sys.exit(f"bench.py: {error}")


def describe(llm: LLM, model: str, startup: float, args: argparse.Namespace) -> dict[str, Any]:
    """What somebody would need to know to repeat the measurement."""
    config, on_gpu = llm.config, llm.config.device == "cuda"
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "model": model,
        "shape": {key: getattr(config.hf_config, key, None) for key in SHAPE_KEYS},
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(config.dtype).removeprefix("torch."),
        "attention_backend": config.attention_backend,
        "startup_seconds": startup,
        "options": vars(args),
        "python": platform.python_version(),
        "versions": {package: installed[package] for package in PACKAGES if package in installed},
    }


def load_transformers(
    path: str, random_weights: bool, device: str, dtype: torch.dtype
) -> torch.nn.Module:
    """The same model as transformers runs it: the same weights, or as many random ones."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()  # it warns of names that changed between its versions; these work in all
    if random_weights:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(path), torch_dtype=dtype
            )
    else:
        model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=dtype)
    return model.eval().to(device)


def compare_transformers(
    args: argparse.Namespace, config: Config, random_weights: bool, workloads: list[Workload]
) -> list[Result]:
    """The same loads through transformers' `generate`, which decodes greedily and in static batches."""
    gc.collect()
    torch.cuda.empty_cache()  # what the engine held
    batch_size = args.compare_batch_size or (256 if config.device == "cuda" else 16)
    print(f"\nNow transformers' generate: greedy, in static batches of {batch_size}")
    model = load_transformers(config.model, random_weights, config.device, config.dtype)
    run = partial(run_transformers, model, batch_size=batch_size)
    return [
        measure("transformers", w, args.repeats, config.hf_config.vocab_size, run)
        for w in workloads
    ]


def print_table(results: list[Result]) -> None:
    """One row a result; where two engines ran, how they compare."""
    ours = {r.workload.name: r.best.tokens_per_second for r in results if r.engine == OURS}
    print(
        f"\n{'workload':<10}{'engine':<14}{'seqs':>6}{'input':>9}{'output':>9}{'seconds':>9}{'tok/s':>12}"
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


def main(argv: list[str] | None = None) -> None:
    """Measure what the command line asks for; print it, and write it as JSON."""
    args = parse_args(argv)
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    small = args.small or not (on_gpu or args.full)
    workloads = list(WORKLOADS.values()) if args.workload == "all" else [WORKLOADS[args.workload]]
    if small:
        workloads = [workload.small() for workload in workloads]

    with tempfile.TemporaryDirectory() as scratch:
        start = time.perf_counter()
        llm, model, random_weights = build_engine(args, on_gpu, scratch)
        facts = describe(llm, model, time.perf_counter() - start, args)
        facts["load"] = "small" if small else "full"
        config, vocab_size = llm.config, llm.config.hf_config.vocab_size
        print(
            f"{model} | {facts['device']} | {facts['dtype']} | attention: {facts['attention_backend']}"
        )
        if small:
            print(f"Small load: 1/{SEQUENCES_CUT} of the sequences, 1/{LENGTHS_CUT} of each length")
        if vocab_size <= TOKEN_IDS:
            print(
                f"Token ids 0 to {TOKEN_IDS} are taken modulo the model's vocabulary of {vocab_size}"
            )
        print(f"Start-up: {facts['startup_seconds']:.2f}s from LLM(...) to ready", flush=True)
        if (longest := max(w.longest for w in workloads)) > config.max_model_len:
            sys.exit(
                f"bench.py: the load has sequences of up to {longest} tokens, the model takes "
                f"{config.max_model_len}; give --small, or --shape or --model of a model that takes more"
            )
        traces: list[Trace] | None = [] if args.trace else None
        run = partial(run_engine, llm, sampling=args.sampling, traces=traces)
        results = []
        for workload in workloads:
            llm.reset()  # one workload must not find another's prompts in the prefix cache
            results.append(measure(OURS, workload, args.repeats, vocab_size, run))
        if traces:
            print(f"\nThe last run, written to {args.trace}:")
            traces[0].summary()
            if args.trace.endswith((".svg", ".png")):
                traces[0].plot().savefig(args.trace)
            else:
                traces[0].save(args.trace)
        llm.exit()
        if args.compare:
            del llm, run  # nothing else holds the engine's memory
            results += compare_transformers(args, config, random_weights, workloads)

    if len(results) > 1:
        print_table(results)
    if args.json:
        rows = [asdict(r) | {"best": asdict(r.best)} for r in results]
        Path(args.json).write_text(json.dumps(facts | {"results": rows}, indent=2) + "\n")


if (
    __name__ == "__main__"
):  # worker processes import this file: without the guard each would start again
    main()
