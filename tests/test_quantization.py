"""What all quantised formats share: which layers of a checkpoint they are for, what is refused, new
weights and sleep.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import generate_ids, greedy, make_checkpoint, make_llm, random_prompts
from quantized import (
    QWEN3_MOE,
    WEIGHTS,
    Quantized,
    block_config,
    block_fp8,
    quantize_checkpoint,
    tensor_fp8,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import LLM
from nanovllm.quantization.read_scheme import check_device, read_scheme
from nanovllm.quantization.scheme import ModuleNames, Scheme, as_names
from nanovllm.quantization.unquantized import UNQUANTIZED

PROMPTS = random_prompts(3, [40, 3, 33])
Q = "model.layers.0.self_attn.q_proj"


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry, name, is_meant",
    [
        ("lm_head", "lm_head", True),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate", True),
        ("mlp.gate", "model.layers.7.mlp.gate", True),
        ("mlp.gate", "model.layers.7.mlp.gate_proj", False),  # only begins alike
        ("gate_proj", "model.layers.7.mlp.gate_proj", True),
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.11.mlp.up_proj", False),
        ("model.layers.1.", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.", "model.layers.11.mlp.up_proj", False),
        (".mlp.gate.", "model.layers.7.mlp.gate", True),
        ("re:.*mlp.gate$", "model.layers.7.mlp.gate", True),
        ("re:.*mlp.gate$", "model.layers.7.mlp.gate_proj", False),
        (r"re:model\.layers\.[01]\.", "model.layers.1.mlp.up_proj", True),
        ("re:layers", "model.layers.1.mlp.up_proj", False),  # not its beginning
        (".*self_attn", "model.layers.1.self_attn.o_proj", True),  # as transformers has them
        ("Linear", "model.layers.1.self_attn.o_proj", True),
        ("Embedding", "model.layers.1.self_attn.o_proj", False),
    ],
)
def test_names_of_modules(entry: str, name: str, is_meant: bool) -> None:
    assert ModuleNames((entry,)).include(name) is is_meant


def scheme_without(*ignored: str) -> Scheme:
    config = block_config(modules_to_not_convert=list(ignored))
    scheme = read_scheme(SimpleNamespace(quantization_config=config), None)
    assert scheme is not None
    return scheme


def test_a_text_model_inside_of_another() -> None:
    for entry in (f"language_model.{Q}", "model.language_model.layers.0.self_attn.q_proj", Q):
        assert scheme_without(entry).format_of(Q) is UNQUANTIZED
    assert scheme_without("vision_tower").format_of(Q) is not UNQUANTIZED


def test_what_is_one_matrix_here_is_quantised_alike() -> None:
    layer = "model.layers.0.self_attn.qkv_proj"
    modules = [f"model.layers.0.self_attn.{each}_proj" for each in "qkv"]
    assert scheme_without("lm_head").choose(layer, modules) is not UNQUANTIZED
    assert scheme_without(*modules).choose(layer, modules) is UNQUANTIZED
    assert scheme_without("re:.*qkv_proj").choose(layer, modules) is UNQUANTIZED  # by our name
    message = rf"{modules[0]} in the format FP8Blocks\(.*and {modules[1]} in the format 16 bits"
    with pytest.raises(ValueError, match=message):
        scheme_without(modules[1]).choose(layer, modules)


def test_layers_that_are_left_out_stay_as_they_are(tmp_path: Path) -> None:
    ignored = ["lm_head", "model.layers.0", "re:.*o_proj$"]

    def quantize(name: str, weight: Tensor) -> Quantized | None:
        is_left_out = name.startswith("model.layers.0.") or name.endswith("o_proj")
        return None if is_left_out else block_fp8()(name, weight)

    config = block_config(modules_to_not_convert=ignored)
    checkpoint = quantize_checkpoint(tmp_path, quantize, config)
    llm = make_llm(checkpoint.path)
    assert generate_ids(llm, PROMPTS, greedy(8)) == checkpoint.complete(PROMPTS, 8)
    llm.exit()


# --- what is refused ------------------------------------------------------------------------------


def group(**weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = dict(targets=["Linear"], weights=dict(num_bits=8, type="float", strategy="channel"))
    for name in ("input_activations", "output_activations", "targets"):
        if name in weights:
            group[name] = weights.pop(name)
    layout = weights.pop("format", "float-quantized")
    group["weights"] = {**group["weights"], **weights}  # type: ignore[dict-item]
    return dict(quant_method="compressed-tensors", format=layout, config_groups={"g": group})


INT8 = dict(num_bits=8, type="int")
REFUSED: list[tuple[dict[str, Any] | None, str | None, str]] = [
    (dict(quant_method="bitsandbytes"), None, "'bitsandbytes' is not supported; supported: fp8"),
    (dict(quant_method="mxfp4"), None, "'mxfp4'"),
    (dict(quant_method="gguf"), "auto", "'gguf'"),
    (dict(bits=4), None, "quant_method ''"),
    (dict(quant_method="fp8", fmt="e5m2"), None, "fmt 'e5m2'"),
    (dict(quant_method="fp8", activation_scheme="block"), None, "activation_scheme 'block'"),
    (dict(quant_method="fp8", weight_block_size=[128]), None, r"a block of \[128\]"),
    (dict(quant_method="fp8", weight_block_size=[0, 128]), None, r"a block of \[0, 128\]"),
    (dict(quant_method="fp8", modules_to_not_convert="lm_head"), None, "in a list, not by 'lm_h"),
    (
        group(format="nvfp4-pack-quantized", num_bits=4),
        None,
        "format 'nvfp4-pack-quantized of 4",
    ),
    (group(format="int-quantized", **INT8), None, "format 'int-quantized of 8-bit int'"),
    (group(format="naive-quantized", **INT8), None, "8-bit int"),
    (group(strategy="group"), None, "strategy 'group'"),
    (group(symmetric=False), None, "symmetric False"),
    (group(dynamic=True), None, "dynamic True"),
    (group(strategy="block", block_structure=None), None, "a block of None"),
    (group(input_activations=INT8), None, "input_activations"),
    (group(output_activations=INT8), None, "output_activations"),
    (group(targets="Linear"), None, "in a list, not by 'Linear'"),
    (dict(group(), config_groups={}), None, "config_groups {}"),
    (dict(group(), config_groups=[1]), None, r"config_groups \[1\]"),
    (dict(group(), config_groups={"g": "W8A8"}), None, "a config group 'W8A8'"),
    (group(input_activations="W8A8"), None, "input_activations 'W8A8'"),
    (dict(group(), config_groups={"g": dict(targets=["Linear"])}), None, "with weights None"),
    (dict(group(), sparsity_config=dict(format="sparse-24-bitmask")), None, "sparsity_config"),
    (dict(group(), transform_config=dict(config_groups={"R1": {}})), None, "transform_config"),
    (group(), "fp8", "quantization='fp8', and the checkpoint's quant_method is 'compressed-t"),
    (block_config(), "awq", "quantization='awq', and the checkpoint's quant_method is 'fp8'"),
    (None, "compressed-tensors", "the checkpoint is not quantised.*pass quantization='fp8'"),
    (None, "int9", "quantization='int9'"),
]


@pytest.mark.parametrize("config, option, message", REFUSED)
def test_what_is_not_supported(
    config: dict[str, Any] | None, option: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_scheme(SimpleNamespace(quantization_config=config), option)


def test_an_older_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    version = "nanovllm.quantization.read_scheme.triton_version"
    monkeypatch.setattr(version, lambda: (3, 10))
    check_device("cuda")
    monkeypatch.setattr(version, lambda: (3, 4))
    check_device("cpu")
    with pytest.raises(ValueError, match=r"Triton 3\.5, .* and this is 3\.4"):
        check_device("cuda")


def test_wrong_regular_expressions_and_types() -> None:
    with pytest.raises(ValueError, match=r"'re:\(', which is no regular expression"):
        as_names(["re:("]).include("lm_head")
    with pytest.raises(TypeError, match="quantization must be a string or None, not 8"):
        read_scheme(SimpleNamespace(), 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantization_config must be a dict, not 'fp8'"):
        read_scheme(SimpleNamespace(quantization_config="fp8"), None)


def test_a_scheme_of_the_kv_cache_alone() -> None:
    config = dict(group(), config_groups={}, kv_cache_scheme=dict(num_bits=8, type="float"))
    scheme = read_scheme(SimpleNamespace(quantization_config=config), None)
    assert scheme is not None and scheme.format_of(Q) is UNQUANTIZED


@pytest.mark.parametrize("option", [None, "auto", "fp8"])
def test_names_that_ask_for_what_is_there(option: str | None) -> None:
    scheme = read_scheme(SimpleNamespace(quantization_config=block_config()), option)
    assert scheme is not None and scheme.name == "fp8"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a scale for each block."""
    path = tmp_path_factory.mktemp("blocks")
    quantize_checkpoint(path, block_fp8((32, 16)), block_config((32, 16)))
    return path


