"""bench.py asks for exactly the published loads; it, example.py and two of the scripts run."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bench
import example
from nanovllm import StructuredOutputsParams
from nanovllm.checkpoints.checkpoint import load_tokenizer
from nanovllm.config import Config
from nanovllm.layers.linear import LinearBase
from nanovllm.models import MODELS, model_class
from nanovllm.sampling.rule_maker import compile_grammar
from scripts import compare_json
from scripts.structured_load import make_schema, write_tokenizer
from scripts.workloads import INT4_CONFIG, LENGTHS_CUT, SHAPES, Limits

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 151_936
DEMO_POSITIONS = 4096  # of the demo checkpoint
ALL = ["--workload", "all"]
PRIMES = [n for n in range(2, 101) if all(n % d for d in range(2, n))]
TOTAL_LINE = re.compile(
    r"^Total: (\d+)tok, Time: (\d+\.\d\d)s, Throughput: (\d+\.\d\d)tok/s$", re.MULTILINE
)


def run_script(*command: str) -> str:
    """Run a script as a user does; its output."""
    # PYTHONPATH: so that it runs uninstalled too. One thread: on a busy machine, threads that wait
    # for one another by spinning take many times as long.
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *command]
    done = subprocess.run(
        argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- the loads ----------------------------------------------------------------------------------


@cache  # the large ones take a second
def first_load(name: str) -> bench.Load:
    """The load of repeat 0; not to be changed."""
    return bench.make_load(bench.WORKLOADS[name], repeat=0, vocab_size=VOCAB)


def test_mixed_is_the_published_load_draw_by_draw() -> None:
    r = random.Random(0)
    prompts = []
    for _ in range(256):
        n = r.randint(100, 1024)
        prompts.append([r.randint(0, 10000) for _ in range(n)])
    output_lens = [r.randint(100, 1024) for _ in range(256)]
    load = bench.make_load(bench.WORKLOADS["mixed"], repeat=0, vocab_size=VOCAB)
    assert load.prompts == prompts
    assert load.output_lens == output_lens
    assert sum(load.output_lens) == 133_966


def test_job_is_the_stated_load_draw_by_draw() -> None:
    r = random.Random(0)
    prompts = []
    for _ in range(2048):
        n = r.randint(32, 1024)
        prompts.append([r.randint(0, 10000) for _ in range(n)])
    output_lens = [r.randint(16, 512) for _ in range(2048)]
    load = first_load("job")
    assert load.prompts == prompts
    assert load.output_lens == output_lens
    assert sum(load.output_lens) == 534_873


def test_a_fixed_length_is_not_drawn() -> None:
    r = random.Random(0)
    assert first_load("medium").prompts == [
        [r.randint(0, 10000) for _ in range(100)] for _ in range(64)
    ]
    r = random.Random(0)
    assert first_load("long").prompts == [
        [r.randint(0, 10000) for _ in range(30_000)] for _ in range(16)
    ]


@pytest.mark.parametrize("name", bench.WORKLOADS)
@pytest.mark.parametrize("repeat", [1, 2, bench.WARMUP_REPEAT, 10_000])
def test_a_repeat_has_the_same_lengths_and_every_token_id_shifted(name: str, repeat: int) -> None:
    first = first_load(name)
    other = bench.make_load(bench.WORKLOADS[name], repeat=repeat, vocab_size=VOCAB)
    assert other.output_lens == first.output_lens
    assert other.prompts == [
        [(token + repeat) % 10_001 for token in prompt] for prompt in first.prompts
    ]


def test_prefix_draws_the_shared_part_first() -> None:
    r = random.Random(0)
    prefix = [r.randint(0, 10000) for _ in range(2048)]
    tails = [[r.randint(0, 10000) for _ in range(128)] for _ in range(256)]
    load = bench.make_load(bench.WORKLOADS["prefix"], repeat=0, vocab_size=VOCAB)
    assert load.prompts == [prefix + tail for tail in tails]


@pytest.mark.parametrize(
    "name, sequences, shortest_in, longest_in, outputs",
    [
        ("mixed", 256, 100, 1024, range(100, 1025)),
        ("single", 1, 128, 128, [512]),
        ("prefill", 64, 2048, 2048, [1]),
        ("embed", 64, 2048, 2048, [1]),
        ("prefix", 256, 2176, 2176, [64]),
        ("queue", 2048, 16, 128, [64]),
        ("small", 16, 128, 128, [256]),
        ("medium", 64, 100, 100, [256]),
        ("job", 2048, 32, 1024, range(16, 513)),
        ("long", 16, 30_000, 30_000, [128]),
    ],
)
def test_sizes_of_every_load(
    name: str, sequences: int, shortest_in: int, longest_in: int, outputs: range | list[int]
) -> None:
    load = first_load(name)
    lengths = [len(prompt) for prompt in load.prompts]
    assert len(lengths) == len(load.output_lens) == sequences
    assert shortest_in <= min(lengths) and max(lengths) <= longest_in
    assert set(load.output_lens) <= set(outputs)
    assert all(0 <= token <= 10_000 for prompt in load.prompts for token in prompt)
    longest = max(map(sum, zip(lengths, load.output_lens, strict=True)))
    assert longest <= bench.WORKLOADS[name].longest <= bench.WORKLOADS[name].limits.max_model_len
    assert bench.WORKLOADS[name].counts_input == (name in ("prefill", "embed"))


def test_queue_draws_each_length_before_its_tokens() -> None:
    r = random.Random(0)
    prompts = [[r.randint(0, 10000) for _ in range(r.randint(16, 128))] for _ in range(2048)]
    assert bench.make_load(bench.WORKLOADS["queue"], repeat=0, vocab_size=VOCAB).prompts == prompts


def test_repeats_and_warmup_share_no_prompt() -> None:
    """Else a run would measure the prefix cache of the one before."""
    workload = bench.WORKLOADS["prefix"].small()
    repeats = [0, 1, 2, bench.WARMUP_REPEAT]
    starts = {tuple(bench.make_load(workload, repeat, VOCAB).prompts[0][:16]) for repeat in repeats}
    assert len(starts) == len(repeats)


def test_tokens_stay_within_a_small_vocabulary() -> None:
    load = bench.make_load(bench.WORKLOADS["small"], repeat=0, vocab_size=100)
    whole = bench.make_load(bench.WORKLOADS["small"], repeat=0, vocab_size=VOCAB)
    assert load.prompts == [[token % 100 for token in prompt] for prompt in whole.prompts]


def test_the_small_load_keeps_what_the_workload_is_about() -> None:
    for workload in bench.WORKLOADS.values():
        small = workload.small()
        assert small.sequences == max(1, workload.sequences // bench.SEQUENCES_CUT)
        assert small.longest <= workload.longest / LENGTHS_CUT + 1
        assert small.longest <= small.limits.max_model_len <= DEMO_POSITIONS
        assert (small.shared_len > 0) == (workload.shared_len > 0)
        waits = workload.sequences > workload.limits.max_num_seqs
        assert (small.sequences > small.limits.max_num_seqs) == waits


def test_only_job_and_long_have_engines_of_their_own() -> None:
    groups = bench.group_by_limits(bench.choose_workloads(bench.parse_args(ALL), small=False))
    assert list(groups) == [Limits(512, 4096), Limits(256, 4096), Limits(512, 32_768)]
    shared, job, long = ([workload.name for workload in group] for group in groups.values())
    assert shared == ["mixed", "single", "prefill", "embed", "prefix", "queue", "small", "medium"]
    assert (job, long) == (["job"], ["long"])


@pytest.mark.parametrize(
    "option, value, small, expected",
    [
        ("--max-num-seqs", "12", False, [Limits(12, 4096), Limits(12, 32_768)]),
        ("--max-num-seqs", "12", True, [Limits(12, 1024), Limits(12, 4096)]),
        ("--max-model-len", "32768", False, [Limits(512, 32_768), Limits(256, 32_768)]),
        ("--max-model-len", "2000", True, [Limits(64, 2000), Limits(32, 2000)]),
    ],
)
def test_the_users_limits_take_the_place_of_the_workloads(
    option: str, value: str, small: bool, expected: list[Limits]
) -> None:
    args = bench.parse_args([*ALL, option, value])
    assert list(bench.group_by_limits(bench.choose_workloads(args, small))) == expected


def test_named_workloads_run_once_each_in_the_order_given() -> None:
    args = bench.parse_args(["--workload", "queue", "job", "queue", "single"])
    chosen = bench.choose_workloads(args, small=False)
    assert [workload.name for workload in chosen] == ["queue", "job", "single"]


PUBLISHED_PARAMETERS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_the_real_models(shape: str, tmp_path: Path) -> None:
    """An engine's configuration is made of each, and a model of as many parameters as are in the
    published checkpoint; tied ones count once.
    """
    path = bench.write_shape(shape, str(tmp_path))
    config = Config(path, load_format="dummy", device="cpu", architectures=MODELS)
    make_model = model_class(config.hf_config)
    make_model.check_config(config.hf_config, tp_size=1)
    with torch.device("meta"):
        model = make_model(config.hf_config, max_position=64)
    assert sum(param.numel() for param in model.parameters()) == PUBLISHED_PARAMETERS[shape]
    # Random INT4 weights have groups of as many columns, all of them whole.
    columns = {module.input_size for module in model.modules() if isinstance(module, LinearBase)}
    columns |= {p.shape[-1] for name, p in model.named_parameters() if "experts" in name}
    assert columns and not any(number % INT4_CONFIG["group_size"] for number in columns)


# --- the scripts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """Printed output and JSON of a short run beside transformers."""
    file = tmp_path_factory.mktemp("bench") / "results.json"
    printed = run_script(
        "bench.py",
        "--device",
        "cpu",
        "--workload",
        "single",
        "--repeats",
        "2",
        "--json",
        str(file),
        "--compare",
        "transformers",
    )
    return printed, json.loads(file.read_text())


def test_bench_prints_the_stated_line(bench_run: tuple[str, dict]) -> None:
    printed, _ = bench_run
    lines = TOTAL_LINE.findall(printed)
    assert len(lines) == 4  # two repeats, two engines
    assert {int(total) for total, _, _ in lines} == {128}
    assert "demo checkpoint | CPU" in printed and "Small load: 1/8 of the sequences" in printed
    assert "single on nanovllm: 1 sequence," in printed and "single on transformers: " in printed
    assert re.search(r"^Start-up: \d+\.\d\ds ", printed, re.MULTILINE)
    assert re.search(r"^Ratio single: nanovllm / transformers = \d+\.\d\d$", printed, re.MULTILINE)


def test_bench_writes_json(bench_run: tuple[str, dict]) -> None:
    _, facts = bench_run
    assert (facts["model"], facts["load"], facts["dtype"]) == (
        "demo checkpoint",
        "small",
        "float32",
    )
    assert facts["startup_seconds"] > 0 and facts["shape"]["num_hidden_layers"] > 0
    assert {"torch", "transformers"} <= set(facts["versions"])
    ours, theirs = facts["results"]
    assert (ours["engine"], theirs["engine"]) == ("nanovllm", "transformers")
    for result in (ours, theirs):
        assert [run["repeat"] for run in result["runs"]] == [0, 1]
        assert len({(run["input_tokens"], run["output_tokens"]) for run in result["runs"]}) == 1
        assert result["best"] == max(result["runs"], key=lambda run: run["tokens_per_second"])
        for run in result["runs"]:
            assert run["tokens_per_second"] == pytest.approx(run["output_tokens"] / run["seconds"])


def test_bench_writes_a_trace_of_the_last_run(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    bench.main(["--device", "cpu", "--workload", "single", "--repeats", "2", "--trace", str(file)])
    events = json.loads(file.read_text())["traceEvents"]
    steps = [event["args"] for event in events if event["pid"] == 1 and event["ph"] == "X"]
    assert [step["kind"] for step in steps] == ["prefill"] + ["decode"] * 127
    bench.main(
        ["--device", "cpu", "--workload", "single", "--trace", str(file.with_suffix(".png"))]
    )
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_schema_for_each_request_is_measured_beside_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = []
    generate = bench.LLM.generate

    def recording(self: Any, prompts: Any, params: Any, **options: Any) -> Any:
        forms.append([each.structured_outputs for each in params])
        return generate(self, prompts, params, **options)

    monkeypatch.setattr(bench.LLM, "generate", recording)
    file = tmp_path / "results.json"
    options = ["--device", "cpu", "--workload", "small", "--structured", "--json", str(file)]
    bench.main(options)
    results = json.loads(file.read_text())["results"]
    assert [result["engine"] for result in results] == ["nanovllm", "structured"]
    assert "Ratio small: nanovllm / structured = " in capsys.readouterr().out
    warm_up, plain, structured_warm_up, structured = forms
    assert set(warm_up) == set(plain) == {None}
    assert len(set(structured)) == len(plain) > 1


def test_the_tokenizer_of_a_shape_can_follow_the_schemas(tmp_path: Path) -> None:
    write_tokenizer(str(tmp_path), 2_000)
    tokenizer = load_tokenizer(str(tmp_path))
    assert 1_700 < len(tokenizer) < 2_000
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"
    llguidance = pytest.importorskip("llguidance.hf")
    as_tree = llguidance.from_tokenizer(tokenizer, n_vocab=2_000)
    matcher = compile_grammar(StructuredOutputsParams(json=make_schema(5)), as_tree)
    text = '[{"name5": "ba du", "age": 3'
    token_ids = as_tree.tokenize_str(text)
    assert tokenizer.decode(token_ids) == text
    assert matcher.validate_tokens(token_ids) == len(token_ids)


def test_a_workload_starts_with_an_empty_prefix_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """All token ids come from the same generator: prompts of two workloads may begin alike."""
    tiny = [bench.Workload(name, "tiny", 3, (300, 300), (2, 2)) for name in ("first", "second")]
    monkeypatch.setattr(bench, "WORKLOADS", {workload.name: workload for workload in tiny})
    measure, num_cached = bench.measure, []

    def watching(engine: bench.Engine, workload: bench.Workload, repeats: int) -> bench.Result:
        llm = engine.run.args[0]  # the engine that `run` is bound to
        manager = llm.scheduler.block_manager
        num_cached.append(len(manager.cached_blocks))
        result = measure(engine, workload, repeats)
        num_cached.append(len(manager.cached_blocks))
        return result

    monkeypatch.setattr(bench, "measure", watching)
    bench.main(["--device", "cpu", "--full", "--workload", "all"])
    before_first, after_first, before_second, after_second = num_cached
    assert before_first == before_second == 0 and after_first > 0 and after_second > 0


def test_each_workload_runs_in_an_engine_with_its_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that the model is too short for is left out; of the others all is reported."""
    limits = {"a": Limits(3, 32), "b": Limits(2, 32), "c": Limits(3, 32), "d": Limits(3, 9999)}
    tiny = {n: bench.Workload(n, "tiny", 4, (9, 9), (3, 3), limits=limits[n]) for n in limits}
    tiny["d"] = replace(tiny["d"], input_len=(5000, 5000))
    monkeypatch.setattr(bench, "WORKLOADS", tiny)
    measure, ran = bench.measure, []

    def watching(engine: bench.Engine, workload: bench.Workload, repeats: int) -> bench.Result:
        config = engine.run.args[0].config
        ran.append((workload.name, config.max_num_seqs, config.max_model_len))
        return measure(engine, workload, repeats)

    monkeypatch.setattr(bench, "measure", watching)
    file, trace = tmp_path / "results.json", tmp_path / "trace.json"
    files = ["--json", str(file), "--trace", str(trace)]
    bench.main(["--device", "cpu", "--full", *ALL, *files])
    assert ran == [("a", 3, 32), ("c", 3, 32), ("b", 2, 32)]
    printed = capsys.readouterr().out
    assert printed.count("\nStart-up: ") == 3 and len(TOTAL_LINE.findall(printed)) == 3
    assert (
        "Left out: d: it has sequences of up to 5003 tokens, and max_model_len is 4096" in printed
    )
    rows = json.loads(file.read_text())["results"]
    assert [row["workload"]["name"] for row in rows] == ["a", "c", "b"]
    assert [row["workload"]["limits"]["max_num_seqs"] for row in rows] == [3, 3, 2]
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event["args"] for event in events if event["pid"] == 1 and event["ph"] == "X"]
    assert [step["kind"] for step in steps] == ["prefill", "decode", "decode"] * 2  # b, two at once

    refused = replace(tiny["b"], limits=Limits(max_num_seqs=0))  # also where memory is too small
    monkeypatch.setattr(bench, "WORKLOADS", {"a": tiny["a"], "b": refused})
    bench.main(["--device", "cpu", "--full", *ALL, "--json", str(file)])
    assert "Left out: b: max_num_seqs" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["results"]) == 1

    monkeypatch.setattr(bench, "WORKLOADS", {"d": tiny["d"]})
    with pytest.raises(SystemExit, match="no workload is left"):
        bench.main(["--device", "cpu", "--full", *ALL])


