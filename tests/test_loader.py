"""Checkpoints as they come: files of every layout, spoilt ones, other dtypes, and none at all."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import (
    QWEN2,
    Checkpoint,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
PROMPTS = random_prompts(0, [5, 40, 17])
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[list[int]]:
    return checkpoint.complete(PROMPTS, 8)


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint.path, tmp_path / "copy")
    return tmp_path / "copy"


def outputs_of(path: Path) -> list[list[int]]:
    llm = make_llm(str(path))
    try:
        return generate_ids(llm, PROMPTS, greedy(8))
    finally:
        llm.exit()


def change(path: Path, edit: Callable[[Tensors], None]) -> None:
    """Rewrite the weights of a one-file checkpoint."""
    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def split(path: Path, num_files: int) -> dict[str, str]:
    """Spread the tensors of a one-file checkpoint; which tensor is in which file."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    files = [f"model-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    names = sorted(tensors, key=lambda name: name[::-1])  # so that q, k and v of a layer are apart
    weight_map = {name: files[i % num_files] for i, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, path / file)
    return weight_map


# --- layouts --------------------------------------------------------------------------------------


def test_one_file(copy: Path, expected: list[list[int]]) -> None:
    assert sorted(file.name for file in copy.glob("*.safetensors*")) == [WEIGHTS]
    assert outputs_of(copy) == expected


def test_many_files_without_an_index(copy: Path, expected: list[list[int]]) -> None:
    split(copy, 3)
    assert outputs_of(copy) == expected


def test_many_files_with_an_index(copy: Path, expected: list[list[int]]) -> None:
    weight_map = split(copy, 4)
    (copy / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # What the index does not name is not read.
    save_file({"model.norm.weight": torch.zeros(48)}, copy / "zzz-other.safetensors")
    assert outputs_of(copy) == expected


def test_a_consolidated_copy_beside_the_file_is_not_read(
    copy: Path, expected: list[list[int]]
) -> None:
    save_file({"some.other.name": torch.zeros(3)}, copy / "consolidated.safetensors")
    assert outputs_of(copy) == expected


# --- spoilt checkpoints ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(copy: Path, name: str) -> None:
    change(copy, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        make_llm(str(copy))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "x"]
)
def test_an_extra_tensor_is_named(copy: Path, name: str) -> None:
    change(copy, lambda tensors: tensors.update({name: torch.zeros(64)}))
    with pytest.raises(ValueError, match=f"1 unknown: {name}"):
        make_llm(str(copy))


@pytest.mark.parametrize(
    "name, shape, wanted",
    [
        ("model.embed_tokens.weight", (128, 48), r"\[128, 48\].*\[127, 48\]"),
        ("lm_head.weight", (127, 47), r"\[127, 47\].*\[127, 48\]"),
        ("model.norm.weight", (49,), r"\[49\].*\[48\]"),
        ("model.layers.0.self_attn.q_proj.weight", (32, 48), r"\[32, 48\].*\[64, 48\]"),
        ("model.layers.0.self_attn.v_proj.weight", (64, 48), r"\[64, 48\].*\[32, 48\]"),
        ("model.layers.0.self_attn.o_proj.weight", (48, 48), r"\[48, 48\].*\[48, 64\]"),
        ("model.layers.1.mlp.gate_proj.weight", (160, 48), r"\[160, 48\].*\[80, 48\]"),
        ("model.layers.1.mlp.down_proj.weight", (80, 48), r"\[80, 48\].*\[48, 80\]"),
        ("model.layers.1.self_attn.k_norm.weight", (48,), r"\[48\].*\[16\]"),
        ("model.layers.1.self_attn.k_norm.weight", (1, 16), r"\[1, 16\].*\[16\]"),
        ("model.norm.weight", (1,), r"\[1\].*\[48\]"),  # which would broadcast
    ],
)
def test_a_wrong_shape_names_the_tensor_and_both_shapes(
    copy: Path, name: str, shape: tuple[int, ...], wanted: str
) -> None:
    change(copy, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    with pytest.raises(ValueError, match=f"{name}.*{wanted}"):
        make_llm(str(copy))


def test_no_weights_at_all(copy: Path) -> None:
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="lacks weight files.*load_format='dummy'"):
        make_llm(str(copy))


@pytest.mark.parametrize("contents", [b"", b"not safetensors", b"\xff" * 100])
def test_a_corrupt_file_is_named(copy: Path, contents: bytes) -> None:
    (copy / WEIGHTS).write_bytes(contents)
    with pytest.raises(ValueError, match=f"cannot read the weights in .*{WEIGHTS}"):
        make_llm(str(copy))


