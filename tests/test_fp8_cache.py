"""The kernels and their references with a KV cache in FP8: what is stored, and attention to it.

Attention is compared with float64 attention, written out below, over the same rounded K and V. In
the interpreter, e4m3.py converts; on a GPU tests/gpu/test_fp8_cache_gpu.py runs the same kernels.
"""

import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from e4m3 import convert_e4m3_by_torch
from torch import Tensor

from nanovllm.checkpoints.kv_scales import FP8, KVScales
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_plan import AttentionOptions
from nanovllm.kernels.copy_blocks import copy_blocks
from nanovllm.kernels.cpu_attention import CpuStep
from nanovllm.kernels.decode_config import DecodeConfig, decode_config
from nanovllm.kernels.fp8_cache import round_to_cache
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch, rotate
from nanovllm.kernels.paged_decode import paged_decode, paged_decode_torch
from nanovllm.kernels.prefill_config import PrefillConfig
from nanovllm.kernels.prefill_parts import cut_keys, make_arrivals
from nanovllm.kernels.prefill_tiles import make_tiles, tiled_prefill, tiled_prefill_torch
from nanovllm.kernels.prefix_groups import Groups, TileLimits, make_prefix_tiles
from nanovllm.kernels.prefix_tensors import SharedPrefixes
from nanovllm.kernels.rms_norm import rms_norm_torch
from nanovllm.kernels.shared_prefix import (
    PrefixConfig,
    shared_prefix_decode,
    shared_prefix_decode_torch,
)
from nanovllm.kernels.torch_attention import varlen_prefill_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill
from nanovllm.sharing.copy_on_write import BlockCopy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
SCALES = KVScales(0.037, 1.3)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def right_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    convert_e4m3_by_torch(monkeypatch)


# --- what is stored -------------------------------------------------------------------------------


def in_a_cpu_step(qkv: Tensor, *arguments: Any, scales: KVScales) -> Tensor:
    step = CpuStep([len(qkv)], [len(qkv)], None)
    return step.norm_rope_store(qkv, *arguments, scales=scales)


STORES = [norm_rope_store_torch, in_a_cpu_step, pytest.param(norm_rope_store, marks=needs_triton)]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no_norm"])
@both_dtypes
def test_what_is_stored_and_what_is_returned(
    store: Any, num_parts: int, has_norm: bool, dtype: torch.dtype
) -> None:
    heads, kv_heads, dim = 5, 2, 16
    slots = torch.tensor([35, -1, 0, 7, 16], dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([3, 0, 39, 7, 22], device=DEVICE)
    angles = torch.rand(40, dim // 2, device=DEVICE) * 6
    weights = [torch.randn(dim, device=DEVICE) if has_norm else None for _ in range(2)]
    shape = (num_parts, 5, heads + 2 * kv_heads, dim)
    qkv = (torch.randn(shape) * 3).to(DEVICE, dtype)
    q, k, v = qkv.float().sum(0).split([heads, kv_heads, kv_heads], dim=1)
    if has_norm:
        q = rms_norm_torch(q, weights[0], 1e-3)  # type: ignore[arg-type]
        k = rms_norm_torch(k, weights[1], 1e-3)  # type: ignore[arg-type]
    turned = (angles.cos()[positions], angles.sin()[positions], False)
    q = rotate(q, *turned)
    k = rotate(k, *turned)
    caches = [torch.zeros(3, 16, kv_heads, dim, dtype=FP8, device=DEVICE) for _ in range(2)]
    given = qkv[0] if num_parts == 1 else qkv
    arguments = (positions, angles.cos(), angles.sin(), *weights, 1e-3, *caches, slots, heads)
    out = store(given, *arguments, scales=SCALES)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out[:, :heads].float(), q, atol=tolerance * 10, rtol=tolerance)
    out_k, out_v = out[:, heads:].chunk(2, dim=1)
    for cache, found, exact, scale in (
        (caches[0], out_k, k, SCALES.k),
        (caches[1], out_v, v, SCALES.v),
    ):
        stored = cache.flatten(0, 1)
        # What is returned is what is stored, in 16 bits, also of the token that goes nowhere.
        is_stored = slots >= 0
        rows = stored.float()[slots[is_stored].long()]
        assert torch.equal(rows, found[is_stored].float())
        assert stored.float().count_nonzero() == rows.count_nonzero() > 0
        # Within half a step of e4m3: 2^-4 of the number, or 2^-10 below its smallest normal one.
        scaled = exact / scale
        step = (scaled.abs() / 16).clamp(min=2.0**-10)
        error = (found.float() - scaled.clamp(-448, 448)).abs()
        assert (error <= step * 1.01 + tolerance * scaled.abs().max()).all()
        assert torch.equal(found.to(FP8).float(), found.float())


@pytest.mark.parametrize("store", STORES)
def test_what_is_too_large_saturates_and_nan_stays(store: Any) -> None:
    inf = float("inf")
    given = torch.tensor([460.0, -470.0, 1e5, -inf, inf, 448.0, 464.0, 449.0], device=DEVICE)
    qkv = given.repeat(2, 3, 1)  # a head of q, of k and of v
    qkv[1, :, 0] = float("nan")
    caches = [torch.zeros(1, 16, 1, 8, dtype=FP8, device=DEVICE) for _ in range(2)]
    slots = torch.tensor([4, 9], dtype=torch.int32, device=DEVICE)
    positions = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = (positions, None, None, None, None, 0.0, *caches, slots, 1)
    out = store(qkv.clone(), *arguments, scales=KVScales())
    expected = torch.where(given > 0, 448.0, -448.0)
    for cache in caches:
        assert torch.equal(cache[0, 4, 0].float(), expected)
        assert cache[0, 9, 0].float().isnan().tolist() == [True] + [False] * 7
    assert torch.equal(out[0, 1:], expected.repeat(2, 1)) and torch.equal(out[0, 0], given)


@pytest.mark.parametrize("store", STORES)
def test_a_step_of_padding_stores_nothing(store: Any) -> None:
    caches = [torch.full((1, 16, 1, 8), 3.0, device=DEVICE).to(FP8) for _ in range(2)]
    slots = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)
    positions = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    arguments = (positions, None, None, None, None, 0.0, *caches, slots, 1)
    store(torch.randn(2, 3, 8, device=DEVICE), *arguments, scales=SCALES)
    assert all((cache.float() == 3.0).all() for cache in caches)


