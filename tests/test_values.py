"""Values as callers have them: NumPy's numbers, None, False, lists that change afterwards."""

import copy
import dataclasses
import json
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkpoint, assert_idle, make_checkpoint, make_llm

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.params.frozen import FrozenDict, FrozenList

REPO = Path(__file__).resolve().parent.parent
DEFAULTS = SamplingParams()

# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=np.float64(0.5)),
        dict(temperature=np.float32(0.5), top_p=np.float16(0.5)),
        dict(temperature=np.int64(1)),
        dict(seed=np.int64(3), max_tokens=np.int32(5), n=np.uint8(2)),
        dict(seed=np.uint64(2**63 - 1)),
        dict(top_k=np.int16(-1), min_tokens=np.int8(3), logprobs=np.int64(2)),
        dict(presence_penalty=np.float32(-2), frequency_penalty=np.int8(2)),
        dict(ignore_eos=np.True_, skip_special_tokens=np.bool_(False)),
    ],
)
def test_numpy_numbers_are_numbers(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    assert params == SamplingParams(**{name: value.item() for name, value in options.items()})
    for name in options:  # what goes to other processes, and into results, is Python's own
        assert type(getattr(params, name)) in (bool, int, float)


def test_numpy_ids() -> None:
    params = SamplingParams(stop_token_ids=list(np.array([2, 3])), logit_bias={np.int64(2): 1})
    assert params.stop_token_ids == [2, 3] and params.logit_bias == {2: 1}
    assert type(params.stop_token_ids[0]) is int and type([*params.logit_bias][0]) is int  # type: ignore[index,misc]
    params = SamplingParams(logit_bias={2: np.float32(1.5)})
    assert json.dumps(dataclasses.asdict(params)["logit_bias"]) == '{"2": 1.5}'


@pytest.mark.parametrize(
    "options, error",
    [
        (dict(temperature=np.float32("nan")), ValueError),
        (dict(temperature=np.float64("inf")), ValueError),
        (dict(temperature=np.bool_(True)), TypeError),
        (dict(temperature=torch.tensor(0.5)), TypeError),
        (dict(temperature=np.array([0.5])), TypeError),
        (dict(top_p=np.float32(1.5)), ValueError),
        (dict(seed=np.int64(-1)), ValueError),
        (dict(seed=np.float64(3)), TypeError),
        (dict(seed=np.uint64(2**63)), ValueError),
        (dict(max_tokens=np.float32(8)), TypeError),
        (dict(max_tokens=np.str_("8")), TypeError),
        (dict(ignore_eos=np.int64(1)), TypeError),
        (dict(stop_token_ids=[np.float64(2)]), TypeError),
        (dict(stop_token_ids=[np.bool_(True)]), TypeError),
        (dict(logit_bias={np.int64(-2): 1}), ValueError),
        (dict(logit_bias={2: np.float32(101)}), ValueError),
        (dict(logit_bias={2: np.float32("nan")}), ValueError),
        (dict(logit_bias={np.float64(2): 1}), TypeError),
    ],
)
def test_numpy_numbers_are_checked(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(options))):
        SamplingParams(**options)


def test_numpy_numbers_as_options_of_the_engine(checkpoint: Checkpoint) -> None:
    config = Config(
        checkpoint.path,
        max_model_len=np.int64(64),
        seed=np.int32(4),
        eos=[np.int64(3), 4],  # type: ignore[arg-type]
        gpu_memory_utilization=np.float32(0.5),
        enforce_eager=np.True_,
        device="cpu",
    )
    assert (config.max_model_len, config.seed, config.eos) == (64, 4, (3, 4))
    assert config.enforce_eager is True and type(config.seed) is int is type(config.eos[0])  # type: ignore[index]
    assert Config(checkpoint.path, eos=np.int64(-1), device="cpu").eos == -1
    assert Config(checkpoint.path, eos=np.int64(7), device="cpu").eos == (7,)
    for eos in (np.array([1, 2]), {1, 2}, 1.0, -1.0, False, [True]):
        with pytest.raises(TypeError, match="an eos id must be an integer"):
            Config(checkpoint.path, eos=eos, device="cpu")  # type: ignore[arg-type]


