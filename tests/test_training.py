"""For trainers: weights replaced in place, and memory that is given back and taken again.

The oracle is an engine that is made from the new weights: all its parameters must be equal, bit by
bit, and so must the tokens.
"""

import os
from collections.abc import Iterator
from math import exp, inf
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    QWEN2,
    Checkpoint,
    assert_idle,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from safetensors.torch import load_file
from test_families import FAMILIES, QWEN3_MOE
from torch import Tensor

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.kernels.cpu_memory import give_freed_memory_back

Fresh = tuple[dict[str, Tensor], list[list[int]]]
PROMPTS = random_prompts(7, [40, 3, 33])
Q_NAME = "model.layers.1.self_attn.q_proj.weight"
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2-bias": dict(architecture=QWEN2),
    "llama-tied": FAMILIES["llama-tied-mqa"],
    "gemma3-offsets": FAMILIES["gemma3"],
    "gemma3-wrapped": FAMILIES["gemma3-wrapped"],
    "phi3-stacked": FAMILIES["phi3-window"],
    "qwen3-moe": QWEN3_MOE,
}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Weights for the model of `checkpoint`."""
    return make_checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def fresh(other: Checkpoint) -> Fresh:
    """Parameters and tokens of an engine that is made from `other`."""
    return results_of(other.path)


@pytest.fixture
def llm(checkpoint: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(checkpoint.path)
    yield llm
    llm.exit()


def parameters(llm: LLM) -> dict[str, Tensor]:
    assert llm.model_runner is not None
    return dict(llm.model_runner.model.named_parameters())


def copies(llm: LLM) -> dict[str, Tensor]:
    return {name: param.clone() for name, param in parameters(llm).items()}


def changed_names(llm: LLM, before: dict[str, Tensor]) -> list[str]:
    after = parameters(llm)
    return [name for name, param in before.items() if not torch.equal(param, after[name])]


def results_of(path: str, **options: Any) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Parameters and tokens of a fresh engine."""
    llm = make_llm(path, **options)
    try:
        return copies(llm), generate_ids(llm, PROMPTS, greedy(12))
    finally:
        llm.exit()


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loaded_weights_are_those_of_a_fresh_engine(name: str, tmp_path: Path) -> None:
    old = make_checkpoint(tmp_path / "old", **MODELS[name])
    new = make_checkpoint(tmp_path / "new", **{**MODELS[name], "seed": 5})
    expected, tokens = results_of(new.path)
    llm = make_llm(old.path)
    old_tokens = generate_ids(llm, PROMPTS, greedy(12))
    assert old_tokens != tokens
    addresses = {name: param.data_ptr() for name, param in parameters(llm).items()}

    llm.load_weights(new.model.state_dict())  # the names of transformers' modules
    assert changed_names(llm, expected) == []
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens
    llm.load_weights(old.path)  # the names of the files
    assert generate_ids(llm, PROMPTS, greedy(12)) == old_tokens
    # A CUDA graph reads weights where they were when it was captured.
    assert {name: param.data_ptr() for name, param in parameters(llm).items()} == addresses
    llm.exit()


def test_parts_can_be_loaded_one_by_one(llm: LLM, other: Checkpoint, fresh: Fresh) -> None:
    """As TRL does it, and as who trains only some of the weights."""
    expected, tokens = fresh
    for name, param in other.model.named_parameters():
        assert llm.load_weights([(name, param)]) == {name}
    assert changed_names(llm, expected) == []
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens


def test_what_is_not_named_stays(llm: LLM, other: Checkpoint) -> None:
    before = copies(llm)
    q_proj = other.model.state_dict()[Q_NAME]
    assert llm.load_weights({Q_NAME: q_proj}) == {Q_NAME}
    merged = Q_NAME.replace("q_proj", "qkv_proj")
    assert changed_names(llm, before) == [merged]
    num_rows = len(q_proj)
    assert torch.equal(parameters(llm)[merged][:num_rows], q_proj)
    assert torch.equal(parameters(llm)[merged][num_rows:], before[merged][num_rows:])