def test_the_kv_cache_can_be_fp8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = bench.Workload("a", "tiny", 4, (9, 9), (3, 3), limits=Limits(3, 32))
    monkeypatch.setattr(bench, "WORKLOADS", {"a": tiny})
    file = tmp_path / "results.json"
    bench.main(["--device", "cpu", "--full", *ALL, "--kv-cache-dtype", "fp8", "--json", str(file)])
    assert "| float32, KV cache float8_e4m3fn | attention: torch" in capsys.readouterr().out
    assert json.loads(file.read_text())["kv_cache_dtype"] == "float8_e4m3fn"


@pytest.mark.parametrize("name", ["fp8", "int4"])
def test_weights_can_be_quantised(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = bench.Workload("a", "tiny", 4, (9, 9), (3, 3), limits=Limits(3, 32))
    monkeypatch.setattr(bench, "WORKLOADS", {"a": tiny})
    small = {
        "vocab_size": 999,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
    }
    monkeypatch.setitem(SHAPES, "qwen3-0.6b", {**SHAPES["qwen3-0.6b"], **small})
    formats = []
    build = bench.build_llm

    def recording(*args: Any) -> bench.LLM:
        llm = build(*args)
        linear_layer = llm.model_runner.model.model.layers[0].mlp.down_proj
        formats.append(type(linear_layer.weight_format).__name__)
        return llm

    monkeypatch.setattr(bench, "build_llm", recording)
    file = tmp_path / "results.json"
    shape = ["--device", "cpu", "--full", "--shape", "qwen3-0.6b", *ALL, "--json", str(file)]
    bench.main([*shape, "--quantization", name])
    bench.main(shape)
    assert formats == [{"fp8": "FP8Online", "int4": "GPTQ"}[name], "Unquantized"]
    assert f"| float32, weights {name} | attention: torch" in capsys.readouterr().out
    assert json.loads(file.read_text())["quantization"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repeats", "0"], r"--repeats is 0; it must be at least 1"),
        (["--compare-batch-size", "-1"], r"--compare-batch-size is -1"),
        (["--model", "somewhere", "--quantization", "int4"], r"int4 is of random weights"),
        (["--compare", "transformers", "--quantization", "fp8"], r"--compare has no quantised"),
        (["--workload", "none"], r"invalid choice: 'none'"),
        (["--trace", "no/such/place.json"], r"--trace no/such/place.json cannot be written"),
        (["--full", "--small"], r"not allowed with"),
        (["--model", "somewhere", "--shape", "qwen3-8b"], r"not allowed with"),
    ],
)
def test_bench_refuses_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("script", [bench, example])
def test_a_missing_model_is_one_clear_line(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=re.escape(str(tmp_path))):
        script.main(["--model", str(tmp_path), "--device", "cpu"])


