"""Embeddings and scores: hidden states and logits of `transformers`, however the work is cut."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Checkpoint,
    assert_idle,
    edit_json,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from safetensors.torch import load_file, save_file
from test_prefill_graphs import TORCH_TILED, add_graphs
from transformers import AutoTokenizer

from nanovllm import DEMO_MODEL, LLM, PoolingParams, SamplingParams
from nanovllm.models.causal_lm import CausalLM
from nanovllm.pooling.prompts import INSTRUCTION

PROMPTS = random_prompts(0, [1, 2, 15, 16, 17, 40, 90, 33])
CUTS: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    "tiny-cache": dict(max_model_len=96, kvcache_block_size=4, num_kvcache_blocks=24),
}
TEXTS = ["the sky is blue", "what is a prime number?", "two"]


@torch.inference_mode()
def hidden_states(checkpoint: Checkpoint, token_ids: list[int]) -> torch.Tensor:
    """`[n, hidden]` float32."""
    return checkpoint.model.model(torch.tensor([token_ids])).last_hidden_state[0].float()


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


def check(outputs: list[Any], expected: list[torch.Tensor]) -> None:
    for output, vector in zip(outputs, expected, strict=True):
        assert torch.tensor(output.outputs.embedding) == pytest.approx(vector, abs=1e-5)


def write_modules(
    path: str | Path, *modules: str, prompts: dict[str, Any] | None = None, **pooling: Any
) -> None:
    """Files of sentence-transformers, with these modules behind the model."""
    entries = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    ]
    for index, name in enumerate(modules, start=1):
        entry = {"idx": index, "name": str(index), "path": f"{index}_{name}"}
        entries.append(entry | {"type": f"sentence_transformers.models.{name}"})
    Path(path, "modules.json").write_text(json.dumps(entries))
    Path(path, "1_Pooling").mkdir(exist_ok=True)
    Path(path, "1_Pooling", "config.json").write_text(json.dumps(pooling))
    if prompts is not None:
        Path(path, "config_sentence_transformers.json").write_text(json.dumps(prompts))


@pytest.fixture
def copy(checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The checkpoint in a directory of its own."""
    shutil.copytree(checkpoint.path, tmp_path / "copy")
    return Checkpoint(str(tmp_path / "copy"), checkpoint.model)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random checkpoint with the demo's tokenizer, which knows Qwen's chat, "yes" and "no"."""
    path = tmp_path_factory.mktemp("speaking")
    checkpoint = make_checkpoint(path, seed=3, vocab_size=1031)  # odd
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.add_tokens(["yes", "no"])
    tokenizer.save_pretrained(path)
    return checkpoint


# --- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cut", CUTS)
def test_the_last_hidden_state_however_the_work_is_cut(
    checkpoint: Checkpoint, record_hits: Callable[[], list[int]], cut: str, depth: int
) -> None:
    expected = [unit(hidden_states(checkpoint, prompt)[-1]) for prompt in PROMPTS]
    llm = make_llm(checkpoint.path, depth, **CUTS[cut])
    check(llm.embed(PROMPTS, use_tqdm=False), expected)
    assert_idle(llm)
    record_hits()
    outputs = llm.embed(PROMPTS[::-1], use_tqdm=False)
    check(outputs, expected[::-1])
    assert_idle(llm)
    assert [output["num_cached_tokens"] for output in outputs] == record_hits()
    assert sum(output["num_cached_tokens"] for output in outputs) >= 64
    assert outputs[0].prompt_token_ids == PROMPTS[-1]
    # Other requests find the engine as they left it.
    assert len(generate_ids(llm, PROMPTS, greedy(3))) == len(PROMPTS)
    llm.exit()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("cut", CUTS)
def test_the_mean_of_all_tokens(copy: Checkpoint, cut: str, depth: int) -> None:
    write_modules(copy.path, "Pooling", pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    expected = [hidden_states(copy, prompt).mean(dim=0) for prompt in PROMPTS]
    llm = make_llm(copy.path, depth, **CUTS[cut])
    for _ in range(2):  # the second time all is in the cache, and has to be computed again
        outputs = llm.embed(PROMPTS, use_tqdm=False)
        check(outputs, expected)  # there is no module that normalises
        assert [output["num_cached_tokens"] for output in outputs] == [0] * len(PROMPTS)
        assert_idle(llm)
    llm.exit()


def test_options_of_an_embedding(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    prompts = PROMPTS[3:7]
    whole = [hidden_states(checkpoint, prompt)[-1] for prompt in prompts]
    params = [
        PoolingParams(),
        PoolingParams(normalize=False),
        PoolingParams(dimensions=10),
        PoolingParams(dimensions=7, normalize=False),
    ]
    expected = [unit(whole[0]), whole[1], unit(whole[2][:10]), whole[3][:7]]
    check(llm.embed(prompts, pooling_params=params, use_tqdm=False), expected)
    check(
        llm.embed(prompts, pooling_params=params[2], use_tqdm=False), [unit(v[:10]) for v in whole]
    )
    (cut,) = llm.embed([PROMPTS[6]], truncate_prompt_tokens=9, use_tqdm=False)
    check([cut], [unit(hidden_states(checkpoint, PROMPTS[6][-9:])[-1])])
    (output,) = llm.embed({"prompt_token_ids": prompts[0]}, use_tqdm=False)
    assert json.loads(json.dumps(output))["embedding"] == output["embedding"]
    assert output.finished and output.outputs.embedding is output["embedding"]
    assert llm.embed([], use_tqdm=False) == []


def test_no_head_runs_and_no_token_is_drawn(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(checkpoint.path, max_num_batched_tokens=50)

    def fail(*args: Any) -> None:
        raise AssertionError("an embedding needs no logits")

    monkeypatch.setattr(CausalLM, "compute_logits", fail)
    with llm.trace() as trace:
        assert len(llm.embed(PROMPTS, use_tqdm=False)) == len(PROMPTS)
    assert sum(step.num_tokens for step in trace.steps) == sum(map(len, PROMPTS))


def test_small_prefills_as_graphs(checkpoint: Checkpoint) -> None:
    """They leave what the last norm reads. Means, and log-probabilities, need all tokens."""
    expected = [unit(hidden_states(checkpoint, prompt)[-1]) for prompt in PROMPTS]
    llm = make_llm(checkpoint.path, 1, max_num_batched_tokens=100)
    replays = add_graphs(llm, TORCH_TILED)
    for _ in range(2):
        check(llm.embed(PROMPTS, use_tqdm=False), expected)
    (alone,) = llm.embed([PROMPTS[3]], use_tqdm=False)
    check([alone], expected[3:4])
    counts = [replay.count for replay in replays]
    assert sum(count > 0 for count in counts) >= 2
    params = SamplingParams(prompt_logprobs=0, max_tokens=1)
    assert llm.generate([PROMPTS[3]], params, use_tqdm=False)[0].prompt_logprobs is not None
    assert [replay.count for replay in replays] == counts
    llm.exit()


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3": dict(
        architecture="Gemma3ForCausalLM", head_dim=16, sliding_window=8, sliding_window_pattern=2
    ),
    "olmo2": dict(architecture="Olmo2ForCausalLM"),
    "qwen2": dict(architecture="Qwen2ForCausalLM"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    checkpoint = make_checkpoint(tmp_path, seed=5, **FAMILIES[family])
    llm = make_llm(checkpoint.path, max_num_batched_tokens=40)
    expected = [unit(hidden_states(checkpoint, prompt)[-1]) for prompt in PROMPTS]
    check(llm.embed(PROMPTS, use_tqdm=False), expected)
    llm.exit()


# --- what a checkpoint's files say ----------------------------------------------------------------


def test_prompts_and_normalisation_of_the_files(speaking: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(speaking.path, path)
    prompts = {"query": "Find:", "document": ""}
    write_modules(
        path,
        "Pooling",
        "Normalize",
        prompts={"prompts": prompts, "default_prompt_name": None},
        pooling_mode="lasttoken",
    )
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = make_llm(str(path))

    def expected(before: str) -> list[torch.Tensor]:
        ids = [tokenizer.encode(before + text) for text in TEXTS]
        return [unit(hidden_states(speaking, token_ids)[-1]) for token_ids in ids]

    check(llm.embed(TEXTS, use_tqdm=False), expected(""))
    check(llm.embed(TEXTS, prompt_name="query", use_tqdm=False), expected("Find:"))
    check(llm.embed(TEXTS, prompt_name="document", use_tqdm=False), expected(""))
    in_a_dict = {"prompt": TEXTS[0]}
    for prompt in (TEXTS[0], in_a_dict, [in_a_dict]):
        (alone,) = llm.embed(prompt, prompt_name="query", use_tqdm=False)
        assert alone["prompt_token_ids"] == tokenizer.encode("Find:" + TEXTS[0])
    assert in_a_dict == {"prompt": TEXTS[0]}
    with pytest.raises(ValueError, match="no prompt 'passage'; it has 'query', 'document'"):
        llm.embed(TEXTS, prompt_name="passage")
    llm.exit()

    edit_json(path / "config_sentence_transformers.json", default_prompt_name="query")
    llm = make_llm(str(path))
    check(llm.embed(TEXTS, use_tqdm=False), expected("Find:"))
    llm.exit()


@pytest.mark.parametrize(
    "modules, pooling, problem",
    [
        (["Pooling", "Dense"], {"pooling_mode_lasttoken": True}, "Dense, which is not supported"),
        (["Pooling"], {"pooling_mode_cls_token": True}, "pooling_mode_cls_token, which is not"),
        (["Pooling"], {"pooling_mode": "max"}, "pooling max, which is not supported"),
        (
            ["Pooling"],
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "pooling_mode_mean_tokens, pooling_mode_max_tokens",
        ),
        (["Pooling"], {}, "pooling none"),
        (
            ["Pooling"],
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            "include_prompt false",
        ),
    ],
)
def test_other_ways_are_refused_by_name(
    copy: Checkpoint, modules: list[str], pooling: dict[str, Any], problem: str
) -> None:
    write_modules(copy.path, *modules, **pooling)
    llm = make_llm(copy.path)
    with pytest.raises(ValueError, match=problem):
        llm.embed(PROMPTS)
    assert len(generate_ids(llm, PROMPTS, greedy(2))) == len(PROMPTS)  # which needs none of it


@pytest.mark.parametrize("contents", ['{"a": 1}', "[1]", "nonsense"])
def test_broken_files(copy: Checkpoint, contents: str) -> None:
    Path(copy.path, "modules.json").write_text(contents)
    with pytest.raises(ValueError, match="modules.json"):
        make_llm(copy.path).embed(PROMPTS)


# --- checkpoints without LM head ------------------------------------------------------------------


def strip_head(path: str, architecture: str | None) -> None:
    """Save a checkpoint as a library for embeddings does."""
    file = Path(path, "model.safetensors")
    tensors = {
        name.removeprefix("model."): tensor
        for name, tensor in load_file(file).items()
        if name != "lm_head.weight"
    }
    save_file(tensors, file, {"format": "pt"})
    if architecture is not None:
        edit_json(Path(path, "config.json"), architectures=[architecture])


@pytest.mark.parametrize("architecture", ["Qwen3Model", None])
def test_no_head_and_embeddings_that_are_not_tied(
    copy: Checkpoint, architecture: str | None
) -> None:
    strip_head(copy.path, architecture)
    write_modules(copy.path, "Pooling", "Normalize", pooling_mode_lasttoken=True)
    llm = make_llm(copy.path)
    expected = [unit(hidden_states(copy, prompt)[-1]) for prompt in PROMPTS]
    check(llm.embed(PROMPTS, use_tqdm=False), expected)
    for call in (llm.generate, llm.add_request, llm.stream):
        with pytest.raises(ValueError, match="no LM head"):
            call(PROMPTS[2] if call == llm.add_request else PROMPTS)
    llm.exit()


@pytest.mark.parametrize(
    "architecture, inner",
    [("Qwen3ForCausalLM", "Qwen3Model"), ("Gemma3ForCausalLM", "Gemma3TextModel")],
)
def test_no_head_and_tied_embeddings(tmp_path: Path, architecture: str, inner: str) -> None:
    checkpoint = make_checkpoint(
        tmp_path, architecture, std=0.1, tie_word_embeddings=True, head_dim=16
    )
    expected = checkpoint.complete(PROMPTS[3:6], 4)
    strip_head(checkpoint.path, inner)
    llm = make_llm(checkpoint.path)
    check(
        llm.embed(PROMPTS, use_tqdm=False),
        [unit(hidden_states(checkpoint, prompt)[-1]) for prompt in PROMPTS],
    )
    assert generate_ids(llm, PROMPTS[3:6], greedy(4)) == expected
    llm.exit()


def test_an_ordinary_checkpoint_without_its_head_is_incomplete(copy: Checkpoint) -> None:
    file = Path(copy.path, "model.safetensors")
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 missing: lm_head.weight"):
        make_llm(copy.path)


# --- scores ---------------------------------------------------------------------------------------


def test_a_language_model_is_asked_yes_or_no(speaking: Checkpoint) -> None:
    tokenizer = AutoTokenizer.from_pretrained(speaking.path)
    llm = make_llm(speaking.path, max_num_batched_tokens=100, max_model_len=512)
    outputs = llm.score(TEXTS[1], TEXTS, use_tqdm=False)
    assert_idle(llm)
    for document, output in zip(TEXTS, outputs, strict=True):
        prompt = (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the "
            'Query and the Instruct provided. Note that the answer can only be "yes" or "no".'
            f"<|im_end|>\n<|im_start|>user\n<Instruct>: {INSTRUCTION}\n<Query>: {TEXTS[1]}\n"
            f"<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        ids = tokenizer.encode(prompt)
        assert output["prompt_token_ids"] == ids
        yes_and_no = tokenizer.convert_tokens_to_ids(["yes", "no"])
        expected = speaking.logits(ids)[-1, yes_and_no].softmax(dim=-1)[0].item()
        assert output.outputs.score == pytest.approx(expected, abs=1e-5)
    assert len({round(output["score"], 3) for output in outputs}) == 3

    (other,) = llm.score(TEXTS[1], TEXTS[0], instruction="Find colours", use_tqdm=False)
    assert abs(other["score"] - outputs[0]["score"]) > 1e-4
    template = "{query}|{document}|{instruction}"
    # The same from graphs, which leave their logits.
    replays = add_graphs(llm, TORCH_TILED)
    for replay in replays:
        replay.logits.resize_(len(replay.logits), 1031)
    again = llm.score(TEXTS[1], TEXTS, use_tqdm=False)
    assert [output["score"] for output in again] == pytest.approx(
        [output["score"] for output in outputs], abs=1e-5
    )
    assert any(replay.count for replay in replays)
    (short,) = llm.score(TEXTS[1], "a {b}", instruction="c", template=template, use_tqdm=False)
    assert short["prompt_token_ids"] == tokenizer.encode(f"{TEXTS[1]}|a {{b}}|c")
    llm.exit()


def test_the_answers_that_the_files_name(speaking: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(speaking.path, path)
    write_modules(path, "LogitScore")
    (path / "1_LogitScore").mkdir()
    file = path / "1_LogitScore" / "config.json"
    file.write_text(json.dumps({"true_token_id": 77, "false_token_id": 5}))
    llm = make_llm(str(path), max_model_len=512)
    (output,) = llm.score(TEXTS[1], TEXTS[0], use_tqdm=False)
    logits = speaking.logits(output["prompt_token_ids"])[-1, [77, 5]]
    assert output["score"] == pytest.approx(logits.softmax(dim=-1)[0].item(), abs=1e-5)
    file.write_text(json.dumps({"true_token_id": 77}))
    with pytest.raises(ValueError, match="false_token_id"):
        make_llm(str(path)).score("a", "b")


def test_two_ranks(speaking: Checkpoint) -> None:
    alone = make_llm(speaking.path)
    both = make_llm(speaking.path, tensor_parallel_size=2, max_num_batched_tokens=50)
    expected = [unit(hidden_states(speaking, prompt)[-1]) for prompt in PROMPTS]
    check(both.embed(PROMPTS, use_tqdm=False), expected)
    scores = [
        [output["score"] for output in llm.score(TEXTS, TEXTS[::-1], use_tqdm=False)]
        for llm in (alone, both)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    # Log-probabilities of prompts, too: of the odd vocabulary the last rank has fewer tokens.
    params = [greedy(3), *(SamplingParams(prompt_logprobs=k, temperature=0) for k in range(7))]
    one, two = (llm.generate(PROMPTS, params, use_tqdm=False) for llm in (alone, both))
    for ours, theirs in zip(one, two, strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        pairs = zip(ours.prompt_logprobs or (), theirs.prompt_logprobs or (), strict=True)
        for entry, other in pairs:
            assert entry == pytest.approx(other, abs=1e-4) and (entry is None) == (other is None)
    assert sum(len(result.prompt_logprobs or ()) for result in two) == sum(map(len, PROMPTS[1:]))
    both.exit()


def test_a_model_for_embeddings_scores_by_the_cosine(speaking: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(speaking.path, path)
    write_modules(
        path, "Pooling", prompts={"prompts": {"query": "Find:"}}, pooling_mode_lasttoken=True
    )
    llm = make_llm(str(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    query, *documents = [
        unit(hidden_states(speaking, tokenizer.encode(text))[-1])
        for text in ("Find:" + TEXTS[1], *TEXTS)
    ]
    outputs = llm.score([TEXTS[1]], TEXTS, use_tqdm=False)
    expected = [(query @ document).item() for document in documents]
    assert [output.outputs.score for output in outputs] == pytest.approx(expected, abs=1e-5)
    assert [output["prompt_token_ids"] for output in outputs] == [
        tokenizer.encode(text) for text in TEXTS
    ]
    llm.exit()


def test_texts_that_make_no_pairs(speaking: Checkpoint, checkpoint: Checkpoint) -> None:
    llm = make_llm(speaking.path)
    with pytest.raises(ValueError, match="2 queries for 3 documents"):
        llm.score(TEXTS[:2], TEXTS)
    with pytest.raises(TypeError, match="documents must be a string or a list"):
        llm.score(TEXTS, [1, 2, 3])  # type: ignore[list-item]
    assert llm.score("a", [], use_tqdm=False) == []
    with pytest.raises(ValueError, match="no tokenizer"):
        make_llm(checkpoint.path).score("a", "b")
    demo = LLM(DEMO_MODEL, device="cpu")
    with pytest.raises(ValueError, match="'yes' is 2 tokens"):
        demo.score("a", "b")


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(checkpoint.path)
    yield llm
    llm.exit()


@pytest.mark.parametrize(
    "options, error, problem",
    [
        (dict(pooling_params=[PoolingParams()]), ValueError, "1 pooling_params for 8 prompts"),
        (dict(pooling_params=[1] * 8), TypeError, "PoolingParams, not 1"),
        (dict(pooling_params=SamplingParams()), TypeError, "PoolingParams"),
        (dict(pooling_params=PoolingParams(dimensions=49)), ValueError, "at most 48.*not 49"),
        (dict(prompt_name="query"), ValueError, "it has none"),
    ],
)
def test_wrong_options(plain: LLM, options: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        plain.embed(PROMPTS, **options)
    assert_idle(plain)


@pytest.mark.parametrize(
    "options", [dict(dimensions=0), dict(dimensions=1.5), dict(normalize=2), dict(dimensions="3")]
)
def test_wrong_params(options: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        PoolingParams(**options)


def test_wrong_prompts(plain: LLM) -> None:
    for prompts in (["text"], [[]], [[127]], [[1] * 256], 5):
        with pytest.raises((TypeError, ValueError)):
            plain.embed(prompts)  # type: ignore[arg-type]
    assert_idle(plain)


def test_other_requests_must_have_ended(plain: LLM) -> None:
    plain.add_request(PROMPTS[2], greedy(3))
    with pytest.raises(RuntimeError, match="unfinished"):
        plain.embed(PROMPTS)
    while not plain.is_finished():
        plain.step()
    assert len(plain.embed(PROMPTS, use_tqdm=False)) == len(PROMPTS)


def test_ctrl_c_leaves_nothing_behind(plain: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = type(plain)._advance
    calls = []

    def interrupted(self: LLM) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(type(plain), "_advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plain.embed(PROMPTS, use_tqdm=False)
    assert_idle(plain)
    assert len(plain.embed(PROMPTS[:2], use_tqdm=False)) == 2


def test_a_hidden_state_that_is_no_number(copy: Checkpoint) -> None:
    """One request fails alone; if all do, the call does."""
    file = Path(copy.path, "model.safetensors")
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][5] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    llm = make_llm(copy.path)
    good, bad = llm.embed([[1, 2, 3], [1, 5, 3]], use_tqdm=False)
    assert all(value == value for value in good["embedding"])
    assert all(value != value for value in bad["embedding"])
    with pytest.raises(RuntimeError, match="NaN or infinite"):
        llm.embed([[1, 5, 3]], use_tqdm=False)