def test_tensors_of_a_trainer(llm: LLM, other: Checkpoint, fresh: Fresh) -> None:
    """Of another dtype, not contiguous, with gradients; in the modes that a trainer may be in."""
    expected, tokens = fresh

    def trained() -> Iterator[tuple[str, Tensor]]:
        for index, (name, tensor) in enumerate(other.model.state_dict().items()):
            tensor = tensor.to((torch.bfloat16, torch.float64)[index % 2])  # both lose nothing
            if tensor.dim() == 2:
                tensor = tensor.t().contiguous().t()
            yield name, tensor.requires_grad_()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        llm.load_weights(trained())
    assert changed_names(llm, expected) == []
    for param in parameters(llm).values():
        param.data.zero_()
    with torch.inference_mode():
        llm.load_weights(other.model.state_dict())
    assert changed_names(llm, expected) == []
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens
    assert not any(param.requires_grad for param in parameters(llm).values())


def test_experts_by_both_kinds_of_names(tmp_path: Path) -> None:
    old = make_checkpoint(tmp_path / "old", **QWEN3_MOE)
    new = make_checkpoint(tmp_path / "new", seed=5, **QWEN3_MOE)
    expected, _ = results_of(new.path)
    tensors = load_file(Path(new.path) / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"
    if f"{prefix}.gate_up_proj" not in tensors:
        single = {name: tensor for name, tensor in tensors.items() if ".experts." in name}
        gate, up, down = (
            torch.stack([single[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(7)])
            for kind in ("gate", "up", "down")
        )
        merged = {
            f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1),
            f"{prefix}.down_proj": down,
        }
    llm = make_llm(old.path)
    before = copies(llm)
    llm.load_weights({f"{prefix}.3.up_proj.weight": up[3]})
    assert changed_names(llm, before) == [f"{prefix}.gate_up_proj"]
    llm.load_weights(merged)
    now = parameters(llm)
    assert torch.equal(now[f"{prefix}.gate_up_proj"], expected[f"{prefix}.gate_up_proj"])
    assert torch.equal(now[f"{prefix}.down_proj"], expected[f"{prefix}.down_proj"])
    llm.exit()


def wrong_weights() -> dict[str, tuple[str, Any, type[Exception], str]]:
    right = torch.zeros(64, 48)
    meta = torch.empty(64, 48, device="meta")
    distributed = torch.zeros(64, 48)
    distributed.full_tensor = lambda: right  # type: ignore[attr-defined]
    return {
        "unknown": ("model.layers.1.q_proj.weight", right, ValueError, "no tensor .*q_proj"),
        "ours": (Q_NAME.replace("q_proj", "qkv_proj"), right, ValueError, "no tensor .*qkv_proj"),
        "no-layer": (Q_NAME.replace("1", "2"), right, ValueError, "no tensor"),
        "shape": (Q_NAME, right.t(), ValueError, r"\[48, 64\].*asks for \[64, 48\]"),
        "dtype": (Q_NAME, right.to(torch.int8), ValueError, "int8 and not torch.bfloat16"),
        "meta": (Q_NAME, meta, ValueError, "on device meta"),
        "sparse": (Q_NAME, right.to_sparse(), ValueError, "must be dense"),
        "distributed": (Q_NAME, distributed, ValueError, "full_tensor"),
        "array": (Q_NAME, right.numpy(), TypeError, "name and a tensor"),
    }


@pytest.mark.parametrize("case", wrong_weights())
def test_wrong_weights_change_nothing(llm: LLM, other: Checkpoint, case: str) -> None:
    name, tensor, error, message = wrong_weights()[case]
    before = copies(llm)
    state = other.model.state_dict()
    state.pop(name, None)
    with pytest.raises(error, match=message):
        llm.load_weights({**state, name: tensor})  # the wrong one comes last
    with pytest.raises(error, match=message):
        llm.load_weights([*state.items(), (name, tensor)])
    assert changed_names(llm, before) == []
    # A generator can be read only once.
    with pytest.raises(error, match=message):
        llm.load_weights(iter([("model.norm.weight", torch.zeros(48)), (name, tensor)]))
    assert changed_names(llm, before) == ["model.norm.weight"]
    generate_ids(llm, PROMPTS, greedy(2))


def test_a_spoilt_directory_changes_nothing(llm: LLM, tmp_path: Path) -> None:
    before = copies(llm)
    narrow = make_checkpoint(tmp_path, intermediate_size=64)
    with pytest.raises(ValueError, match=r"mlp.down_proj.weight' has shape \[48, 64\]"):
        llm.load_weights(narrow.path)
    with pytest.raises(ValueError, match="lacks weight files"):
        llm.load_weights(tmp_path.parent)
    for wrong in ([1], [("model.norm.weight",)], [("model.norm.weight", torch.zeros(64), 3)]):
        with pytest.raises(TypeError, match="weights must be pairs of a name and a tensor, not "):
            llm.load_weights(wrong)
    with pytest.raises(TypeError, match="a directory, not 3"):
        llm.load_weights(3)  # type: ignore[arg-type]
    assert changed_names(llm, before) == []


def test_a_tied_head(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, tie_word_embeddings=True, std=0.05)
    llm = make_llm(checkpoint.path)
    before = copies(llm)
    embedding = torch.randn(127, 48)
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        llm.load_weights(dict(zip(names, (embedding, embedding + 1), strict=True)))
    assert changed_names(llm, before) == []
    for some in (names, names[:1], names[1:]):
        embedding = torch.randn(127, 48)
        assert llm.load_weights({name: embedding.clone() for name in some}) == set(names[:1])
        assert torch.equal(parameters(llm)[names[0]], embedding)
        assert torch.equal(llm.model_runner.model.lm_head.weight, embedding)  # type: ignore[union-attr]
    llm.exit()


def test_prefixes_are_forgotten(llm: LLM, other: Checkpoint, fresh: Fresh) -> None:
    """Of a prompt of 40 tokens, two blocks of 16 stay in the cache."""
    _, tokens = fresh

    def num_cached() -> int:
        return llm.generate(PROMPTS[:1], greedy(1), use_tqdm=False)[0]["num_cached_tokens"]

    assert [num_cached(), num_cached()] == [0, 32]
    assert llm.reset_prefix_cache() is True
    assert [num_cached(), num_cached()] == [0, 32]
    llm.load_weights(other.model.state_dict())
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens
    llm.load_weights({})
    assert num_cached() == 0
    with pytest.raises(ZeroDivisionError):
        llm.load_weights((name, 1 // 0) for name in ["model.norm.weight"])  # type: ignore[misc]
    assert num_cached() == 0


def test_prefixes_can_be_forgotten_while_requests_run(llm: LLM) -> None:
    expected = generate_ids(llm, [PROMPTS[0]], greedy(20))
    llm.reset_prefix_cache()
    llm.add_request(PROMPTS[0], greedy(20))
    for _ in range(10):  # its second token block becomes full meanwhile
        llm.step()
    llm.reset_prefix_cache()
    number = llm.add_request(PROMPTS[0], greedy(20))
    results = {}
    while not llm.is_finished():
        results.update(llm.step()[0])
    assert results[number]["num_cached_tokens"] == 0
    assert [result["token_ids"] for result in results.values()] == expected * 2
    assert_idle(llm)


def test_not_while_requests_run(llm: LLM, other: Checkpoint) -> None:
    before = copies(llm)
    llm.add_request(PROMPTS[0], greedy(3))
    for call in (lambda: llm.load_weights(other.path), llm.sleep):
        with pytest.raises(RuntimeError, match="are unfinished"):
            call()
    assert changed_names(llm, before) == [] and not llm.is_sleeping()
    llm.reset()
    llm.load_weights(other.path)
    with pytest.raises(RuntimeError, match="from inside another call"):
        llm.load_weights((name, llm.generate(PROMPTS)) for name in ["x"])  # type: ignore[misc]
    llm.exit()
    for call in (lambda: llm.load_weights({}), llm.sleep, llm.wake_up, llm.reset_prefix_cache):
        with pytest.raises(RuntimeError, match="was shut down"):
            call()


# --- sleep ----------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """How much memory the system has given this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory(level: int, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, vocab_size=60_000, hidden_size=128, std=0.05)
    llm = make_llm(checkpoint.path, max_model_len=1024, num_kvcache_blocks=8192)
    assert llm.model_runner is not None
    llm.model_runner.kv_cache.fill_(1)  # before that it has addresses, and no memory
    cache_size = llm.model_runner.kv_cache.nbytes
    weights_size = sum(param.nbytes for param in parameters(llm).values())
    assert cache_size > 60e6 and weights_size > 30e6
    give_freed_memory_back()  # what the checkpoint's making has left
    before = resident_bytes()
    llm.sleep(level)
    freed = before - resident_bytes()
    expected = cache_size + (weights_size if level == 2 else 0)
    assert 0.9 * expected < freed < 1.2 * expected
    llm.wake_up()
    if level == 2:
        llm.load_weights(checkpoint.model.state_dict())
    head = checkpoint.model.state_dict()["lm_head.weight"]
    assert torch.equal(parameters(llm)["lm_head.weight"], head)
    llm.exit()


def test_level_1_keeps_the_weights(llm: LLM) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(12))
    before = copies(llm)
    for _ in range(2):
        llm.sleep()
        assert llm.is_sleeping()
        llm.wake_up()
        assert not llm.is_sleeping()
        assert changed_names(llm, before) == []
        assert llm.generate(PROMPTS[:1], greedy(1))[0]["num_cached_tokens"] == 0
        assert generate_ids(llm, PROMPTS, greedy(12)) == expected


def test_level_2_wants_all_weights_back(llm: LLM, other: Checkpoint, fresh: Fresh) -> None:
    expected, tokens = fresh
    llm.sleep(level=2)
    for ask in (
        lambda: llm.generate(PROMPTS),
        lambda: llm.add_request(PROMPTS[0]),
        lambda: next(llm.stream(PROMPTS)),
        lambda: llm.embed(PROMPTS),
        lambda: llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=2)),
    ):
        with pytest.raises(RuntimeError, match=r"sleeps \(weights, kv_cache\); call wake_up"):
            ask()
    with pytest.raises(RuntimeError, match="the weights sleep"):
        llm.load_weights(other.path)
    # What a trainer on the same GPU does, which needs the cache's memory until the last moment.
    llm.wake_up(tags=["weights"])
    state = other.model.state_dict()
    norm = state.pop("model.norm.weight")
    llm.load_weights(state)
    with pytest.raises(RuntimeError, match=r"sleeps \(kv_cache\)"):
        llm.generate(PROMPTS)
    assert llm.is_sleeping()
    llm.wake_up("kv_cache")
    assert not llm.is_sleeping()
    with pytest.raises(RuntimeError, match=r"1 tensors have not .* \(model.norm.weight"):
        llm.generate(PROMPTS)
    llm.load_weights({"model.norm.weight": norm})
    assert changed_names(llm, expected) == []
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens


def test_sleep_in_every_order(llm: LLM, checkpoint: Checkpoint) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(12))
    llm.wake_up()  # it is awake
    llm.sleep(1)
    llm.sleep(1)
    llm.wake_up("kv_cache")
    with pytest.raises(RuntimeError, match=r"sleeps \(weights\)"):
        llm.generate(PROMPTS)
    llm.sleep(2)  # what was kept is dropped
    llm.sleep(1)
    llm.wake_up(["kv_cache", "weights"])
    with pytest.raises(RuntimeError, match="call load_weights"):
        llm.generate(PROMPTS)
    llm.load_weights(checkpoint.path)
    assert generate_ids(llm, PROMPTS, greedy(12)) == expected
    for level in (0, 3, True, "1", None):
        with pytest.raises(ValueError, match="level must be 1"):
            llm.sleep(level)  # type: ignore[arg-type]
    llm.sleep()
    with pytest.raises(TypeError, match="tags must be a string, a list of strings or None, not 5"):
        llm.wake_up(5)
    for tags in ("cache", ["weights", "kv"]):
        with pytest.raises(ValueError, match="tags must be of weights, kv_cache"):
            llm.wake_up(tags)
    llm.exit()  # asleep


def test_it_sleeps_on_where_the_memory_is_taken(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate_ids(llm, PROMPTS, greedy(12))
    llm.sleep()

    def fail(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("somebody else has it")

    with monkeypatch.context() as patch:
        patch.setattr("nanovllm.training.memory.attach", fail)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            llm.wake_up()
    assert llm.is_sleeping() and llm.model_runner.kv_cache.nbytes == 0  # type: ignore[union-attr]
    llm.wake_up()
    assert generate_ids(llm, PROMPTS, greedy(12)) == expected


# --- log-probabilities ----------------------------------------------------------------------------


def test_processed_logprobs_in_the_engine(checkpoint: Checkpoint) -> None:
    """At temperature 0.5 the two modes differ by a division; a row of top_k=2 has two tokens."""
    params = [
        SamplingParams(temperature=0.5, seed=1, max_tokens=5, logprobs=20),
        SamplingParams(temperature=0.5, top_k=2, seed=1, max_tokens=5, logprobs=20),
    ]
    reported = {}
    for mode in ("raw_logprobs", "processed_logprobs"):
        llm = make_llm(checkpoint.path, logprobs_mode=mode)
        reported[mode] = llm.generate(PROMPTS[:1] * 2, params, use_tqdm=False)
        llm.exit()
    raw, processed = reported.values()
    for first, second in zip(raw, processed, strict=True):
        assert first["token_ids"] == second["token_ids"]
    for logprobs in processed[1]["logprobs"]:
        assert sum(value > -inf for value in logprobs.values()) == 2
        assert sum(exp(value) for value in logprobs.values()) == pytest.approx(1, abs=1e-5)
    logits = checkpoint.logits(PROMPTS[0] + raw[0]["token_ids"])[len(PROMPTS[0]) - 1 : -1]
    expected = (logits / 0.5).log_softmax(-1)
    for row, logprobs in zip(expected.tolist(), processed[0]["logprobs"], strict=True):
        for token_id, value in logprobs.items():
            assert value == pytest.approx(row[token_id], abs=1e-3)
    with pytest.raises(ValueError, match="logprobs_mode must be one of raw_logprobs, processed_"):
        make_llm(checkpoint.path, logprobs_mode="raw_logits")


# --- ranks ----------------------------------------------------------------------------------------


def test_two_ranks(checkpoint: Checkpoint, other: Checkpoint, fresh: Fresh) -> None:
    _, old_tokens = results_of(checkpoint.path)
    _, tokens = fresh
    llm = make_llm(checkpoint.path, tensor_parallel_size=2)
    assert generate_ids(llm, PROMPTS, greedy(12)) == old_tokens
    llm.load_weights((name, tensor) for name, tensor in other.model.state_dict().items())
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens
    with pytest.raises(ValueError, match="no tensor"):
        llm.load_weights({"x": torch.zeros(1)})
    with pytest.raises(ZeroDivisionError):
        llm.load_weights((name, 1 // 0) for name in ["x"])  # type: ignore[misc]
    llm.sleep()
    llm.wake_up()
    assert generate_ids(llm, PROMPTS, greedy(12)) == tokens
    llm.sleep(level=2)
    llm.wake_up()
    bfloat16 = {name: tensor.bfloat16() for name, tensor in checkpoint.model.state_dict().items()}
    llm.load_weights(bfloat16)
    assert generate_ids(llm, PROMPTS, greedy(12)) == old_tokens
    # Ranks that are out of step could only wait for each other: a fault of one ends the engine.
    assert llm._channel is not None
    llm._channel.processes[0].kill()
    with pytest.raises(RuntimeError, match="tensor-parallel rank 1 died"):
        llm.load_weights(bfloat16)
    with pytest.raises(RuntimeError, match="was shut down"):
        llm.load_weights(bfloat16)