# --- attention ------------------------------------------------------------------------------------


class Cached(NamedTuple):
    """Sequences of some lengths, in a cache whose other slots are NaN."""

    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    keys: list[Tensor]  # of each sequence `[length, kv_heads, dim]`, rounded, times the scale
    values: list[Tensor]


def cached(lengths: list[int], kv_heads: int, dim: int, block_size: int) -> Cached:
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 2
    shape = (num_blocks, block_size, kv_heads, dim)
    nan = torch.full(shape, float("nan")).to(FP8)
    assert nan.float().isnan().all()
    caches = [nan.clone().to(DEVICE) for _ in range(2)]
    free = torch.randperm(num_blocks)
    tables = torch.full((len(lengths), max(counts) + 1), -1, dtype=torch.int32)
    found: list[list[Tensor]] = [[], []]
    for seq, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[seq, :count] = free[:count]
        slots = free[:count, None] * block_size + torch.arange(block_size)
        free = free[count:]
        k, v = torch.randn(2, length, kv_heads, dim)
        rounded = round_to_cache(k * SCALES.k * 30, v * 2, SCALES)
        for kind, numbers in enumerate(rounded):
            rows = caches[kind].view(torch.uint8).flatten(0, 1)
            rows[slots.flatten()[:length].to(DEVICE)] = numbers.view(torch.uint8).to(DEVICE)
            found[kind].append(numbers.double() * SCALES[kind])
    return Cached(*caches, tables.to(DEVICE), *found)


def attention(q: Tensor, keys: Tensor, values: Tensor, scale: float, **options: Any) -> Tensor:
    """The last query sees all keys, the one before it one less; in float64, on the CPU."""
    window = options.get("window")
    softcap = options.get("softcap")
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.cpu().double(), keys.repeat_interleave(group, 1))
    scores *= scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(len(q))[:, None] + len(keys) - len(q) - torch.arange(len(keys))
    is_seen = (distance >= 0) & (distance < (window or len(keys)))
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(group, 1))


def assert_near(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)


def ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def in_cpu_steps(q: Tensor, cache: Cached, num_new: list[int], **options: Any) -> Tensor:
    """Attention as the CPU's backend computes it; for `window`, `softcap` and `scale`."""
    step = CpuStep(num_new, [len(keys) for keys in cache.keys], cache.tables.numpy())
    attends = AttentionOptions(**options).with_fp8_cache(SCALES)
    new = torch.empty(0, cache.k_cache.shape[2], q.shape[2])
    return step.attend(q, new, new, cache.k_cache, cache.v_cache, attends)


