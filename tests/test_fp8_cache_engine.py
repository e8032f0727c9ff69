"""An engine with a KV cache in FP8: tokens are those of `transformers` with K and V rounded in the
same way, and do not depend on how the work was cut; float32 on the CPU.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import test_beam_search as beams
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
from e4m3 import convert_e4m3_by_torch
from safetensors.torch import load_file, save_file
from test_prefill_graphs import TORCH_TILED, add_graphs
from test_shared_prefix_engine import TORCH_SHARED, share_prefixes
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nanovllm import LLM, BeamSearchParams, SamplingParams
from nanovllm.checkpoints.kv_scales import FP8
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_backend import TRITON
from nanovllm.sharing.copy_on_write import BlockCopy

NUM_TOKENS = 10
# Of two layers, (k, v): so small that much saturates, and so large that much is below e4m3's
# smallest normal number. With other scales, or none, tokens differ.
SCALES = [(0.004, 12.0), (9.0, 0.003)]
LENGTHS = [1, 17, 33, 64, 90, 40]


def add_scales(path: Path, names: tuple[str, str]) -> None:
    """Give a checkpoint scales by these names, in layer `{}`."""
    tensors = load_file(path / "model.safetensors")
    for layer, pair in enumerate(SCALES):
        for name, scale in zip(names, pair, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def round_k_and_v(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `transformers` attend to K and V as an FP8 cache with SCALES holds them."""
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
        return (x / scale).clamp(-448, 448).to(FP8).float() * scale

    def attend(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        k_scale, v_scale = SCALES[module.layer_idx]
        return plain(module, q, rounded(k, k_scale), rounded(v, v_scale), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("calibrated")
    checkpoint = make_checkpoint(path, seed=5)
    add_scales(path, ("k_scale", "v_scale"))
    return checkpoint


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    made = random_prompts(0, LENGTHS)
    return made + [made[4][:48] + tail for tail in random_prompts(1, [3, 20])] + [made[3]]


@pytest.fixture(scope="module")
def expected(calibrated: Checkpoint, prompts: list[list[int]]) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        round_k_and_v(monkeypatch)
        rounded = calibrated.complete(prompts, NUM_TOKENS)
    exact = calibrated.complete(prompts, NUM_TOKENS)
    # All but the first, which is of one token: there is only its own V to attend to.
    assert sum(a != b for a, b in zip(rounded, exact, strict=True)) >= len(prompts) - 1
    return rounded


@pytest.fixture(scope="module")
def llm(calibrated: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(calibrated.path, kv_cache_dtype="fp8")
    yield llm
    assert_idle(llm)
    llm.exit()


CASES: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    "preemptions": dict(max_model_len=153, kvcache_block_size=4, num_kvcache_blocks=39),
    "no-prefix-caching": dict(
        enable_prefix_caching=False, max_num_batched_tokens=37, kvcache_block_size=5
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_do_not_depend_on_how_the_work_is_cut(
    calibrated: Checkpoint, prompts: list[list[int]], expected: list[list[int]], case: str
) -> None:
    llm = make_llm(calibrated.path, 1, kv_cache_dtype="fp8", **CASES[case])
    assert llm.model_runner is not None and llm.model_runner.kv_cache.dtype == FP8
    for _ in range(2):  # the second time with prefix hits
        assert generate_ids(llm, prompts, greedy(NUM_TOKENS)) == expected
    counters = llm.scheduler.counters
    assert (counters["prefix_hit_tokens"] > 0) == (case != "no-prefix-caching")
    assert (counters["preemptions"] > 0) == (case == "preemptions")
    llm.exit()


def test_prefills_as_graphs_run_them(
    calibrated: Checkpoint, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """They read new keys, too, from the cache."""
    llm = make_llm(calibrated.path, 1, kv_cache_dtype="fp8", max_num_batched_tokens=50)
    replays = add_graphs(llm, TORCH_TILED)
    for _ in range(2):
        assert generate_ids(llm, prompts, greedy(NUM_TOKENS)) == expected
    assert sum(replay.count for replay in replays) > 2
    llm.exit()


def test_shared_prefixes(
    calibrated: Checkpoint, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = prompts[4]
    members = [prefix + tail for tail in random_prompts(2, [1, 5, 17, 3, 30])] + prompts[:2]
    with monkeypatch.context() as patch:
        round_k_and_v(patch)
        expected = calibrated.complete(members, NUM_TOKENS)
    llm = make_llm(calibrated.path, 1, kv_cache_dtype="fp8")
    observed = share_prefixes(llm, TORCH_SHARED, (4, 7))
    assert generate_ids(llm, members, greedy(NUM_TOKENS)) == expected
    assert observed.num_replays > 4
    llm.exit()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_by_our_kernels(
    calibrated: Checkpoint,
    prompts: list[list[int]],
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prefill of new keys, one behind cached ones, and decode."""
    convert_e4m3_by_torch(monkeypatch)
    llm = make_llm(calibrated.path, 1, kv_cache_dtype="fp8")
    runner = llm.model_runner
    assert runner is not None
    runner.backend = TRITON
    for layer in runner.attention_layers:
        layer.backend = TRITON
    for _ in range(2):
        found = generate_ids(llm, prompts[1:3], greedy(3))
        assert found == [tokens[:3] for tokens in expected[1:3]]
    assert llm.scheduler.counters["prefix_hit_tokens"] > 0
    llm.exit()


def test_several_completions_share_and_copy_blocks(
    calibrated: Checkpoint, llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is that of a request alone, in an engine that shares nothing."""
    params = SamplingParams(temperature=0.8, seed=3, n=4, max_tokens=8, ignore_eos=True)
    copied: list[BlockCopy] = []
    runner = llm.model_runner
    assert runner is not None
    copy_blocks = runner.copy_blocks

    def recording(copies: list[BlockCopy]) -> None:
        copied.extend(copies)
        copy_blocks(copies)

    monkeypatch.setattr(runner, "copy_blocks", recording)
    outputs = llm.generate(prompts[1:3], params, use_tqdm=False)
    assert len(copied) == 6  # of each prompt's last block, for all but one completion
    alone = make_llm(
        calibrated.path, kv_cache_dtype="fp8", max_num_seqs=1, enable_prefix_caching=False
    )
    for output, prompt in zip(outputs, prompts[1:3], strict=True):
        (expected,) = alone.generate([prompt], params, use_tqdm=False)
        found = [completion["token_ids"] for completion in output["completions"]]
        assert found == [completion["token_ids"] for completion in expected["completions"]]
        assert len({tuple(tokens) for tokens in found}) > 1
    alone.exit()


def test_beam_search(
    calibrated: Checkpoint,
    llm: LLM,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outputs = llm.beam_search(prompts[1:3], BeamSearchParams(3, 6, ignore_eos=True))
    round_k_and_v(monkeypatch)
    model = calibrated.model
    expected = [beams.reference(model, prompt, 3, 1.0, [], 6) for prompt in prompts[1:3]]
    beams.check(outputs, expected, 1.0)


def test_several_ranks(
    calibrated: Checkpoint, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    llm = make_llm(calibrated.path, kv_cache_dtype="fp8", tensor_parallel_size=2)
    assert generate_ids(llm, prompts, greedy(NUM_TOKENS)) == expected
    llm.exit()


def test_sleep_and_new_weights_keep_the_cache_in_fp8(
    calibrated: Checkpoint, llm: LLM, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        if level == 2:
            llm.load_weights(calibrated.path)  # in which there are scales, too
        assert llm.model_runner is not None and llm.model_runner.kv_cache.dtype == FP8
        assert generate_ids(llm, prompts[:3], greedy(NUM_TOKENS)) == expected[:3]


def test_twice_the_blocks_in_the_same_memory(calibrated: Checkpoint) -> None:
    found = []
    for name in ("auto", "fp8"):
        llm = make_llm(
            calibrated.path,
            kv_cache_dtype=name,
            dtype="bfloat16",
            num_kvcache_blocks=-1,
            kv_cache_memory_bytes=1_000_000,
        )
        assert llm.model_runner is not None
        assert llm.model_runner.kv_cache.nbytes <= 1_000_000
        found.append(llm.config.num_kvcache_blocks)
        llm.exit()
    # 2 (K and V) x 2 layers x 16 tokens x 2 heads x 16 numbers of 2 bytes, or of 1
    assert found == [1_000_000 // 4096, 1_000_000 // 2048]


@pytest.mark.parametrize(
    "names",
    [
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("attn.k_scale", "attn.v_scale"),
    ],
    ids=str,
)
def test_scales_by_other_names(
    tmp_path: Path,
    prompts: list[list[int]],
    expected: list[list[int]],
    names: tuple[str, str],
) -> None:
    make_checkpoint(tmp_path, seed=5)
    add_scales(tmp_path, names)
    llm = make_llm(str(tmp_path), kv_cache_dtype="fp8_e4m3")
    assert generate_ids(llm, prompts[:3], greedy(NUM_TOKENS)) == expected[:3]
    llm.exit()


def test_a_checkpoint_can_ask_for_it(
    tmp_path: Path, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    """As compressed-tensors writes it where nothing but the cache is quantised."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    scheme = quantization.QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    said = quantization.QuantizationConfig(config_groups={}, kv_cache_scheme=scheme)
    make_checkpoint(tmp_path, seed=5)
    add_scales(tmp_path, ("k_scale", "v_scale"))
    edit_json(tmp_path / "config.json", quantization_config=said.model_dump(mode="json"))
    llm = make_llm(str(tmp_path))
    assert llm.config.kv_cache_dtype == FP8
    assert generate_ids(llm, prompts[:3], greedy(NUM_TOKENS)) == expected[:3]
    llm.exit()


def test_a_16_bit_cache_ignores_the_scales(
    calibrated: Checkpoint, prompts: list[list[int]]
) -> None:
    exact = calibrated.complete(prompts[:3], NUM_TOKENS)
    llm = make_llm(calibrated.path)
    assert generate_ids(llm, prompts[:3], greedy(NUM_TOKENS)) == exact
    llm.exit()