SCALE = f"{Q}.weight_scale_inv"
DAMAGES: list[tuple[str, Any, str]] = [
    (SCALE, None, f"1 missing: {SCALE}"),
    (f"{Q}.weight_scale", torch.ones(1), f"1 unknown: {Q}.weight_scale"),
    (SCALE, torch.ones(2, 4), rf"'{SCALE}' has shape \[2, 4\].*asks for \[2, 3\]"),
    (SCALE, torch.full((2, 3), float("nan")), f"'{SCALE}' holds a scale that is NaN"),
    (SCALE, torch.full((2, 3), float("inf")), f"'{SCALE}' holds a scale that is NaN or infinite"),
    (SCALE, torch.full((2, 3), -1.0), f"'{SCALE}' holds scales from -1 to -1"),
    (SCALE, torch.zeros(2, 3), f"'{SCALE}' holds scales from 0 to 0"),
    (SCALE, torch.ones(2, 3, dtype=torch.int32), f"'{SCALE}' is I32 and not F32, BF16, F16"),
    (f"{Q}.weight", torch.zeros(64, 48), f"'{Q}.weight' is F32 and not F8_E4M3"),
    (f"{Q}.weight", torch.zeros(64, 32).to(torch.float8_e4m3fn), "has shape"),
    (f"{Q}.weight", torch.zeros(64, 48).to(torch.float8_e5m2), "is F8_E5M2 and not F8_E4M3"),
    ("lm_head.weight", torch.zeros(127, 48).to(torch.float8_e4m3fn), "is F8_E4M3 and not BF16"),
    (f"{Q}.input_scale", torch.ones(3), "input_scale' has shape"),
]