def test_a_file_cut_short_is_named(copy: Path) -> None:
    contents = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(contents[: len(contents) // 2])
    with pytest.raises(ValueError, match=f"cannot read the weights in .*{WEIGHTS}"):
        make_llm(str(copy))


def test_an_index_that_names_an_absent_file(copy: Path) -> None:
    weight_map = split(copy, 3)
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors"):
        make_llm(str(copy))


@pytest.mark.parametrize(
    "contents", ["{", "[]", "{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": null}']
)
def test_an_index_that_cannot_be_read(copy: Path, contents: str) -> None:
    (copy / INDEX).write_text(contents)
    with pytest.raises(ValueError, match=INDEX):
        make_llm(str(copy))


# --- tied, other dtypes, none ---------------------------------------------------------------------


def test_a_tied_checkpoint_may_also_carry_the_head(tmp_path: Path) -> None:
    tied = make_checkpoint(tmp_path, QWEN2, seed=3, tie_word_embeddings=True, hidden_size=64)
    wanted = tied.complete(PROMPTS, 8)
    assert "lm_head.weight" not in load_file(tmp_path / WEIGHTS)
    assert outputs_of(tmp_path) == wanted

    def add_head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    change(tmp_path, add_head)
    assert outputs_of(tmp_path) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_checkpoint_is_read_into_float32(
    copy: Path, dtype: torch.dtype, expected: list[list[int]]
) -> None:
    """conftest's weights can all be written in bfloat16; in float16, they are rounded on both
    sides.
    """

    def convert(tensors: Tensors) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    change(copy, convert)
    llm = make_llm(str(copy))
    loaded = {name: tensor.float() for name, tensor in load_file(copy / WEIGHTS).items()}
    norm = llm.model_runner.model.model.norm.weight  # type: ignore[union-attr]
    assert norm.dtype == llm.model_runner.kv_cache.dtype == torch.float32
    assert torch.equal(norm, loaded["model.norm.weight"])
    if dtype == torch.bfloat16:
        assert generate_ids(llm, PROMPTS, greedy(8)) == expected
    llm.exit()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.bfloat16])
def test_the_engine_runs_in_the_dtype_that_is_asked_for(
    checkpoint: Checkpoint, dtype: str | torch.dtype
) -> None:
    llm = make_llm(checkpoint.path, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    model = llm.model_runner.model  # type: ignore[union-attr]
    assert {param.dtype for param in model.parameters()} == {wanted}
    assert llm.model_runner.kv_cache.dtype == wanted  # type: ignore[union-attr]
    for prompt, tokens in zip(PROMPTS, generate_ids(llm, PROMPTS, greedy(8)), strict=True):
        logits = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        # Rounding each of some ten results in a row to 8 bits: a few percent of the logits' spread.
        assert (logits.max(dim=1).values - chosen).max() < 0.3 * logits.std()
    llm.exit()


def test_dummy_weights_need_only_config_json(checkpoint: Checkpoint, tmp_path: Path) -> None:
    shutil.copy(Path(checkpoint.path) / "config.json", tmp_path)

    def tokens(seed: int) -> list[list[int]]:
        llm = make_llm(str(tmp_path), load_format="dummy", seed=seed)
        result = generate_ids(llm, PROMPTS, greedy(8))
        for name, param in llm.model_runner.model.named_parameters():  # type: ignore[union-attr]
            if name.endswith("norm.weight"):
                assert (param == 1).all()
            else:
                assert (
                    param.std().item() == pytest.approx(0.02, rel=0.2)
                    and abs(param.mean().item()) < 0.002
                )
        llm.exit()
        return result

    assert tokens(1) == tokens(1) != tokens(2)


def test_dummy_weights_of_a_given_configuration_need_no_files(checkpoint: Checkpoint) -> None:
    llm = make_llm("no/such/path", load_format="dummy", hf_config=checkpoint.model.config)
    assert len(generate_ids(llm, PROMPTS, greedy(3))[0]) == 3
    llm.exit()


@pytest.mark.parametrize("spoil", [False, True])
def test_torch_defaults_are_left_alone(copy: Path, expected: list[list[int]], spoil: bool) -> None:
    if spoil:
        change(copy, lambda tensors: tensors.pop("model.norm.weight"))
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float64)
    try:
        if spoil:
            with pytest.raises(ValueError):
                make_llm(str(copy))
        else:
            assert outputs_of(copy) == expected
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(dtype)
    assert torch.get_default_device() == device
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
