"""Who gets a KV cache in FP8, and which scales of a checkpoint are taken for it; nothing runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Checkpoint, make_checkpoint, make_llm
from safetensors.torch import load_file, save_file

from nanovllm.checkpoints.checkpoint import find_tensors
from nanovllm.checkpoints.kv_scales import FP8, KVScales, cache_dtype, read_scales
from nanovllm.config import Config
from nanovllm.kernels import attention_backend
from nanovllm.kernels.attention_backend import HOPPER, TORCH, select_backend
from nanovllm.kernels.attention_plan import AttentionOptions, PrefillPlan

SCHEME = dict(type="float", num_bits=8, strategy="tensor", symmetric=True, dynamic=False)


def configured(**quantization: Any) -> Any:
    return SimpleNamespace(quantization_config=quantization or None)


# --- the dtype ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked_for, said, expected",
    [
        ("auto", {}, torch.bfloat16),
        ("bfloat16", {}, torch.bfloat16),
        ("fp8", {}, FP8),
        ("fp8_e4m3", {}, FP8),
        ("auto", dict(quant_method="fp8"), torch.bfloat16),
        ("auto", dict(kv_cache_scheme=None), torch.bfloat16),
        ("auto", dict(kv_cache_scheme=SCHEME), FP8),
        ("auto", dict(kv_cache_scheme=dict(num_bits=8, type="float", dynamic=False)), FP8),
        ("auto", dict(kv_cache_scheme="static"), FP8),
        ("auto", dict(kv_cache_quant_algo="FP8"), FP8),
        ("auto", dict(quantization=dict(kv_cache_quant_algo="FP8")), FP8),
        ("auto", dict(quantization=dict(kv_cache_quant_algo=None)), torch.bfloat16),
        # What is asked for counts before what the checkpoint says.
        ("bfloat16", dict(kv_cache_scheme=SCHEME), torch.bfloat16),
        ("bfloat16", dict(kv_cache_scheme={**SCHEME, "num_bits": 4}), torch.bfloat16),
        ("fp8", dict(kv_cache_quant_algo="NVFP4"), FP8),
    ],
)
def test_the_dtype_of_the_cache(asked_for: str, said: Any, expected: torch.dtype) -> None:
    assert cache_dtype(asked_for, torch.bfloat16, configured(**said)) == expected


@pytest.mark.parametrize(
    "asked_for, said, message",
    [
        ("float16", {}, "'float16' is not supported for a model that runs in bfloat16"),
        ("auto", dict(kv_cache_scheme={**SCHEME, "type": "int"}), r"{'type': 'int'}.*'bfloat16'"),
        ("auto", dict(kv_cache_scheme={**SCHEME, "strategy": "attn_head"}), "attn_head"),
        ("auto", dict(kv_cache_scheme={**SCHEME, "symmetric": False}), "'symmetric': False"),
        ("auto", dict(kv_cache_scheme="int8"), "kv_cache_scheme 'int8' is not supported"),
        ("auto", dict(kv_cache_quant_algo="NVFP4"), "'NVFP4' is not supported, only 'FP8'"),
    ],
)
def test_other_caches_are_refused_by_name(asked_for: str, said: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_dtype(asked_for, torch.bfloat16, configured(**said))


def test_as_an_option(checkpoint: Checkpoint) -> None:
    for name in ("fp8_e5m2", "int8", "nvfp4", FP8, 8):
        with pytest.raises(ValueError, match="kv_cache_dtype must be one of auto, fp8, fp8_e4m3"):
            Config(checkpoint.path, device="cpu", kv_cache_dtype=name)
    for unset in ({}, dict(kv_cache_dtype=None), dict(calculate_kv_scales=False)):
        config = Config.from_options(checkpoint.path, dict(device="cpu", **unset))
        assert config.kv_cache_dtype == config.dtype == torch.float32
    with pytest.raises(TypeError, match="calculate_kv_scales=.*the scales are the checkpoint"):
        Config.from_options(checkpoint.path, dict(device="cpu", calculate_kv_scales=True))


# --- the scales -----------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_checkpoint(tmp_path, hidden_size=16, intermediate_size=16)
    return tmp_path


def add(path: Path, **tensors: Any) -> None:
    """Give a checkpoint tensors: `k_scale_0` is that of layer 0."""
    contents = load_file(path / "model.safetensors")
    for name, value in tensors.items():
        name, _, layer = name.rpartition("_")
        tensor = torch.tensor(value)
        contents[f"model.layers.{layer}.self_attn.{name.replace('__', '.')}"] = tensor
    save_file(contents, path / "model.safetensors", metadata={"format": "pt"})


def found(path: Path) -> list[KVScales]:
    return read_scales(find_tensors(path), 2)


def test_no_scales(saved: Path) -> None:
    assert found(saved) == []
    llm = make_llm(str(saved), kv_cache_dtype="fp8")
    assert llm.model_runner is not None
    for layer in llm.model_runner.attention_layers:
        assert layer.options.kv_scales == KVScales(1.0, 1.0)
    llm.exit()


def test_scales_of_any_shape_of_one_number(saved: Path) -> None:
    add(saved, k_scale_0=0.5, v_scale_0=[0.25], k_proj__k_scale_1=[[2.0]], v_scale_1=4.0)
    add(saved, q_scale_0=3.0, q_proj__output_scale_1=3.0)  # nothing is done in FP8 with queries
    assert found(saved) == [KVScales(0.5, 0.25), KVScales(2.0, 4.0)]


def test_one_scale_for_both(saved: Path) -> None:
    add(saved, kv_scale_0=0.5, kv_scale_1=0.25, v_scale_1=0.25)
    assert found(saved) == [KVScales(0.5, 0.5), KVScales(0.25, 0.25)]


ALL = dict(k_scale_0=1.0, k_scale_1=1.0, v_scale_0=1.0, v_scale_1=1.0)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(k_scale_0=[1.0, 2.0]), r"layers.0.self_attn.k_scale' has shape \[2\]"),
        (dict(v_scale_1=0.0), "layers.1.self_attn.v_scale' is 0.0, and a scale must be above 0"),
        (dict(v_scale_1=-1.0), "is -1.0"),
        (dict(k_scale_1=float("nan")), "is nan"),
        (dict(k_scale_1=float("inf")), "is inf"),
        (dict(k_proj__k_scale_1=2.0), "same scale under another name"),
    ],
)
def test_wrong_scales_are_refused_before_weights_are_loaded(
    saved: Path, changed: dict[str, Any], message: str
) -> None:
    add(saved, **{**ALL, **changed})
    with pytest.raises(ValueError, match=message):
        make_llm(str(saved), kv_cache_dtype="fp8")


@pytest.mark.parametrize("missing", ALL)
def test_missing_scales_are_refused(saved: Path, missing: str) -> None:
    add(saved, **{name: 1.0 for name in ALL if name != missing})
    kind, _, layer = missing.partition("_scale_")
    with pytest.raises(ValueError, match=f"none of {kind.upper()} in layer {layer} .*add them"):
        make_llm(str(saved), kv_cache_dtype="fp8")


def test_only_scales_of_attention_are_let_through(saved: Path) -> None:
    add(saved, o_proj__weight_scale_0=1.0)
    with pytest.raises(ValueError, match="1 unknown: model.layers.0.self_attn.o_proj.weight_scale"):
        make_llm(str(saved))


# --- who attends ----------------------------------------------------------------------------------


def test_the_scale_of_k_is_part_of_that_of_the_scores() -> None:
    options = AttentionOptions(scale=0.25, window=7)
    assert options.v_scale is None
    scaled = options.with_fp8_cache(KVScales(0.5, 3.0))
    assert scaled == AttentionOptions(scale=0.125, window=7, kv_scales=KVScales(0.5, 3.0))
    assert scaled.v_scale == 3.0


def test_flash_attn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = "nanovllm.kernels.flash_attention"
    monkeypatch.setattr(f"{flash}.flash_attention_version", lambda: "4")
    monkeypatch.setattr(attention_backend, "HAS_TRITON", True)
    for name in ("flash_attn", "flash_attn+triton"):
        with pytest.raises(ValueError, match="does not read a KV cache in torch.float8_e4m3fn"):
            select_backend(name, "cuda", 256, 128, torch.bfloat16, FP8)


def test_gpus_without_fp8_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backend, "HAS_TRITON", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    with pytest.raises(ValueError, match="from Ada or Hopper on, and this is a A100"):
        select_backend("triton", "cuda", 256, 128, torch.bfloat16, FP8)
    assert select_backend("torch", "cuda", 256, 128, torch.bfloat16, FP8) is TORCH
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    select_backend("triton", "cuda", 256, 128, torch.bfloat16, FP8)


@pytest.mark.parametrize("is_cached", [False, True])
def test_hopper_prefill_reads_no_fp8(is_cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """But it attends to new keys, which are rounded and in 16 bits."""
    calls = []
    monkeypatch.setattr(
        attention_backend, "hopper_prefill", lambda *args, **named: calls.append(named)
    )
    fallback = HOPPER.__class__("test", *(lambda *args, **named: calls.append("triton"),) * 3)
    ones = torch.ones(2, dtype=torch.int32)
    tables = ones[None] if is_cached else None
    plan = PrefillPlan(ones, ones, 1, 1, tables, tiles=ones)
    q = torch.zeros(1, 2, 8, dtype=torch.bfloat16)
    cache = torch.zeros(1, 16, 2, 8).to(FP8)
    options = AttentionOptions(scale=1.0).with_fp8_cache(KVScales(0.5, 3.0))
    fallback.attend(q, q, q, cache, cache, plan, options)
    assert calls == ["triton"] if is_cached else calls == [dict(scale=0.5, v_scale=3.0)]