LENGTHS = [1, 16, 17, 33, 70]
# Blocks that hold whole tiles, or do not; heads that fill a tile, or do not.
CASES = pytest.mark.parametrize(
    "block_size, dim, options, dtype",
    [
        (16, 16, dict(), torch.float32),
        (64, 64, dict(), torch.float16),
        (24, 80, dict(), torch.float16),
        (24, 16, dict(window=19), torch.float16),
        (16, 80, dict(softcap=3.0), torch.float32),
    ],
    ids=str,
)


@CASES
def test_decode(block_size: int, dim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    scale = dim**-0.5
    cache = cached(LENGTHS, 2, dim, block_size)
    q = torch.randn(len(LENGTHS), 4, dim).to(DEVICE, dtype)
    expected = torch.cat(
        [
            attention(q[seq : seq + 1], keys, values, scale, **options)
            for seq, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True))
        ]
    )
    arguments = (cache.k_cache, cache.v_cache, ints(LENGTHS), cache.tables, scale * SCALES.k)
    scaled = {**options, "v_scale": SCALES.v}
    assert_near(paged_decode_torch(q, *arguments, **scaled), expected, dtype)
    if DEVICE == "cpu":
        ones = [1] * len(LENGTHS)
        assert_near(in_cpu_steps(q, cache, ones, scale=scale, **options), expected, dtype)
    if HAS_TRITON:
        for config in (None, DecodeConfig(16, 3)):
            out = paged_decode(q, *arguments, **scaled, config=config)
            assert_near(out, expected, dtype)


@pytest.mark.parametrize("num_seqs", [16, 99, 100])
def test_decode_has_tiles_of_64_tokens_and_128_registers_at_every_batch_size(
    monkeypatch: pytest.MonkeyPatch, num_seqs: int
) -> None:
    """As was measured; in 16 bits many sequences have tiles of 32."""
    monkeypatch.setattr(
        "nanovllm.kernels.decode_config.device_limits", lambda device: (132, 227 * 1024)
    )
    device = torch.device("cuda")
    config = decode_config(num_seqs, 8, 128, torch.bfloat16, device, 256, cache_dtype=FP8)
    assert config == DecodeConfig(64, 1, num_stages=3, max_registers=128)