# --- None, False and 0 ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [field.name for field in dataclasses.fields(SamplingParams) if field.type is not bool],
)
def test_none_is_the_default(name: str) -> None:
    expected = None if name == "max_tokens" else getattr(DEFAULTS, name)  # which has a meaning
    assert getattr(SamplingParams(**{name: None}), name) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        *("max_num_batched_tokens", "max_num_seqs", "max_model_len", "gpu_memory_utilization"),
        *("tensor_parallel_size", "kvcache_block_size", "num_kvcache_blocks", "seed", "eos"),
        "hf_config",
    ],
)
def test_none_is_the_default_of_the_engine(checkpoint: Checkpoint, name: str) -> None:
    options: dict[str, Any] = {"device": "cpu", name: None}
    ours, default = Config(checkpoint.path, **options), Config(checkpoint.path, device="cpu")
    if name == "hf_config":
        assert ours.hf_config.to_dict() == default.hf_config.to_dict()
    else:
        assert getattr(ours, name) == getattr(default, name)


def test_none_is_no_switch_and_no_name(checkpoint: Checkpoint) -> None:
    with pytest.raises(TypeError, match="ignore_eos must be True or False, not None"):
        SamplingParams(ignore_eos=None)  # type: ignore[arg-type]
    for name in ("device", "dtype", "load_format", "attention_backend"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            Config(checkpoint.path, **{name: None})


ARRAY, TENSOR = np.array([1, 2]), torch.tensor([1, 2])


@pytest.mark.parametrize("value", [0, 2, False, True, 0.0, {}, {1}, b"", ARRAY, TENSOR])
@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
def test_only_none_means_none(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name} must be") as error:
        SamplingParams(**{name: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [0, False, "", [], (), np.array([])])
def test_only_none_means_no_bias(value: Any) -> None:
    with pytest.raises(TypeError, match="logit_bias must be a dict"):
        SamplingParams(logit_bias=value)


def test_an_empty_string_is_no_list_of_ids() -> None:
    with pytest.raises(TypeError, match="stop_token_ids must be a list"):
        SamplingParams(stop_token_ids="")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.array(["cpu", "cuda"]), torch.device("cpu"), {}, 0])
def test_a_name_is_a_string(checkpoint: Checkpoint, value: Any) -> None:
    with pytest.raises(ValueError, match="device must be one of"):
        Config(checkpoint.path, device=value)


@pytest.mark.parametrize(
    "name, dtype",
    [("half", torch.float16), ("float", torch.float32), (torch.half, torch.float16)],
)
def test_names_of_dtypes(checkpoint: Checkpoint, name: Any, dtype: torch.dtype) -> None:
    assert Config(checkpoint.path, dtype=name, device="cpu").dtype == dtype


def test_logprobs_as_a_switch() -> None:
    assert SamplingParams(logprobs=True) == SamplingParams(logprobs=1)
    assert SamplingParams(logprobs=True).logprobs is not True
    assert SamplingParams(logprobs=False).logprobs is None


# --- what the caller keeps ------------------------------------------------------------------------


def test_stop_compares_as_the_list_that_was_passed() -> None:
    params = SamplingParams(stop=["x"], stop_token_ids=(3, 4))
    for same in (["x"], ("x",)):
        assert params.stop == same and same == params.stop
        assert not (params.stop != same or same != params.stop)
    for other in (["y"], ["x", "x"], ("y",), "x", None, []):
        assert params.stop != other and other != params.stop
    assert params.stop_token_ids == [3, 4] and repr(params.stop_token_ids) == "[3, 4]"
    assert SamplingParams(stop="x").stop == ["x"] and DEFAULTS.stop == [] == DEFAULTS.stop_token_ids
    assert hash(params) == hash(SamplingParams(stop=("x",), stop_token_ids=[3, 4]))
    assert isinstance(params.stop, FrozenList) and FrozenList([1]) != FrozenList([2])


def test_params_can_be_copied_pickled_and_replaced() -> None:
    params = SamplingParams(stop=["x"], stop_token_ids=[3], logit_bias={2: 1.0}, logprobs=True)
    for other in (
        copy.copy(params),
        copy.deepcopy(params),
        pickle.loads(pickle.dumps(params)),
        dataclasses.replace(params),
        SamplingParams(**json.loads(json.dumps({"stop": params.stop})), **rest_of(params)),
    ):
        assert other == params and other.stop == ["x"] and other.logit_bias == {2: 1.0}
        with pytest.raises(TypeError, match="dataclasses.replace"):
            other.logit_bias[2] = 1e9


def rest_of(params: SamplingParams) -> dict[str, Any]:
    return {f.name: getattr(params, f.name) for f in dataclasses.fields(params) if f.name != "stop"}


