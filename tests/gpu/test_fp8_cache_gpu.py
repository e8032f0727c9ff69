"""A KV cache in FP8 on a GPU: the kernels at real sizes, and the engine.

Attention is compared with float64 attention over the same rounded K and V, of test_fp8_cache.py.
How tokens are judged is told in test_engine_gpu.py; `transformers` rounds K and V alike here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, random_prompts
from test_engine_gpu import check_choices, make
from test_fp8_cache import SCALES, Cached, attention, cached, ints
from test_fp8_cache_engine import add_scales, round_k_and_v
from torch import Tensor

from nanovllm.checkpoints.kv_scales import FP8, KVScales
from nanovllm.kernels._gluon import TILE_ROWS, can_run_gluon
from nanovllm.kernels.decode_config import DecodeConfig
from nanovllm.kernels.fp8_cache import round_to_cache
from nanovllm.kernels.hopper_prefill import hopper_prefill
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_torch
from nanovllm.kernels.prefill_config import prefill_config
from nanovllm.kernels.prefill_parts import cut_keys, make_arrivals
from nanovllm.kernels.prefill_tiles import make_tiles, tiled_prefill
from nanovllm.kernels.prefix_groups import Groups, TileLimits, make_prefix_tiles
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.shared_prefix import prefix_config, shared_prefix_decode
from nanovllm.kernels.varlen_prefill import varlen_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA GPU with FP8",
    ),
]

VOCAB = 1000
NUM_TOKENS = 24
# Relative to the norm of the result, as in test_attention_gpu.py.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
SHAPES = pytest.mark.parametrize(
    "heads, kv_heads, dim, block_size, options",
    [
        (16, 8, 128, 256, dict()),  # Qwen3-0.6B
        (32, 8, 128, 16, dict(window=300)),
        (14, 2, 64, 48, dict()),
        (8, 4, 256, 64, dict(softcap=5.0)),  # Gemma 2
        (6, 1, 80, 20, dict()),  # blocks that tiles cross
    ],
    ids=str,
)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype and not out.isnan().any()
    error = (out.cpu().double() - expected).norm() / expected.norm()
    assert error < TOLERANCE[dtype], error


def expected_of(q: Tensor, cache: Cached, num_new: list[int], **options: Any) -> Tensor:
    scale = q.shape[2] ** -0.5
    sequences = zip(q.split(num_new), cache.keys, cache.values, strict=True)
    return torch.cat([attention(*each, scale, **options) for each in sequences])


@SHAPES
@dtypes
def test_decode(
    heads: int, kv_heads: int, dim: int, block_size: int, options: dict[str, Any], dtype: Any
) -> None:
    lengths = [1, 15, 64, 65, 700, 1300]
    cache = cached(lengths, kv_heads, dim, block_size)
    q = torch.randn(len(lengths), heads + 2 * kv_heads, dim).to("cuda", dtype)[:, :heads]
    expected = expected_of(q, cache, [1] * len(lengths), **options)
    arguments = (cache.k_cache, cache.v_cache, ints(lengths), cache.tables, dim**-0.5 * SCALES.k)
    assert_near(paged_decode_torch(q, *arguments, **options, v_scale=SCALES.v), expected, dtype)
    configs = [None, DecodeConfig(16, 1), DecodeConfig(32, 5)]
    if dtype != torch.float32:
        configs += [DecodeConfig(64, 1, max_registers=128), DecodeConfig(64, 2, 4, 2)]
    for config in configs:
        out = paged_decode(q, *arguments, **options, v_scale=SCALES.v, config=config)
        assert_near(out, expected, dtype)


@SHAPES
@dtypes
def test_prefill_from_the_cache(
    heads: int, kv_heads: int, dim: int, block_size: int, options: dict[str, Any], dtype: Any
) -> None:
    lengths = [1, 64, 200, 700, 1300]
    num_new = [1, 64, 9, 300, 2]
    cache = cached(lengths, kv_heads, dim, block_size)
    q = torch.randn(sum(num_new), heads + 2 * kv_heads, dim).to("cuda", dtype)[:, :heads]
    expected = expected_of(q, cache, num_new, **options)
    caches = (cache.k_cache, cache.v_cache)
    scale = dim**-0.5 * SCALES.k
    borders = [ints([0, *np.cumsum(each).tolist()]) for each in (num_new, lengths)]
    out = varlen_prefill(
        q, q, q, *caches, *borders, 300, 1300, scale, cache.tables, **options, v_scale=SCALES.v
    )
    assert_near(out, expected, dtype)
    config = prefill_config(dim, dtype, q.device, block_size)
    tiles = make_tiles(np.array(num_new), np.array(lengths), len(q), config.block_m)
    arrivals = make_arrivals(heads, q.device)
    for wanted in (1, 60):
        listed = torch.from_numpy(cut_keys(tiles, wanted)).cuda()
        out = tiled_prefill(
            q,
            *caches,
            listed,
            cache.tables,
            scale,
            **options,
            v_scale=SCALES.v,
            arrivals=arrivals,
        )
        assert_near(out, expected, dtype)


@SHAPES
@dtypes
def test_shared_prefixes(
    heads: int, kv_heads: int, dim: int, block_size: int, options: dict[str, Any], dtype: Any
) -> None:
    if "window" in options:
        pytest.skip("layers with a window do without")
    blocks = -(-512 // block_size)
    prefix = blocks * block_size
    lengths = [prefix + 1 + seq * 7 for seq in range(20)] + [333]
    cache = cached(lengths, kv_heads, dim, block_size)
    cache.tables[1:20, :blocks] = cache.tables[0, :blocks]
    for seq in range(1, 20):
        cache.keys[seq][:prefix] = cache.keys[0][:prefix]
        cache.values[seq][:prefix] = cache.values[0][:prefix]
    q = torch.randn(len(lengths), heads + 2 * kv_heads, dim).to("cuda", dtype)[:, :heads]
    expected = expected_of(q, cache, [1] * len(lengths), **options)
    config = prefix_config(dim, dtype, q.device, block_size)
    groups = Groups(np.arange(20), np.array([20]), np.array([blocks]))
    members = config.block_m // (heads // kv_heads)
    for num_tiles in (1, 40):
        limits = TileLimits(members, config.block_n, config.block_n, 8, num_tiles)
        made, num_parts = make_prefix_tiles(groups, block_size, limits)
        prefixes = SharedPrefixes(
            tiles=torch.from_numpy(made).cuda(),
            members=ints([*range(20), 0]),
            prefix_lens=ints([prefix] * 20 + [0]),
            num_parts=ints([int(num_parts[0])] * 20 + [0]),
            suffix_lens=ints([length - prefix for length in lengths[:20]] + [333]),
            max_parts=8,
        )
        out = shared_prefix_decode(
            q,
            cache.k_cache,
            cache.v_cache,
            prefixes,
            cache.tables,
            dim**-0.5 * SCALES.k,
            v_scale=SCALES.v,
            **options,
        )
        assert_near(out, expected, dtype)


@pytest.mark.skipif(not can_run_gluon(), reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hopper_prefill_of_new_keys(dtype: torch.dtype) -> None:
    num_new = [300, 1, 129, 700]
    qkv = torch.randn(sum(num_new), 32, 128)
    rounded = round_to_cache(qkv[:, 16:24] * SCALES.k * 30, qkv[:, 24:], SCALES)
    qkv[:, 16:] = torch.cat([each.float() for each in rounded], dim=1)
    q, k, v = qkv.to("cuda", dtype).split((16, 8, 8), dim=1)
    made = make_tiles(np.array(num_new), np.array(num_new), len(q), TILE_ROWS)
    tiles = torch.from_numpy(made).cuda()
    out = hopper_prefill(q, k, v, tiles, None, 0, 128**-0.5 * SCALES.k, SCALES.v)
    keys = (rounded[0].double() * SCALES.k).split(num_new)
    values = (rounded[1].double() * SCALES.v).split(num_new)
    sequences = zip(q.split(num_new), keys, values, strict=True)
    expected = torch.cat([attention(*each, 128**-0.5) for each in sequences])
    assert_near(out, expected, dtype)


@dtypes
@pytest.mark.parametrize("num_parts", [1, 3])
def test_what_is_stored(num_parts: int, dtype: torch.dtype) -> None:
    """As the reference stores it, but for the last bit before rounding; NaN, inf, and 448."""
    shape = (num_parts, 500, 32, 128)
    qkv = (torch.randn(shape) * 5).to("cuda", dtype)
    qkv[:, 7, 24:, 3] = torch.nan
    qkv[:, 8, 24:, 4] = 1e4
    qkv[:, 9, 24:, 5] = -torch.inf
    positions = torch.arange(500, device="cuda")
    angles = torch.rand(500, 64, device="cuda") * 6
    weight = torch.rand(128, device="cuda") + 0.5
    slots = torch.randperm(512, device="cuda")[:500].int()
    slots[17] = -1
    stored = []
    for store in (norm_rope_store, norm_rope_store_torch):
        caches = [torch.zeros(2, 256, 8, 128, device="cuda").to(FP8) for _ in range(2)]
        given = (qkv[0] if num_parts == 1 else qkv).clone()
        inputs = (positions, angles.cos(), angles.sin(), weight, weight, 1e-6, *caches)
        scales = KVScales(0.01, 0.02)
        out = store(given, *inputs, slots, 16, scales=scales)
        in_cache = torch.cat(caches, dim=2).flatten(0, 1).float()[slots.long().clamp(min=0)]
        is_stored = slots >= 0
        assert torch.equal(
            out[is_stored, 16:].float().nan_to_num(1e9), in_cache[is_stored].nan_to_num(1e9)
        )
        stored.append(out[:, 16:].float())
    ours, reference = stored
    assert ours[7, 8:, 3].isnan().all() and ours.isnan().sum() == reference.isnan().sum() == 8
    assert (ours[8, 8:, 4] == 448).all() and (ours[9, 8:, 5] == -448).all()
    differs = (ours != reference) & ~ours.isnan()
    # A number between two of e4m3, which are 1/8 apart at most, may fall to either side. Besides,
    # the reference rounds the sum of three parts to 16 bits before it normalises and rotates it.
    assert differs.float().mean() < (0.05 if dtype != torch.float32 else 1e-4)
    gap = (ours - reference)[differs].abs()
    assert (gap <= reference[differs].abs() / 7 + (0.01 if num_parts == 1 else 4.0)).all()


# --- the engine -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """Whose `transformers` model rounds K and V, too."""
    path: Path = tmp_path_factory.mktemp("calibrated")
    saved = make_checkpoint(
        path,
        std=256**-0.5,
        seed=2,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
    )
    add_scales(path, ("k_scale", "v_scale"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        round_k_and_v(monkeypatch)
        yield Checkpoint(saved.path, saved.model.to("cuda"))


CASES: dict[str, dict[str, Any]] = {
    "graphs": dict(),
    "eager": dict(enforce_eager=True),
    "chunks": dict(max_num_batched_tokens=100),
    "preemptions": dict(max_model_len=800, num_kvcache_blocks=12, kvcache_block_size=128),
    "torch": dict(attention_backend="torch"),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_tokens(calibrated: Checkpoint, case: str, dtype: str) -> None:
    lengths = [1, 15, 16, 17, 64, 65, 200, 255, 256, 257, 511, 700]
    prompts = random_prompts(0, lengths, VOCAB)
    prompts += [prompts[-1][:600] + tail for tail in random_prompts(1, [3, 20, 1, 9, 30], VOCAB)]
    llm = make(calibrated, dtype=dtype, kv_cache_dtype="fp8", **CASES[case])
    assert llm.model_runner is not None and llm.model_runner.kv_cache.dtype == FP8
    for _ in range(2):  # the second time with prefix hits
        tokens = generate_ids(llm, prompts, greedy(NUM_TOKENS))
        check_choices(calibrated, prompts, tokens)
    assert (llm.scheduler.counters["preemptions"] > 0) == (case == "preemptions")
    llm.exit()


def test_sleep(calibrated: Checkpoint) -> None:
    prompts = random_prompts(3, [33, 300, 5], VOCAB)
    llm = make(calibrated, dtype="bfloat16", kv_cache_dtype="fp8")
    before = generate_ids(llm, prompts, greedy(NUM_TOKENS))
    for _ in range(2):
        llm.sleep()
        llm.wake_up()
        assert llm.model_runner is not None and llm.model_runner.kv_cache.dtype == FP8
        assert generate_ids(llm, prompts, greedy(NUM_TOKENS)) == before
    llm.exit()


def test_twice_the_blocks_for_the_gpu(calibrated: Checkpoint) -> None:
    found = []
    for name in ("auto", "fp8"):
        llm = make(
            calibrated,
            dtype="bfloat16",
            kv_cache_dtype=name,
            num_kvcache_blocks=-1,
            kv_cache_memory_bytes=64 << 20,
        )
        found.append(llm.config.num_kvcache_blocks)
        llm.exit()
    assert found[1] == 2 * found[0]
