"""Which files and tensors are the checkpoint: never other weights in silence, and no code of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import (
    QWEN2,
    Checkpoint,
    edit_json,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nanovllm import DEMO_MODEL, LLM
from nanovllm.checkpoints.checkpoint import weight_files
from nanovllm.config import Config
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.loader import load_model
from nanovllm.utils.tensor_parallel import tensor_parallel

Tensors = dict[str, torch.Tensor]
PROMPTS = random_prompts(0, [5, 40])
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("tied")
    return make_checkpoint(path, QWEN2, seed=3, tie_word_embeddings=True)


@pytest.fixture
def copy(tied: Checkpoint, tmp_path: Path) -> Path:
    shutil.copytree(tied.path, tmp_path / "copy")
    return tmp_path / "copy"


def outputs_of(path: Path) -> list[list[int]]:
    llm = make_llm(str(path))
    try:
        return generate_ids(llm, PROMPTS, greedy(8))
    finally:
        llm.exit()


def save(path: Path, tensors: Tensors) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def shards(path: Path, num_files: int, stem: str = "model") -> dict[str, str]:
    """Spread the tensors of a one-file checkpoint; which tensor is in which file."""
    tensors = load_file(path / WEIGHTS)
    (path / WEIGHTS).unlink()
    files = [f"{stem}-{i + 1:05}-of-{num_files:05}.safetensors" for i in range(num_files)]
    weight_map = {name: files[i % num_files] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save(path / file, {name: tensors[name] for name in tensors if weight_map[name] == file})
    return weight_map


def write_index(path: Path, weight_map: dict[str, str]) -> None:
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# --- tied embeddings ------------------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [1, 3])
def test_either_name_is_the_shared_tensor(tied: Checkpoint, copy: Path, num_files: int) -> None:
    tensors = load_file(copy / WEIGHTS)
    tensors[HEAD] = tensors.pop(EMBEDDING)
    save(copy / WEIGHTS, tensors)
    if num_files > 1:
        shards(copy, num_files)
    assert outputs_of(copy) == tied.complete(PROMPTS, 8)
    rows = []
    for rank in range(2):
        with tensor_parallel(rank, 2):
            model = Qwen3ForCausalLM(tied.model.config, 64)
        load_model(model, str(copy))
        rows.append(model.lm_head.weight[: model.lm_head.num_tokens])
    assert torch.equal(torch.cat(rows), tensors[HEAD])


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.flip(0),
        lambda head: head + 1e-3,
        lambda head: torch.cat((head[:-1], head[-1:] * 2)),
        lambda head: head[:-1].clone(),
        lambda head: head.to(torch.bfloat16) * 2,
        lambda head: torch.full_like(head, float("nan")),
    ],
)
def test_a_head_that_differs_is_refused_by_name(
    copy: Path, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """It may come before the embedding or behind it, in the same file or in another."""
    tensors = load_file(copy / WEIGHTS)
    head = change(tensors[EMBEDDING]).contiguous()
    save(copy / WEIGHTS, {**tensors, HEAD: head})
    with pytest.raises(ValueError, match="lm_head.weight that differs.*tie_word_embeddings"):
        make_llm(str(copy))
    (copy / WEIGHTS).unlink()
    save(copy / "model-00001-of-00002.safetensors", {HEAD: head})
    save(copy / "model-00002-of-00002.safetensors", tensors)
    with pytest.raises(ValueError, match="lm_head.weight that differs.*tie_word_embeddings"):
        make_llm(str(copy))


def test_a_head_that_is_the_same_in_the_dtype_of_the_engine_is_no_other(
    tied: Checkpoint, copy: Path
) -> None:
    tensors = load_file(copy / WEIGHTS)
    save(copy / WEIGHTS, {**tensors, HEAD: tensors[EMBEDDING].bfloat16()})  # no digit is lost
    assert outputs_of(copy) == tied.complete(PROMPTS, 8)


def test_the_head_counts_once_the_configuration_says_so(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    save(copy / WEIGHTS, {**tensors, HEAD: tensors[EMBEDDING].flip(0).contiguous()})
    edit_json(copy / "config.json", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32).eval()
    assert outputs_of(copy) == Checkpoint(str(copy), model).complete(PROMPTS, 8)


# --- files beside the checkpoint ------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [1, 2])
@pytest.mark.parametrize("are_there", [True, False])
def test_an_index_of_older_shards_does_not_count(
    tied: Checkpoint, copy: Path, tmp_path: Path, num_files: int, are_there: bool
) -> None:
    old = tmp_path / "old"
    make_checkpoint(old, QWEN2, seed=8, tie_word_embeddings=True)
    write_index(copy, shards(old, num_files))
    if are_there:
        for file in old.glob("*.safetensors"):
            shutil.copy(file, copy)
    assert outputs_of(copy) == tied.complete(PROMPTS, 8)


def test_an_index_that_names_the_whole_file_counts(copy: Path) -> None:
    write_index(copy, dict.fromkeys(load_file(copy / WEIGHTS), WEIGHTS))
    assert weight_files(copy) == [copy / WEIGHTS]
    write_index(copy, {EMBEDDING: WEIGHTS, NORM: "more.safetensors"})
    with pytest.raises(ValueError, match=r"lacks weight files \(more.safetensors\)"):
        weight_files(copy)


@pytest.mark.parametrize("has_index", [True, False])
def test_one_tensor_in_two_shards(copy: Path, has_index: bool) -> None:
    norm = load_file(copy / WEIGHTS)[NORM]
    weight_map = shards(copy, 2)
    if has_index:
        write_index(copy, weight_map)
    other = next(file for file in weight_map.values() if file != weight_map[NORM])
    save(copy / other, {**load_file(copy / other), NORM: norm * 2})
    with pytest.raises(ValueError, match=f"both hold the tensor '{NORM}'") as error:
        make_llm(str(copy))
    assert weight_map[NORM] in str(error.value) and other in str(error.value)


@pytest.mark.parametrize("name", ["adapter_model", "optimizer", "._model-00001-of-00002", "a-1"])
@pytest.mark.parametrize("contents", [None, b"", b"text"])
def test_files_that_are_no_weights_beside_shards(
    tied: Checkpoint, copy: Path, name: str, contents: bytes | None
) -> None:
    shards(copy, 2)
    file = copy / f"{name}.safetensors"
    if contents is None:
        save(file, {NORM: torch.zeros(48), "optimizer.step": torch.zeros(1)})
    else:
        file.write_bytes(contents)
    assert len(weight_files(copy)) == 2
    if contents is None:
        assert outputs_of(copy) == tied.complete(PROMPTS, 8)


def test_unknown_tensors_are_named_with_their_file(copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "weights.safetensors")
    save(copy / "state.safetensors", {"exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match="1 unknown: exp_avg, in state.safetensors"):
        make_llm(str(copy))
    save(copy / "state.safetensors", {NORM: torch.zeros(48)})
    with pytest.raises(ValueError, match="both hold the tensor 'model.norm.weight'"):
        make_llm(str(copy))


def test_shards_without_an_index_are_those_of_one_checkpoint(copy: Path) -> None:
    shards(copy, 3)
    (copy / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks weight files.*model-00002-of-00003.safetensors"):
        make_llm(str(copy))
    save(copy / "model-00001-of-00002.safetensors", {NORM: torch.zeros(48)})
    with pytest.raises(ValueError, match="of-00002.*of-00003.*remove those"):
        make_llm(str(copy))


def test_weights_that_are_stored_as_integers(copy: Path) -> None:
    tensors = load_file(copy / WEIGHTS)
    save(copy / WEIGHTS, {**tensors, NORM: torch.ones(48, dtype=torch.int8)})
    with pytest.raises(ValueError, match=f"'{NORM}' is I8 and not BF16"):
        make_llm(str(copy))


def test_weights_under_another_name(copy: Path) -> None:
    (copy / WEIGHTS).rename(copy / "other.safetensors")
    edit_json(copy / "config.json", transformers_weights="other.safetensors")
    with pytest.raises(ValueError, match="'other.safetensors'.*transformers_weights"):
        make_llm(str(copy))


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model-q4.gguf", "adapter_model.safetensors"]
)
def test_other_formats_are_named(copy: Path, name: str) -> None:
    (copy / WEIGHTS).unlink()
    (copy / name).write_bytes(b"1234")
    with pytest.raises(
        ValueError, match=f"{name} cannot be read here: fetch .*safetensors"
    ) as error:
        make_llm(str(copy))
    assert "whole checkpoint" not in str(error.value)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match=f"no config.json; {name} cannot be read"):
        make_llm(str(copy))


def test_a_pointer_of_git_lfs(copy: Path) -> None:
    (copy / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9")
    with pytest.raises(ValueError, match="pointer of Git LFS.*git lfs pull"):
        make_llm(str(copy))


def test_a_path_to_a_file(copy: Path) -> None:
    for file in (WEIGHTS, "config.json"):
        for path in (copy / file, str(copy / file)):
            with pytest.raises(ValueError, match=f"{file}' is a file; pass the path of a ch.*dir"):
                LLM(path)  # type: ignore[arg-type]


def test_a_mistyped_path(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    for path, missing in (
        (f"{copy}x", "copyx"),
        (f"{copy}/a/b", "a"),
        (f"{copy}/config.json/a", "config.json"),
        ("./a/b", "a"),
        ("../b", "b"),
        ("a/b/c", "a"),
        ("~no-such-user/models", "~no-such-user"),
        ("Qwen3/", "Qwen3"),
    ):
        with pytest.raises(ValueError, match=f"there is no directory '{missing}' in /") as error:
            LLM(path)
        assert "repo" not in str(error.value).lower() and "pass the path" in str(error.value)


# --- the hub's cache ------------------------------------------------------------------------------

SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.mark.parametrize("is_online", [True, False])
@pytest.mark.parametrize(
    "cached, can_run",
    [
        ((*SMALL, INDEX, *SHARDS), True),
        ((*SMALL, INDEX, SHARDS[0]), False),
        ((*SMALL, SHARDS[1]), False),
        ((*SMALL, INDEX), False),
        (SMALL, False),
        (("config.json", INDEX, *SHARDS), True),
        ((*SMALL[:2], INDEX, *SHARDS), True),
        (("config.json", *SMALL[2:], INDEX, *SHARDS), True),
        ((*SMALL[:3], INDEX, *SHARDS), True),
        ((*SMALL[1:], INDEX, *SHARDS), False),
    ],
)
def test_half_a_model_in_the_cache_is_completed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: tuple[str, ...],
    can_run: bool,
    is_online: bool,
) -> None:
    """Without the hub, what can run does."""
    whole, snapshot = tmp_path / "whole", tmp_path / "snapshot"
    shutil.copytree(DEMO_MODEL, whole)
    write_index(whole, shards(whole, 2))
    snapshot.mkdir()
    for file in cached:
        shutil.copy(whole / file, snapshot)
    calls = []

    def download(
        repo_id: str,
        allow_patterns: list[str],
        ignore_patterns: list[str],
        local_files_only: bool = False,
    ) -> str:
        names = (*SMALL, INDEX, *SHARDS, "consolidated.safetensors")
        fetched = filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        assert list(fetched) == [*SMALL, INDEX, *SHARDS]
        calls.append(local_files_only)
        if not local_files_only:
            if not is_online:
                raise ConnectionError("no network")
            shutil.copytree(whole, snapshot, dirs_exist_ok=True)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    if not is_online and not can_run:
        with pytest.raises(ValueError, match="'org/model'.*no network"):
            Config("org/model", device="cpu")
        return
    assert Config("org/model", device="cpu").model == str(snapshot)
    is_whole = cached == (*SMALL, INDEX, *SHARDS)
    assert calls == ([True] if is_whole else [True, False])
    if is_online:
        assert len(weight_files(snapshot)) == 2 and (snapshot / "tokenizer.json").is_file()


def test_a_model_of_the_hub_without_safetensors(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / WEIGHTS).unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda **options: str(copy))
    with pytest.raises(ValueError, match="'org/model' has no .*safetensors.*GGUF"):
        Config("org/model", device="cpu")
    assert Config("org/model", device="cpu", load_format="dummy").model == str(copy)


# --- code of the checkpoint's own -----------------------------------------------------------------


@pytest.mark.parametrize("part", ["configuration", "tokenizer", "both, of known classes"])
def test_no_code_of_the_checkpoint_is_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    path, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(DEMO_MODEL, path)
    (path / "odd.py").write_text(f"open({str(mark)!r}, 'w')\nclass Odd:\n    model_type = 'odd'\n")
    auto_map: dict[str, Any] = {"AutoConfig": "odd.Odd"}
    if part == "configuration":
        edit_json(path / "config.json", model_type="odd", auto_map=auto_map)
    else:
        auto_map["AutoTokenizer"] = ["odd.Odd", None if part == "tokenizer" else "odd.Odd"]
        edit_json(path / "tokenizer_config.json", auto_map=auto_map)
    if part == "tokenizer":
        edit_json(path / "tokenizer_config.json", tokenizer_class="Odd")
    if part == "both, of known classes":
        edit_json(path / "config.json", auto_map=auto_map)
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": questions.append(question) or "y")
    if part == "configuration":
        with pytest.raises(ValueError, match=r"own \(auto_map\), which is never run here"):
            LLM(str(path), device="cpu")
    else:
        LLM(str(path), device="cpu").exit()
    assert not questions and not mark.exists()


def test_a_tokenizer_that_takes_code(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, trust_remote_code: bool) -> None:
        raise ValueError(
            f"Please pass the argument `trust_remote_code=True`, not {trust_remote_code}"
        )

    (copy / "tokenizer_config.json").write_text("{}")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ValueError, match="tokenizer in .*never run here") as error:
        make_llm(str(copy))
    assert "trust_remote_code" not in str(error.value)