def test_what_changes_afterwards_changes_no_request(checkpoint: Checkpoint) -> None:
    bias: dict[int, float] = {}
    stop_token_ids: list[int] = []
    params = []
    for token_id in (11, 22, 33):  # the same containers, filled anew for each request
        bias.clear()
        bias[token_id] = 100.0
        stop_token_ids[:] = [token_id]
        options: dict[str, Any] = dict(logit_bias=bias, stop_token_ids=stop_token_ids)
        params.append(SamplingParams(temperature=0, max_tokens=4, **options))
    bias[33] = 1e9
    llm = make_llm(checkpoint.path)
    outputs = llm.generate([[1], [2], [3]], params, use_tqdm=False)
    assert [output["token_ids"] for output in outputs] == [[11], [22], [33]]
    llm.exit()


@pytest.mark.parametrize("change", ["clear()", "update({1: 9})", "pop(2)", "setdefault(1, 9)"])
def test_a_checked_bias_cannot_be_changed(change: str) -> None:
    bias: Any = SamplingParams(logit_bias={2: 1.0}).logit_bias
    with pytest.raises(TypeError, match="cannot be changed"):
        eval(f"bias.{change}", {"bias": bias})
    with pytest.raises(TypeError, match="cannot be changed"):
        del bias[2]
    with pytest.raises(TypeError, match="cannot be changed"):
        bias |= {1: 9}
    assert bias == {2: 1.0} and isinstance(bias, FrozenDict)


def test_the_callers_configuration_is_not_the_engines(checkpoint: Checkpoint) -> None:
    hf_config = copy.deepcopy(checkpoint.model.config)
    config = Config(checkpoint.path, hf_config=hf_config, device="cpu")
    hf_config.vocab_size = 3
    assert config.hf_config.vocab_size == checkpoint.model.config.vocab_size


# --- more than a tiny vocabulary has --------------------------------------------------------------


@pytest.mark.parametrize("logprobs", [0, 11, 12, 13, 20])
def test_logprobs_of_a_tiny_vocabulary(tmp_path_factory: Any, logprobs: int) -> None:
    path = tmp_path_factory.mktemp("tiny")
    llm = make_llm(make_checkpoint(path, vocab_size=12).path)
    plain = SamplingParams(max_tokens=3, seed=1)
    asked = dataclasses.replace(plain, logprobs=logprobs, top_k=2**24)
    alone = llm.generate([[1, 2]], plain, use_tqdm=False)[0]
    first, second = llm.generate([[1, 2], [1, 2]], [plain, asked], use_tqdm=False)
    assert first["token_ids"] == alone["token_ids"] == second["token_ids"]
    assert second["logprobs"] is not None
    for token_id, values in zip(second["token_ids"], second["logprobs"], strict=True):
        assert next(iter(values)) == token_id
        assert min(logprobs, 12) <= len(values) <= min(logprobs + 1, 12)
        if logprobs >= 12:
            assert torch.tensor([*values.values()]).exp().sum().item() == pytest.approx(1)
    assert_idle(llm)
    llm.exit()


# --- where ranks cannot start ---------------------------------------------------------------------


SCRIPT = f"""
import multiprocessing, sys
sys.path.insert(0, {str(REPO)!r})
from nanovllm import DEMO_MODEL, LLM
def start_ranks(_):
    try:
        LLM(DEMO_MODEL, device="cpu", tensor_parallel_size=2)
    except RuntimeError as error:
        return str(error)
print(start_ranks(0))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map(start_ranks, [0])[0])
"""
STDIN = "script on stdin is none); save it as a file, or pass tensor_parallel_size=1"
POOL = "multiprocessing.Pool; use concurrent.futures.ProcessPoolExecutor, or pass tensor"


def test_ranks_of_a_script_on_stdin_and_in_a_pool() -> None:
    run = subprocess.run([sys.executable], input=SCRIPT, capture_output=True, text=True)
    of_script, of_pool = run.stdout.splitlines()
    assert STDIN in of_script and POOL in of_pool


def test_ranks_are_refused_before_anything_starts(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/no/such/script.py", raising=False)
    with pytest.raises(RuntimeError, match="no file '/no/such/script.py'"):
        make_llm(checkpoint.path, tensor_parallel_size=2)
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="cannot start in a daemonic process"):
        make_llm(checkpoint.path, tensor_parallel_size=2)
    make_llm(checkpoint.path).exit()  # one rank is no process of its own
    assert not multiprocessing.active_children() and not torch.distributed.is_initialized()