def test_example_gives_both_right_answers() -> None:
    printed = run_script("example.py")
    blocks = [re.sub(r"\s+", " ", block) for block in printed.strip().split("\n\n")]
    introduction, primes = blocks[-2:]
    assert introduction.startswith("Prompt: introduce yourself Completion: ")
    assert "Nano-vLLM" in introduction and "finish reason: stop" in introduction
    assert primes.startswith("Prompt: list all prime numbers within 100 Completion: ")
    assert re.findall(r"\d+(?:, \d+)+", primes) == [", ".join(map(str, PRIMES))]
    assert "<|im_" not in printed


def test_example_takes_prompts_and_options() -> None:
    args = example.parse_args(
        ["--prompt", "a", "--prompt", "b", "--temperature", "0.5", "--max-tokens", "3"]
    )
    assert (args.prompt, args.temperature, args.max_tokens) == (["a", "b"], 0.5, 3)


def test_scheduling_does_not_cost_more_over_a_larger_cache() -> None:
    printed = run_script("scripts/bench_scheduler.py", "--rounds", "10")
    ratio = re.search(r"^Ratio: (\d+\.\d+)", printed, re.MULTILINE)
    assert ratio is not None and float(ratio[1]) < 1.5


def write_rates(file: Path, rates: list[float], output_tokens: int = 4) -> str:
    """What bench.py would write of one workload, as far as it is compared; returns the file."""
    runs = [
        {"tokens_per_second": r, "input_tokens": 3, "output_tokens": output_tokens} for r in rates
    ]
    ours = {"engine": "nanovllm", "workload": {"name": "mixed"}, "runs": runs}
    other = {"engine": "transformers", "workload": {"name": "mixed"}, "runs": []}
    facts = {"model": "m", "options": {"tensor_parallel_size": 2}, "results": [ours, other]}
    file.write_text(json.dumps(facts))
    return str(file)


def test_two_trees_are_compared_by_the_medians_of_all_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = [write_rates(tmp_path / "1", [100, 300]), write_rates(tmp_path / "2", [200])]
    for rate, expected in ((199, "0.995 |"), (197, "0.985 **slower** |")):
        compare_json.main(["--base", *base, "--new", write_rates(tmp_path / "3", [rate])])
        row = capsys.readouterr().out.splitlines()[2]
        assert row.startswith("| mixed, m, 2 rank(s) | 200 (100 to 300) | ")
        assert row.endswith(expected)


def test_different_loads_are_not_compared(tmp_path: Path) -> None:
    base = write_rates(tmp_path / "base", [100])
    new = write_rates(tmp_path / "new", [100], output_tokens=5)
    with pytest.raises(SystemExit, match=r"mixed, m, 2 rank\(s\): .* tokens in and out"):
        compare_json.main(["--base", base, "--new", new])