@pytest.mark.parametrize("name, tensor, message", DAMAGES)
def test_damaged_tensors(
    name: str, tensor: Tensor | None, message: str, stored: Path, tmp_path: Path
) -> None:
    tensors = load_file(stored / WEIGHTS)
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_bytes((stored / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        make_llm(str(tmp_path))


def test_new_tensors_with_wrong_values_are_named(stored: Path) -> None:
    llm = make_llm(str(stored))
    with pytest.raises(ValueError, match=f"tensor '{SCALE}' holds scales from 0 to 0"):
        llm.load_weights({SCALE: torch.zeros(2, 3)})
    llm.exit()


# --- new weights, and sleep -----------------------------------------------------------------------


@pytest.fixture(params=["online", "online-moe", "tensor"])
def changing(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[LLM, Any, list[list[int]]]]:
    """An engine, new weights for it, and the tokens that those give."""
    if request.param.startswith("online"):
        options = dict(quantization="fp8")
        model = {} if request.param == "online" else QWEN3_MOE
        old = make_checkpoint(tmp_path / "old", **model)
        new = make_checkpoint(tmp_path / "new", **model, seed=5)
        weights: Any = new.model.state_dict()  # of experts, in transformers 5, two tensors a layer
    else:
        options = {}
        config = dict(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"])
        (tmp_path / "old").mkdir()
        (tmp_path / "new").mkdir()
        old = quantize_checkpoint(tmp_path / "old", tensor_fp8, config)
        new = quantize_checkpoint(tmp_path / "new", tensor_fp8, config, seed=5)
        weights = new.path
    fresh = make_llm(new.path, **options)
    expected = generate_ids(fresh, PROMPTS, greedy(8))
    fresh.exit()
    llm = make_llm(old.path, **options)
    yield llm, weights, expected
    llm.exit()


def test_new_weights_and_sleep(changing: tuple[LLM, Any, list[list[int]]]) -> None:
    llm, weights, expected = changing
    assert llm.model_runner is not None
    model = llm.model_runner.model
    before = generate_ids(llm, PROMPTS, greedy(8))
    assert before != expected
    llm.sleep(1)
    llm.wake_up()
    assert generate_ids(llm, PROMPTS, greedy(8)) == before
    addresses = [param.data_ptr() for param in model.parameters()]
    llm.load_weights(weights)
    assert [param.data_ptr() for param in model.parameters()] == addresses
    assert generate_ids(llm, PROMPTS, greedy(8)) == expected
    llm.sleep(2)
    assert all(getattr(module, "dequantized", None) is None for module in model.modules())
    llm.wake_up()
    with pytest.raises(RuntimeError, match="tensors have not been loaded since"):
        llm.generate(PROMPTS)
    llm.load_weights(weights)
    assert generate_ids(llm, PROMPTS, greedy(8)) == expected


def test_weights_of_another_kind_are_refused(changing: tuple[LLM, Any, list[list[int]]]) -> None:
    llm, _, _ = changing
    before = generate_ids(llm, PROMPTS, greedy(4))
    with pytest.raises(ValueError, match=f"'{Q}.weight' is torch.(int8|int64) and not torch."):
        llm.load_weights({f"{Q}.weight": torch.zeros(64, 48, dtype=torch.int64)})
    with pytest.raises(ValueError, match=f"'{Q}.weight_scale' has shape|no tensor"):
        llm.load_weights({f"{Q}.weight_scale": torch.ones(3)})
    assert generate_ids(llm, PROMPTS, greedy(4)) == before
