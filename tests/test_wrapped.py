"""Checkpoints of text models with an image encoder around them: the text model is what is run.

Their tensors have two kinds of names, those of the hub's files and those of transformers' modules
since 4.52. `transformers` writes the former unless it is told not to.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Checkpoint,
    edit_json,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from safetensors.torch import load_file, save_file
from test_text import byte_fallback

from nanovllm.checkpoints.wrappers import TEXT_MODELS
from nanovllm.config import Config

GEMMA, MISTRAL = "Gemma3ForConditionalGeneration", "Mistral3ForConditionalGeneration"
LENGTHS = [1, 5, 16, 17, 40]
# A tied model with larger weights repeats its last token: the embedding outweighs the layers.
GEMMA_OPTIONS: dict[str, Any] = dict(architecture=GEMMA, head_dim=16, std=0.05)
# Both kinds of names; where the LM head is; where the two configurations disagree on the latter,
# as those of Mistral do by default, which transformers decides by the files.
CASES: dict[str, dict[str, Any]] = {
    "gemma-tied": dict(GEMMA_OPTIONS, tie_word_embeddings=True),
    "gemma-untied": dict(GEMMA_OPTIONS),
    "gemma-untied-outside": dict(
        GEMMA_OPTIONS,
        tie_word_embeddings=True,
        around=dict(tie_word_embeddings=False),
    ),
    "mistral-tied-outside": dict(architecture=MISTRAL, around=dict(tie_word_embeddings=True)),
    "mistral-untied": dict(architecture=MISTRAL),
}


def complete(path: str, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    llm = make_llm(path, **options)
    try:
        return generate_ids(llm, prompts, greedy(12))
    finally:
        llm.exit()


@pytest.fixture(scope="module", params=CASES)
def wrapped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[list[int]], list[list[int]]]:
    path = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(
        path, seed=list(CASES).index(request.param), **CASES[request.param]
    )
    prompts = random_prompts(0, LENGTHS)
    return checkpoint, prompts, checkpoint.complete(prompts, 12)


@pytest.mark.parametrize("names", ["hub", "modules", "shards"])
def test_the_text_model_is_run(
    wrapped: tuple[Checkpoint, list[list[int]], list[list[int]]], names: str, tmp_path: Path
) -> None:
    checkpoint, prompts, expected = wrapped
    path = checkpoint.path
    stored = load_file(Path(path) / "model.safetensors")
    assert any(name.startswith("language_model.model.layers") for name in stored)
    assert any(name.startswith("vision_tower.") for name in stored)
    if names != "hub":
        size = "50KB" if names == "shards" else "50GB"
        checkpoint.model.save_pretrained(
            tmp_path, max_shard_size=size, save_original_format=names == "shards"
        )
        assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (names == "shards")
        path = str(tmp_path)
    if names == "modules":
        stored = load_file(tmp_path / "model.safetensors")
        assert any(name.startswith("model.language_model.layers") for name in stored)
        assert any(name.startswith("model.vision_tower.") for name in stored)
    assert complete(path, prompts) == expected


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("gemma"), **CASES["gemma-tied"])


def copy_with(source: str, path: Path, **tensors: torch.Tensor | None) -> str:
    """A copy of a checkpoint with more tensors, or with fewer (None)."""
    shutil.copytree(source, path, dirs_exist_ok=True)
    stored = {**load_file(path / "model.safetensors"), **tensors}
    save_file({name: t for name, t in stored.items() if t is not None}, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("language_model.model.layers.0.mlp.gate.weight", "1 unknown: language_model.*gate.weight"),
        ("audio_tower.weight", "1 unknown: audio_tower.weight"),
        ("vision_tower_2.weight", "1 unknown: vision_tower_2.weight"),
        ("model.norm.weight", "both hold the tensor 'model.norm.weight'"),
    ],
)
def test_tensors_of_neither_part_are_refused(
    gemma: Checkpoint, tmp_path: Path, name: str, message: str
) -> None:
    path = copy_with(gemma.path, tmp_path, **{name: torch.ones(48)})
    with pytest.raises(ValueError, match=message):
        make_llm(path)


def test_missing_tensors_are_named(gemma: Checkpoint, tmp_path: Path) -> None:
    path = copy_with(gemma.path, tmp_path, **{"language_model.model.norm.weight": None})
    with pytest.raises(ValueError, match=r"1 missing: model\.norm\.weight"):
        make_llm(path)


def test_image_tensors_are_unknown_where_no_encoder_is_named(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = copy_with(checkpoint.path, tmp_path, **{"vision_tower.weight": torch.ones(2)})
    with pytest.raises(ValueError, match="1 unknown: vision_tower.weight"):
        make_llm(path)


def test_what_is_said_of_the_whole_counts(gemma: Checkpoint, tmp_path: Path) -> None:
    copy_with(gemma.path, tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=[7, 106], dtype="float16")
    config = Config(str(tmp_path), device="cpu")
    assert config.hf_config.architectures == ["Gemma3ForCausalLM"]
    assert config.hf_config.model_type == "gemma3_text"
    assert config.hf_config.vocab_size == gemma.model.config.text_config.vocab_size
    assert str(config.hf_config.dtype).removeprefix("torch.") == "float16"
    llm = make_llm(str(tmp_path))
    assert set(llm.config.eos) == {7, 106}
    llm.exit()
    edit_json(tmp_path / "config.json", eos_token_id=None)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[5, 6], temperature=0.25)
    llm = make_llm(str(tmp_path))
    inner = gemma.model.config.text_config.eos_token_id
    assert set(llm.config.eos) == {5, 6} | ({inner} if inner is not None else set())
    llm.exit()


def test_texts(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, **GEMMA_OPTIONS, vocab_size=300)
    tokenizer = byte_fallback(drops_first_space=False)
    tokenizer.save_pretrained(tmp_path)
    llm = make_llm(str(tmp_path))
    try:
        assert tokenizer.eos_token_id in llm.config.eos
        (output,) = llm.generate("hello é", greedy(12), use_tqdm=False)
    finally:
        llm.exit()
    (expected,) = checkpoint.complete([tokenizer.encode("hello é")], 12)
    assert output["token_ids"] == expected
    assert output["text"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_quantised_weights_of_the_whole_are_refused(gemma: Checkpoint, tmp_path: Path) -> None:
    copy_with(gemma.path, tmp_path)
    edit_json(tmp_path / "config.json", quantization_config=dict(quant_method="mxfp4"))
    with pytest.raises(ValueError, match="quant_method 'mxfp4' is not supported"):
        make_llm(str(tmp_path))


def test_a_text_model_of_another_type_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, architecture=MISTRAL, model_type="llama")
    with pytest.raises(ValueError, match=f"type 'llama'.*supported: {', '.join(TEXT_MODELS)}"):
        make_llm(str(tmp_path))


def test_dummy_weights_need_only_the_configuration(gemma: Checkpoint) -> None:
    config = gemma.model.config
    llm = make_llm("no/such/path", load_format="dummy", hf_config=config)
    try:
        tokens = generate_ids(llm, random_prompts(0, [5]), greedy(4))
        assert len(tokens[0]) == 4
    finally:
        llm.exit()
    assert config.architectures == [GEMMA]  # the caller's own is as it was
