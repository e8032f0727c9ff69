"""The attention backend for Hopper on a CPU, with a reference in its kernel's place."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_llm, random_prompts
from torch import Tensor

from nanovllm.kernels import attention_backend
from nanovllm.kernels.attention_backend import TORCH, AttentionOptions, HopperBackend, PrefillPlan
from nanovllm.kernels.gate_up_gemm import can_fuse_gate
from nanovllm.kernels.hopper_prefill import serves_hopper_prefill
from nanovllm.kernels.prefill_tiles import tiled_prefill_torch
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.warm_up import cached_prefills

BACKEND = HopperBackend("torch", TORCH.norm_rope_store, TORCH.prefill, TORCH.decode)


def to_device(values: Any, dtype: Any = None) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=dtype))


class Reference:
    """`hopper_prefill` in PyTorch, which counts its calls."""

    def __init__(self) -> None:
        self.num_calls = {"cached": 0, "fresh": 0}

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        tiles: Tensor,
        block_tables: Tensor | None,
        block_size: int,
        scale: float,
        v_scale: float | None = None,
    ) -> Tensor:
        assert v_scale is None
        self.num_calls["fresh" if block_tables is None else "cached"] += 1
        if block_tables is None:
            # Each tile gets a table of its own, of blocks of one slot: the rows of its sequence.
            block_size = 1
            tiles = tiles.clone()
            first_rows = tiles[:, 0] - tiles[:, 2]
            tiles[:, 3] = torch.arange(len(tiles))
            block_tables = first_rows[:, None] + torch.arange(len(k))
        caches = [x.reshape(-1, block_size, *x.shape[1:]) for x in (k, v)]
        return tiled_prefill_torch(q, caches[0], caches[1], tiles, block_tables, scale)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Reference:
    reference = Reference()
    monkeypatch.setattr(attention_backend, "HOPPER_MIN_TOKENS", 2)
    monkeypatch.setattr(attention_backend, "hopper_prefill", reference)
    return reference


@pytest.mark.parametrize("options", [{}, dict(max_num_batched_tokens=150)], ids=["whole", "chunks"])
def test_tokens_of_transformers(
    checkpoint: Checkpoint, reference: Reference, options: dict[str, int]
) -> None:
    prompts = random_prompts(3, [1, 16, 140, 250])
    prompts.append(prompts[-1][:100] + [5, 6])
    expected = checkpoint.complete(prompts, 6)
    llm = make_llm(checkpoint.path, 1, **options)
    try:
        runner = llm.model_runner
        assert runner is not None
        runner.backend = BACKEND
        for layer in runner.attention_layers:
            layer.backend = BACKEND
        assert generate_ids(llm, prompts[:-1], greedy(6)) == expected[:-1]
        assert generate_ids(llm, prompts, greedy(6)) == expected  # with prefix hits
        assert reference.num_calls["fresh"] > 0
        assert reference.num_calls["cached"] > 0
    finally:
        llm.exit()


def make_plan() -> PrefillPlan:
    """Of two sequences, with 3 and 130 new tokens."""
    return BACKEND.plan_prefill([3, 130], [3, 140], np.zeros((2, 1), np.int32), torch.from_numpy)


def test_the_plan_has_tiles_but_for_the_last_tokens(reference: Reference) -> None:
    plan = make_plan()
    assert plan.tiles is not None
    assert plan.tiles.tolist() == [[131, 2, 138, 1], [3, 128, 10, 1], [0, 3, 0, 0]]
    last = BACKEND.last_tokens_plan(plan)
    assert isinstance(last, PrefillPlan) and last.tiles is None


def test_small_prefills_have_no_tiles() -> None:
    assert make_plan().tiles is None


@pytest.mark.parametrize("options", [dict(window=8), dict(softcap=5.0)], ids=["window", "cap"])
def test_windows_and_caps_are_left_to_the_other_kernel(
    reference: Reference, options: dict[str, float]
) -> None:
    cache = torch.zeros(1, 256, 1, 16)
    rows = torch.zeros(133, 1, 16)
    attention = AttentionOptions(1.0, **options)  # type: ignore[arg-type]
    BACKEND.attend(rows, rows, rows, cache, cache, make_plan(), attention)
    assert reference.num_calls == {"cached": 0, "fresh": 0}


def test_other_devices_do_without() -> None:
    assert not serves_hopper_prefill(256, 128, torch.bfloat16)
    x = torch.zeros(8192, 64, dtype=torch.bfloat16)
    assert not can_fuse_gate(x, torch.zeros(512, 64), in_graph=False)
    layer = torch.nn.Linear(64, 512)
    assert not UNQUANTIZED.applies_activation(layer, x)


@pytest.mark.parametrize("most_tokens, sizes", [(4095, [1]), (4096, [1, 4096])])
def test_start_up_compiles_what_reads_the_cache(most_tokens: int, sizes: list[int]) -> None:
    """Else the first large prefill behind a cached prefix would wait for the compiler."""
    config: Any = SimpleNamespace(
        max_num_seqs=8,
        max_num_batched_tokens=most_tokens,
        max_model_len=4096,
        kvcache_block_size=256,
    )
    made = list(cached_prefills(config, BACKEND, to_device))
    plans = [inputs.attention for inputs in made]
    assert [plan.max_seqlen_q for plan in plans] == sizes
    assert [plan.tiles is not None for plan in plans] == [size >= 4096 for size in sizes]
    for plan in plans:
        assert plan.max_seqlen_k == plan.max_seqlen_q + 1 <= 256 * plan.block_tables.shape[1]
    assert len(list(cached_prefills(config, TORCH, to_device))) == 1