@CASES
def test_prefill_from_the_cache(
    block_size: int, dim: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    num_new = [1, 9, 3, 17, 5]
    scale = dim**-0.5
    cache = cached(LENGTHS, 2, dim, block_size)
    q = torch.randn(sum(num_new), 4, dim).to(DEVICE, dtype)
    expected = torch.cat(
        [
            attention(queries, keys, values, scale, **options)
            for queries, keys, values in zip(
                q.split(num_new), cache.keys, cache.values, strict=True
            )
        ]
    )
    scaled = {**options, "v_scale": SCALES.v}
    borders = [ints([0, *np.cumsum(lengths).tolist()]) for lengths in (num_new, LENGTHS)]
    arguments = (cache.k_cache, cache.v_cache, *borders, max(num_new), max(LENGTHS))
    prefills: list[Any] = [varlen_prefill_torch, varlen_prefill][: 1 + HAS_TRITON]
    for prefill in prefills:
        out = prefill(q, q, q, *arguments, scale * SCALES.k, cache.tables, **scaled)
        assert_near(out, expected, dtype)
    if DEVICE == "cpu":
        assert_near(in_cpu_steps(q, cache, num_new, scale=scale, **options), expected, dtype)
    made = make_tiles(np.array(num_new), np.array(LENGTHS), len(q), 16)
    tiles = torch.from_numpy(made).to(DEVICE)
    arguments = (cache.k_cache, cache.v_cache, tiles, cache.tables, scale * SCALES.k)
    assert_near(tiled_prefill_torch(q, *arguments, **scaled), expected, dtype)
    if HAS_TRITON:
        config = PrefillConfig(16, 32, 4, 2)
        assert_near(tiled_prefill(q, *arguments, **scaled, config=config), expected, dtype)


@needs_triton
def test_prefill_of_tiles_in_parts() -> None:
    dim = 16
    dtype = torch.float16
    cache = cached([1200], 1, dim, 64)
    q = torch.randn(3, 2, dim).to(DEVICE, dtype)
    tiles = torch.from_numpy(cut_keys(make_tiles(np.array([3]), np.array([1200]), 3, 16), 8))
    assert len(tiles) > 1
    out = tiled_prefill(
        q,
        cache.k_cache,
        cache.v_cache,
        tiles.to(DEVICE),
        cache.tables,
        dim**-0.5 * SCALES.k,
        v_scale=SCALES.v,
        arrivals=make_arrivals(2, q.device),
        config=PrefillConfig(16, 64, 4, 2),
    )
    assert_near(out, attention(q, cache.keys[0], cache.values[0], dim**-0.5), dtype)


@needs_triton
@pytest.mark.parametrize("uses_tma", [True, False])
def test_prefill_copies_tiles_of_one_byte_a_number(
    uses_tma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows begin at multiples of 16 bytes where a head has 16 numbers, but not where it has 8."""
    module = sys.modules[varlen_prefill.__module__]
    described: list[torch.dtype] = []
    describe = module._tile_descriptor  # type: ignore[attr-defined]

    def recording(x: Tensor, *sizes: int) -> Any:
        described.append(x.dtype)
        return describe(x, *sizes)

    monkeypatch.setattr(module, "_tile_descriptor", recording)
    dim = 16 if uses_tma else 8
    cache = cached([70], 1, dim, 64)
    q = torch.randn(70, 1, dim).to(DEVICE, torch.float16)
    out = varlen_prefill(
        q,
        q,
        q,
        cache.k_cache,
        cache.v_cache,
        ints([0, 70]),
        ints([0, 70]),
        70,
        70,
        0.25 * SCALES.k,
        cache.tables,
        v_scale=SCALES.v,
        config=PrefillConfig(16, 32, 4, 2),
    )
    assert described == [FP8, FP8] * uses_tma
    assert_near(out, attention(q, cache.keys[0], cache.values[0], 0.25), torch.float16)


@pytest.mark.parametrize(
    "block_size, dim, splits, softcap, dtype",
    [
        (16, 16, 1, 3.0, torch.float16),
        (24, 80, 1, None, torch.float32),
        (64, 64, 3, None, torch.float16),
    ],
)
def test_shared_prefixes(
    block_size: int, dim: int, splits: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """Four sequences share their first two blocks; a fifth one shares nothing."""
    prefix = 2 * block_size
    lengths = [prefix + extra for extra in (1, 17, 30, 2)] + [41]
    cache = cached(lengths, 2, dim, block_size)
    cache.tables[1:4, :2] = cache.tables[0, :2]
    for seq in range(1, 4):
        cache.keys[seq][:prefix] = cache.keys[0][:prefix]
        cache.values[seq][:prefix] = cache.values[0][:prefix]
    groups = Groups(np.arange(4), np.array([4]), np.array([2]))
    tiles = PrefixConfig(16, 16, 4, 2)  # a GPU's tensor cores take no fewer keys
    limits = TileLimits(16 // 3, 16, 8, 4, 3)
    made, num_parts = make_prefix_tiles(groups, block_size, limits)
    prefixes = SharedPrefixes(
        tiles=torch.from_numpy(made).to(DEVICE),
        members=ints([0, 1, 2, 3, 0]),
        prefix_lens=ints([prefix] * 4 + [0]),
        num_parts=ints([int(num_parts[0])] * 4 + [0]),
        suffix_lens=ints([length - prefix for length in lengths[:4]] + [41]),
        max_parts=4,
    )
    scale = dim**-0.5
    q = torch.randn(5, 6, dim).to(DEVICE, dtype)
    expected = torch.cat(
        [
            attention(q[seq : seq + 1], keys, values, scale, softcap=softcap)
            for seq, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True))
        ]
    )
    arguments = (cache.k_cache, cache.v_cache, prefixes, cache.tables, scale * SCALES.k)
    options: dict[str, Any] = dict(softcap=softcap, v_scale=SCALES.v)
    assert_near(shared_prefix_decode_torch(q, *arguments, **options), expected, dtype)
    if HAS_TRITON:
        config = DecodeConfig(16, splits)
        out = shared_prefix_decode(q, *arguments, **options, config=config, tiles=tiles)
        assert_near(out, expected, dtype)


def test_copies_of_blocks_are_exact() -> None:
    cache = torch.randint(0, 256, (2, 3, 4, 4, 2, 8), dtype=torch.uint8).to(DEVICE)  # NaN, too
    expected = cache.clone()
    expected[:, :, 3, :3] = cache[:, :, 1, :3]
    copies = [BlockCopy(1, 3, 3)]
    copy_blocks(cache.view(FP8), copies, lambda array: torch.from_numpy(array).to(DEVICE))
    assert torch.equal(cache, expected)
