"""Bad input gets a clear exception before any work is done; the engine still works afterwards."""

import gc
import json
import multiprocessing
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import (
    Checkpoint,
    assert_idle,
    edit_json,
    generate_ids,
    greedy,
    make_llm,
    random_prompts,
)

from nanovllm import LLM, SamplingParams
from nanovllm.config import Config
from nanovllm.engine.pending_tokens import PendingTokens
from nanovllm.engine.scheduler import Scheduler

PROMPT = [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(checkpoint.path, max_model_len=64)
    yield llm
    llm.exit()


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[int]:
    return checkpoint.complete([PROMPT], 8)[0]


@pytest.fixture(autouse=True)
def still_works(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test that uses the shared engine, it is empty and gives the right tokens."""
    if "llm" not in request.fixturenames:
        yield
        return
    engine, expected = (request.getfixturevalue(name) for name in ("llm", "expected"))
    yield
    assert generate_ids(engine, [PROMPT], greedy(8)) == [expected]


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, near",
    [
        ("max_num_seq", "max_num_seqs"),
        ("enforce_eagr", "enforce_eager"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("max_num_batch_tokens", "max_num_batched_tokens"),
        ("kvcache_blocksize", "kvcache_block_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
    ],
)
def test_an_unknown_option_names_the_nearest(
    checkpoint: Checkpoint, option: str, near: str
) -> None:
    with pytest.raises(TypeError, match=f"{option!r}.*{near!r}"):
        LLM(checkpoint.path, **{option: 1})


@pytest.mark.parametrize(
    "option, values",
    [
        ("max_num_batched_tokens", [0, -1]),
        ("max_num_seqs", [0, -5]),
        ("max_model_len", [0, -1]),
        ("gpu_memory_utilization", [0, -0.5, 1.01, float("nan"), float("inf")]),
        ("tensor_parallel_size", [0, 9, -1]),
        ("kvcache_block_size", [0, -16]),
        ("num_kvcache_blocks", [0, -2]),
        ("eos", [-2, (2, -2)]),
        ("device", ["tpu", "", "cuda:0"]),
        ("dtype", ["float64", "int8", "double", "bf16"]),
        ("attention_backend", ["flash", "sdpa"]),
        ("load_format", ["pt", "safetensors"]),
        ("seed", [-1, 2**63]),
    ],
)
def test_an_option_out_of_range(checkpoint: Checkpoint, option: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=option) as error:
            LLM(checkpoint.path, **{"device": "cpu", option: value})
        assert str(value[-1] if isinstance(value, tuple) else value) in str(error.value)


@pytest.mark.parametrize(
    "option, values",
    [
        ("max_num_batched_tokens", [16.0, "16", True]),
        ("max_num_seqs", [1.5, False]),
        ("max_model_len", ["64", True]),
        ("gpu_memory_utilization", ["0.9", True]),
        ("tensor_parallel_size", [1.0, True, [0]]),
        ("kvcache_block_size", [16.0, True]),
        ("num_kvcache_blocks", [10.0, True]),
        ("eos", [1.0, True, "</s>"]),
        ("enforce_eager", [1, 0, "yes", None]),
        ("enable_prefix_caching", [1, "no"]),
        ("seed", [0.5, True]),
    ],
)
def test_an_option_of_the_wrong_type(
    checkpoint: Checkpoint, option: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(TypeError, match=option) as error:
            LLM(checkpoint.path, **{"device": "cpu", option: value})
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("option", ["device", "dtype", "attention_backend", "load_format"])
@pytest.mark.parametrize("value", [None, 3, ["cpu"]])
def test_a_choice_of_the_wrong_type(checkpoint: Checkpoint, option: str, value: object) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        LLM(checkpoint.path, **{"device": "cpu", option: value})


def test_a_cache_too_small_for_one_sequence(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ValueError, match=r"3 blocks of 16 .*max_model_len 64, which takes 4 blocks"
    ):
        make_llm(checkpoint.path, max_model_len=64, num_kvcache_blocks=3)
    make_llm(checkpoint.path, max_model_len=64, num_kvcache_blocks=4).exit()


def test_more_ranks_than_the_heads_can_be_split_over(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused before any process is started: one of them would only wait for the others."""
    started: list[object] = []
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", started.append)
    children = len(multiprocessing.active_children())
    try:
        with pytest.raises(ValueError, match=r"num_attention_heads \(4\).*tensor_parallel_size 3"):
            make_llm(checkpoint.path, tensor_parallel_size=3)
        assert not started
        # Nothing is left over that the next engine would stumble on.
        assert len(multiprocessing.active_children()) == children
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_gpu_backend_on_the_cpu(checkpoint: Checkpoint) -> None:
    for backend in ("triton", "flash_attn"):
        with pytest.raises(ValueError, match=f"{backend}.*cpu"):
            make_llm(checkpoint.path, attention_backend=backend)


def test_an_architecture_is_checked_against_those_that_there_is_code_for(
    checkpoint: Checkpoint, copy: Path
) -> None:
    """Config knows no models: the engine tells it their names. Nobody else can pass any."""
    with pytest.raises(ValueError, match="config.json names .*'Qwen3ForCausalLM'; supported: A, B"):
        Config.from_options(checkpoint.path, {"device": "cpu"}, ["A", "B"])
    hf_config = Config(checkpoint.path, device="cpu", architectures=["Qwen3ForCausalLM"]).hf_config
    with pytest.raises(ValueError, match="hf_config names .*'Qwen3ForCausalLM'; supported: A"):
        Config(checkpoint.path, device="cpu", hf_config=hf_config, architectures=["A"])
    with pytest.raises(TypeError, match="unknown option 'architectures'"):
        LLM(checkpoint.path, architectures=["Qwen3ForCausalLM"])
    # One that transformers does not know either is refused by name, before transformers reads it.
    edit_json(copy / "config.json", architectures=["Other"], model_type="other")
    with pytest.raises(ValueError, match="'Other'; supported: Qwen3ForCausalLM, Qwen2ForCausalLM"):
        LLM(str(copy))


def test_max_model_len_never_exceeds_the_models(checkpoint: Checkpoint) -> None:
    config = Config(checkpoint.path, max_model_len=10**6, device="cpu")
    assert config.max_model_len == 1024


# --- the model --------------------------------------------------------------------------------


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    for model in (str(tmp_path / "nowhere"), "somebody/no-such-model", "no such id at all"):
        with pytest.raises(ValueError, match="pass the path of a checkpoint"):
            LLM(model)
    for model in (None, 3, ["path"]):
        with pytest.raises(TypeError, match="model must be a path or a hub id"):
            LLM(model)  # type: ignore[arg-type]


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config.json"):
        LLM(str(tmp_path))
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="not valid JSON"):
        LLM(str(tmp_path))
    for contents in ("[]", "{}", '"Qwen3ForCausalLM"', "null"):
        (tmp_path / "config.json").write_text(contents)
        with pytest.raises(ValueError, match="config.json"):
            LLM(str(tmp_path))


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be spoilt."""
    shutil.copytree(checkpoint.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(architectures=["GPTNeoXForCausalLM"]),
            "'GPTNeoXForCausalLM'; supported: Qwen3ForCausalLM, Qwen2",
        ),
        (dict(architectures=[]), "supported: Qwen3ForCausalLM, Qwen2"),
        (
            dict(rope_parameters=dict(rope_type="xpos", rope_theta=1e4, factor=4.0)),
            "'xpos' is not supported",
        ),
        (
            dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor="2")),
            "positive factor for RoPE of type 'linear', not '2'",
        ),
        (
            dict(rope_parameters=None, rope_scaling=dict(type="mrope", factor=2.0)),
            "'mrope' is not supported",
        ),
        (dict(rope_parameters=None, rope_scaling=dict(rope_type="llama3", factor=8.0)), "'llama3'"),
        (dict(hidden_act="gelu"), "'gelu' is not supported"),
        (
            dict(layer_types=["chunked_attention", "full_attention"]),
            "layers of type 'chunked_attention' are not supported; supported: full_attention, sl",
        ),
        (dict(layer_types=["sliding_attention", "full_attention"]), "there is no sliding_window"),
        (
            dict(quantization_config=dict(quant_method="bitsandbytes")),
            "quant_method 'bitsandbytes' is not supported; supported: fp8",
        ),
        (dict(num_key_value_heads=3), "3"),
    ],
)
def test_a_configuration_that_is_not_supported(
    copy: Path, changes: dict[str, Any], message: str
) -> None:
    edit_json(copy / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        make_llm(str(copy))


def test_a_tokenizer_that_cannot_be_read(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    (copy / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    with pytest.raises(ValueError, match="tokenizer"):
        make_llm(str(copy))


# --- sampling parameters ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value, error",
    [
        ("temperature", -0.1, ValueError),
        ("temperature", float("nan"), ValueError),
        ("temperature", float("inf"), ValueError),
        ("temperature", "1", TypeError),
        ("temperature", True, TypeError),
        ("max_tokens", 0, ValueError),
        ("max_tokens", -3, ValueError),
        ("max_tokens", 2.0, TypeError),
        ("max_tokens", "8", TypeError),
        ("max_tokens", True, TypeError),
        ("ignore_eos", 1, TypeError),
        ("ignore_eos", None, TypeError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("seed", 0.5, TypeError),
        ("seed", False, TypeError),
        ("top_k", -2, ValueError),
        ("top_k", 2**25, ValueError),
        ("top_k", 2.0, TypeError),
        ("top_p", 0, ValueError),
        ("top_p", 1.01, ValueError),
        ("top_p", "1", TypeError),
        ("min_p", -0.1, ValueError),
        ("min_p", 1.1, ValueError),
        ("repetition_penalty", 0.0, ValueError),
        ("repetition_penalty", float("nan"), ValueError),
        ("presence_penalty", 2.1, ValueError),
        ("frequency_penalty", -2.1, ValueError),
        ("frequency_penalty", "1", TypeError),
        ("logit_bias", {3: 101}, ValueError),
        ("logit_bias", {-3: 1}, ValueError),
        ("logit_bias", {"3": 1}, TypeError),
        ("logit_bias", {3: None}, TypeError),
        ("logit_bias", [3], TypeError),
        ("n", 0, ValueError),
        ("n", 1.0, TypeError),
        ("min_tokens", -1, ValueError),
        ("min_tokens", 65, ValueError),
        ("stop", ["a", ""], ValueError),
        ("stop", "", ValueError),
        ("stop", 3, TypeError),
        ("stop", ["a", 3], TypeError),
        ("stop_token_ids", [1.0], TypeError),
        ("stop_token_ids", [True], TypeError),
        ("stop_token_ids", 3, TypeError),
        ("include_stop_str_in_output", 1, TypeError),
        ("skip_special_tokens", None, TypeError),
        ("logprobs", -2, ValueError),
        ("logprobs", 1.0, TypeError),
    ],
)
def test_sampling_parameters(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=name) as raised:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    wrong = [*value.items()][0] if isinstance(value, dict) else (value,)
    assert any(repr(part) in str(raised.value) for part in wrong)


def test_an_unknown_sampling_parameter() -> None:
    with pytest.raises(TypeError, match="max_token"):
        SamplingParams(max_token=3)  # type: ignore[call-arg]


def test_sampling_parameters_cannot_be_changed_past_the_checks() -> None:
    params = SamplingParams()
    with pytest.raises(ValueError, match="max_tokens must be at least 1 or None, not -1"):
        params.max_tokens = -1  # type: ignore[misc]
    with pytest.raises(AttributeError, match="no field 'max_token'"):
        params.max_token = 3  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        del params.max_tokens
    assert params == SamplingParams()


# --- prompts ----------------------------------------------------------------------------------

BAD_PROMPTS: list[tuple[Any, type[Exception], str]] = [
    ([], ValueError, "is empty"),
    ([127], ValueError, "token id 127; the vocabulary is 0 to 126"),
    ([3, -1], ValueError, "token id -1"),
    ([2**70], ValueError, "far outside the vocabulary"),
    ([1] * 64, ValueError, "64 tokens, and max_model_len 64"),
    ([1] * 1000, ValueError, "1000 tokens, and max_model_len 64"),
    ([1.0, 2.0], TypeError, "list of token ids"),
    (["a"], TypeError, "list of token ids"),
    ([None], TypeError, "list of token ids"),
    ([[1, 2]], TypeError, "list of token ids"),
    (None, TypeError, "list of token ids"),
    (3, TypeError, "list of one list"),
    (b"abc", TypeError, "list of token ids"),
    ({"prompt": "x"}, ValueError, "no tokenizer"),
    ({}, TypeError, "list of token ids"),
    ({"prompt": None}, TypeError, "list of token ids"),
    ({"prompt": 3}, TypeError, "a string as its 'prompt', not 3"),
    ({"prompt_token_ids": "x"}, TypeError, "list of token ids"),
    ({"prompt_token_ids": [127]}, ValueError, "token id 127"),
    ({"prompt_token_ids": [3], "multi_modal_data": {}}, TypeError, "has 'multi_modal_data'"),
    ("text", ValueError, "no tokenizer"),
]


@pytest.mark.parametrize(
    "prompt, error, message", BAD_PROMPTS, ids=[str(p)[:12] for p, _, _ in BAD_PROMPTS]
)
def test_one_bad_prompt_rejects_the_call(
    llm: LLM, prompt: Any, error: type[Exception], message: str
) -> None:
    for index in (0, 2):
        prompts = [PROMPT, PROMPT, PROMPT]
        prompts[index] = prompt
        with pytest.raises(error, match=message) as raised:
            llm.generate(prompts, greedy(2), use_tqdm=False)
        assert f"prompt {index} " in str(raised.value)
        assert_idle(llm)
    with pytest.raises(error, match=message):
        llm.add_request(prompt, greedy(2))
    assert_idle(llm)


def test_a_flat_list_of_ids_says_what_to_pass(llm: LLM) -> None:
    with pytest.raises(TypeError, match="a list of one list"):
        llm.generate([1, 2, 3], greedy(2))  # type: ignore[list-item]


@pytest.mark.parametrize("prompts", [None, 3])
def test_prompts_that_are_no_list(llm: LLM, prompts: Any) -> None:
    with pytest.raises(TypeError, match="prompt"):
        llm.generate(prompts, greedy(2))


def test_prompts_and_parameters_of_different_lengths(llm: LLM) -> None:
    for number in (1, 3, 0):
        with pytest.raises(ValueError, match=f"{number} sampling_params for 2 prompts"):
            llm.generate([PROMPT, PROMPT], [greedy(2)] * number)


@pytest.mark.parametrize(
    "params", [3, "greedy", {"temperature": 0}, [greedy(2), None], [greedy(2), 1.0]]
)
def test_parameters_of_the_wrong_type(llm: LLM, params: Any) -> None:
    with pytest.raises(TypeError, match="sampling_params"):
        llm.generate([PROMPT, PROMPT], params)
    if not isinstance(params, list):
        with pytest.raises(TypeError, match="sampling_params"):
            llm.add_request(PROMPT, params)
    assert_idle(llm)


def test_numpy_ids_tuples_and_the_longest_prompt_are_accepted(
    llm: LLM, expected: list[int]
) -> None:
    prompts: list[Any] = [np.array(PROMPT), [np.int32(i) for i in PROMPT], tuple(PROMPT), [1] * 63]
    outputs = llm.generate(prompts, greedy(8), use_tqdm=False)
    assert [output["token_ids"] for output in outputs[:3]] == [expected] * 3
    assert len(outputs[3]["token_ids"]) == 1 and outputs[3]["finish_reason"] == "length"
    assert all(type(token) is int for output in outputs for token in output["token_ids"])


def test_generate_beside_unfinished_requests(llm: LLM) -> None:
    llm.add_request(PROMPT, greedy(2))
    with pytest.raises(RuntimeError, match="add_request"):
        llm.generate([PROMPT], greedy(2))
    while not llm.is_finished():
        llm.step()


# --- what ends a call early -------------------------------------------------------------------


@pytest.fixture(params=[0, 1], ids=["depth-0", "depth-1"])
def deep(request: pytest.FixtureRequest, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The shared engine, reading tokens at once or, as on a GPU, one step late."""
    monkeypatch.setattr(llm, "_max_pending", request.param)
    return llm


def owner(llm: LLM, name: str) -> Any:
    """The object on which a part of a step can be replaced."""
    owners = {"launch": llm.model_runner, "wait": PendingTokens}
    return owners.get(name, Scheduler)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("where", ["launch", "wait", "schedule", "postprocess"])
def test_an_interrupt_leaves_the_engine_empty_and_usable(
    deep: LLM, error: type[BaseException], where: str, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(0, [20, 30, 5])
    target = owner(deep, where)
    original: Callable[..., Any] = getattr(target, where)
    calls = 0

    def interrupted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4 and not done:
            raise error("stop")
        result = original(*args)  # the work is half accounted for
        if calls == 4:
            raise error("stop")
        return result

    monkeypatch.setattr(target, where, interrupted)
    with pytest.raises(error, match="stop"):
        deep.generate(prompts, greedy(20), use_tqdm=False)
    assert calls == 4
    assert_idle(deep)
    assert deep.step() == ([], 0)
    outputs = deep.generate([PROMPT], greedy(3), use_tqdm=False)
    assert len(outputs) == 1 and len(outputs[0]["token_ids"]) == 3


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_an_interrupted_step_leaves_the_engine_empty(
    deep: LLM, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep.add_request(PROMPT, greedy(20))
    deep.add_request(PROMPT[::-1], greedy(20))
    deep.step()
    assert len(deep._pending) == deep._max_pending and not deep.is_finished()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner(deep, where), where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            deep.step()
    assert_idle(deep)
    assert deep.step() == ([], 0)


@pytest.mark.parametrize("where", ["launch", "wait"])
def test_an_interrupted_engine_serves_nothing_half_written(
    deep: LLM, where: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prefix cache must not offer blocks that the interrupted step was to fill."""
    prompts = random_prompts(1, [50, 40])
    wanted = checkpoint.complete(prompts, 8)
    with monkeypatch.context() as patch:

        def interrupted(*args: Any) -> Any:
            deep.model_runner.kv_cache.fill_(float("nan"))  # type: ignore[union-attr]
            raise KeyboardInterrupt

        patch.setattr(owner(deep, where), where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            deep.generate(prompts, greedy(8), use_tqdm=False)
    assert_idle(deep)
    deep.model_runner.kv_cache.zero_()  # type: ignore[union-attr]
    assert generate_ids(deep, prompts, greedy(8)) == wanted


def test_reset_drops_what_is_queued_running_and_under_way(deep: LLM, expected: list[int]) -> None:
    for prompt in random_prompts(2, [20, 30, 5]):
        deep.add_request(prompt, greedy(20))
    for _ in range(3):
        deep.step()
    deep.add_request(PROMPT, greedy(20))
    deep.reset()
    assert_idle(deep)
    assert deep.step() == ([], 0)
    assert generate_ids(deep, [PROMPT], greedy(8)) == [expected]


def test_an_engine_after_exit(checkpoint: Checkpoint) -> None:
    engine = make_llm(checkpoint.path)
    engine.exit()
    engine.exit()
    with pytest.raises(RuntimeError, match="exit"):
        engine.generate([PROMPT], greedy(2), use_tqdm=False)
    with pytest.raises(RuntimeError, match="exit"):
        engine.step()


def test_exit_frees_the_memory_at_once(checkpoint: Checkpoint) -> None:
    """Not when Python's cycle collector comes round: the next engine may need the memory now."""
    engine = make_llm(checkpoint.path)
    engine.generate([PROMPT], greedy(2), use_tqdm=False)
    runner = engine.model_runner
    assert runner is not None
    held = [
        weakref.ref(runner.attention_layers[0].k_cache),
        weakref.ref(runner.model.lm_head.weight),
    ]
    del runner
    gc.disable()
    try:
        engine.exit()
        assert [reference() is None for reference in held] == [True, True]
    finally:
        gc.enable()


def test_an_engine_that_nobody_holds_is_collected(checkpoint: Checkpoint) -> None:
    engine = make_llm(checkpoint.path)
    engine.generate([PROMPT], greedy(2), use_tqdm=False)
    references = [
        weakref.ref(engine),
        weakref.ref(engine.model_runner),
        weakref.ref(engine.model_runner.model),
    ]
    del engine
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_two_engines_do_not_disturb_each_other(
    llm: LLM, checkpoint: Checkpoint, expected: list[int]
) -> None:
    other = make_llm(checkpoint.path, depth=1, kvcache_block_size=4)
    llm.add_request(PROMPT, greedy(8))
    other.add_request(PROMPT, greedy(8))
    results: list[dict[str, Any]] = []
    while not (llm.is_finished() and other.is_finished()):
        for engine in (llm, other):
            results += [result for _, result in engine.step()[0]]
    assert [result["token_ids"] for result in results] == [expected] * 2
    other.exit()


UNDER_O = """
import sys
from nanovllm import LLM, SamplingParams
assert False, "asserts are on"  # they are not, under -O
llm = LLM(sys.argv[1], device="cpu", max_model_len=64, kvcache_block_size=16, num_kvcache_blocks=8)
checks = [
    lambda: LLM(sys.argv[1], max_num_seqs=0),
    lambda: LLM(sys.argv[1], max_num_seqz=1),
    lambda: LLM(sys.argv[1], device="cpu", max_model_len=300, num_kvcache_blocks=1),
    lambda: LLM("/nowhere/at/all"),
    lambda: SamplingParams(temperature=-1),
    lambda: SamplingParams(max_tokens=0),
    lambda: llm.generate([[]]),
    lambda: llm.generate([[127]]),
    lambda: llm.generate([[1] * 64]),
    lambda: llm.generate([1, 2]),
    lambda: llm.generate([[1], [2]], [SamplingParams()]),
]
for number, check in enumerate(checks):
    try:
        check()
    except (TypeError, ValueError) as error:
        continue
    sys.exit(f"check {number} raised nothing")
greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
print(llm.generate([[1, 2, 3, 4, 5]], greedy, use_tqdm=False))
"""


def test_checks_are_not_asserts(checkpoint: Checkpoint, expected: list[int]) -> None:
    command = [sys.executable, "-O", "-c", UNDER_O, checkpoint.path]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(expected) in done.stdout


@pytest.mark.parametrize("prompt", [{3, 1, 2}, bytearray(b"ab"), {1: 2}, frozenset([1])], ids=repr)
def test_collections_without_an_order_are_no_prompts(llm: LLM, prompt: Any) -> None:
    with pytest.raises(TypeError, match="prompt 0 must be a string or a list of token ids"):
        llm.generate([prompt], use_tqdm=False)


def test_an_iterator_is_a_prompt(llm: LLM) -> None:
    [plain] = llm.generate([PROMPT], greedy(3), use_tqdm=False)
    [iterated] = llm.generate([iter(PROMPT)], greedy(3), use_tqdm=False)
    assert iterated == plain


def test_nothing_can_be_queued_after_exit(checkpoint: Checkpoint) -> None:
    engine = make_llm(checkpoint.path)
    engine.exit()
    with pytest.raises(RuntimeError, match="shut down"):
        engine.add_request(PROMPT)


@pytest.mark.parametrize("temperature", [10**400, 1e300, float("nan"), -0.1])
def test_temperatures_out_of_range(temperature: Any) -> None:
    with pytest.raises(ValueError, match="temperature must be at least 0 and at most 1000000"):
        SamplingParams(temperature=temperature)


def test_hf_config_must_be_one(checkpoint: Checkpoint) -> None:
    with pytest.raises(TypeError, match="hf_config must be a transformers configuration"):
        LLM(checkpoint.path, hf_config={})
