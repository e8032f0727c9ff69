"""Sliding windows and soft caps of attention: each backend against float64 attention, written out
below.

Without a GPU the Triton kernels run in Triton's interpreter (tests/conftest.py turns it on).
"""

import pytest
import torch
from test_costs import attend
from test_kernels import (
    DEVICE,
    assert_near,
    both_dtypes,
    ints,
    needs_triton,
    package_2_kvcache,
    package_2_varlen,
    package_4_varlen,
    paged,
    poisoned_memory,  # noqa: F401 (a fixture for every test here)
    prefix_sums,
    randn,
)

from nanovllm.kernels import attention_backend, flash_attention
from nanovllm.kernels.attention_backend import CPU, TORCH, AttentionOptions
from nanovllm.kernels.cpu_attention import CpuStep
from nanovllm.kernels.paged_decode import (
    DecodeConfig,
    decode_config,
    paged_decode,
    paged_decode_torch,
)
from nanovllm.kernels.prefill_config import PrefillConfig
from nanovllm.kernels.torch_attention import varlen_prefill_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill

# (window, softcap); the scores' standard deviation is 1, so that a cap of 1 changes them much.
OPTIONS = [(1, None), (7, None), (16, None), (1000, None), (None, 1.0), (40, 2.0)]
options = pytest.mark.parametrize("window, softcap", OPTIONS)


def exact_attention(q, k, v, scale, window=None, softcap=None):
    """Attention of q `[q_len, heads, dim]` over k and v `[k_len, kv_heads, dim]`, in float64.

    The last query is that of the last key. Query i sees the keys i - window < j <= i.
    """
    q_len, heads, _ = q.shape
    k_len, kv_heads, _ = k.shape
    keys = k.double().repeat_interleave(heads // kv_heads, dim=1)
    values = v.double().repeat_interleave(heads // kv_heads, dim=1)
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for row in range(q_len):
        end = k_len - q_len + row + 1
        seen = slice(0 if window is None else max(0, end - window), end)
        scores = scale * torch.einsum("hd,khd->kh", q[row].double(), keys[seen])
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.exp() / scores.exp().sum(0)
        out[row] = torch.einsum("kh,khd->hd", weights, values[seen])
    return out


# --- paged_decode ---


DECODES = [
    paged_decode_torch,
    pytest.param(paged_decode, marks=needs_triton, id="triton"),
    pytest.param(
        lambda *args, **kwargs: paged_decode(*args, **kwargs, config=DecodeConfig(16, 4)),
        marks=needs_triton,
        id="triton-4-splits",
    ),
]


def check_decode(
    decode, heads, kv_heads, head_dim, block_size, dtype, lengths, window, softcap=None, unseen=None
):
    """unseen: what keys and values in front of the window are replaced by; None: random numbers."""
    keys = [randn(n, kv_heads, head_dim, dtype=dtype) for n in lengths]
    values = [randn(n, kv_heads, head_dim, dtype=dtype) for n in lengths]
    if unseen is not None:
        for x in (*keys, *values):
            x[: max(0, len(x) - window)] = unseen
    k_cache, tables = paged(keys, block_size)
    v_cache, _ = paged(values, block_size)
    q = randn(len(lengths), heads, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    out = decode(q, k_cache, v_cache, ints(lengths), tables, scale, window=window, softcap=softcap)
    for i, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(out[i], torch.zeros_like(out[i]))
        else:
            row = slice(i, i + 1)
            expected = exact_attention(q[row], keys[i], values[i], scale, window, softcap)
            assert_near(out[row], expected, dtype)


@pytest.mark.parametrize("decode", DECODES)
@options
@both_dtypes
def test_decode(decode, window, softcap, dtype):
    lengths = [0, 1, 16, 17, 66, 130]
    check_decode(decode, 3, 1, 16, 16, dtype, lengths, window, softcap)


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(6, 2, 64), (3, 1, 80), (4, 1, 256)])
@both_dtypes
def test_decode_of_any_head_size(decode, heads, kv_heads, head_dim, dtype):
    check_decode(decode, heads, kv_heads, head_dim, 16, dtype, [0, 5, 90], 20, 1.5)


@needs_triton
@pytest.mark.parametrize("block_size, splits", [(16, 1), (16, 2), (24, 4), (64, 8)])
@pytest.mark.parametrize("window", [1, 16, 17, 40])
def test_decode_reads_nothing_in_front_of_the_window(block_size, splits, window):
    def decode(*args, **kwargs):
        return paged_decode(*args, **kwargs, config=DecodeConfig(16, splits))

    lengths = [0, 1, 17, 31, 40, 41, 100]
    nan = float("nan")
    check_decode(decode, 2, 1, 16, block_size, torch.float32, lengths, window, unseen=nan)


@pytest.mark.parametrize("decode", DECODES)
def test_a_soft_cap_holds_huge_scores(decode):
    """The power in the kernel's tanh overflows; each value must still get its weight."""
    values = randn(40, 1, 16)
    k_cache, tables = paged([1e4 * randn(40, 1, 16)], 16)
    v_cache, _ = paged([values], 16)
    q = randn(1, 1, 16)
    out = decode(q, k_cache, v_cache, ints([40]), tables, 1.0, softcap=0.5)
    keys = k_cache.flatten(0, 1)[tables[0, :3].long()[:, None] * 16 + torch.arange(16)]
    expected = exact_attention(q, keys.flatten(0, 1)[:40], values, 1.0, softcap=0.5)
    assert_near(out, expected, torch.float32)


@pytest.mark.parametrize(
    "window, splits", [(None, 32), (8000, 32), (1024, 17), (512, 9), (65, 2), (64, 2), (1, 1)]
)
def test_a_window_has_no_more_splits_than_tiles(monkeypatch, window, splits):
    monkeypatch.setattr(
        "nanovllm.kernels.decode_config.device_limits", lambda device: (132, 227 * 1024)
    )
    gpu = torch.device("cuda")
    assert decode_config(1, 1, 256, torch.bfloat16, gpu, 256, window).num_splits == splits


# --- varlen_prefill ---


PREFILLS = [
    varlen_prefill_torch,
    pytest.param(varlen_prefill, marks=needs_triton, id="triton"),
    pytest.param(
        lambda *args, **kwargs: varlen_prefill(*args, **kwargs, config=PrefillConfig(16, 32, 4, 2)),
        marks=needs_triton,
        id="triton-short-tiles",
    ),
    pytest.param(
        lambda *args, **kwargs: varlen_prefill(*args, **kwargs, config=PrefillConfig(64, 16, 4, 2)),
        marks=needs_triton,
        id="triton-long-tiles",
    ),
]


def check_prefill(
    prefill, heads, kv_heads, head_dim, dtype, lengths, block_size, window, softcap=None
):
    """`lengths`: (new, all) tokens of each sequence; block_size: of the cache, which has all keys;
    None: all tokens are new.
    """
    scale = head_dim**-0.5
    q_lens, k_lens = zip(*lengths, strict=True)
    q = randn(sum(q_lens), heads, head_dim, dtype=dtype)
    keys = [randn(n, kv_heads, head_dim, dtype=dtype) for n in k_lens]
    values = [randn(n, kv_heads, head_dim, dtype=dtype) for n in k_lens]
    k, v = torch.cat(keys), torch.cat(values)
    k_cache = v_cache = tables = None
    if block_size is not None:
        k_cache, tables = paged(keys, block_size)
        v_cache, _ = paged(values, block_size)
    out = prefill(
        q,
        k,
        v,
        k_cache,
        v_cache,
        prefix_sums(q_lens),
        prefix_sums(k_lens),
        max(q_lens),
        max(k_lens),
        scale,
        tables,
        window=window,
        softcap=softcap,
    )
    expected = [
        exact_attention(*inputs, scale, window, softcap)
        for inputs in zip(q.split(q_lens), keys, values, strict=True)
    ]
    assert_near(out, torch.cat(expected), dtype)


@pytest.mark.parametrize("prefill", PREFILLS)
@options
@both_dtypes
def test_prefill_of_fresh_sequences(prefill, window, softcap, dtype):
    lengths = [(n, n) for n in (1, 15, 16, 33, 100)]
    check_prefill(prefill, 2, 1, 16, dtype, lengths, None, window, softcap)


@pytest.mark.parametrize("prefill", PREFILLS)
@options
@pytest.mark.parametrize("block_size", [24, 64])
def test_prefill_after_a_cached_prefix(prefill, window, softcap, block_size):
    lengths = [(1, 1), (1, 70), (5, 21), (40, 40), (70, 150)]
    check_prefill(prefill, 2, 1, 16, torch.float32, lengths, block_size, window, softcap)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 64), (3, 1, 80), (2, 1, 256)])
@both_dtypes
def test_prefill_of_any_head_size(prefill, heads, kv_heads, head_dim, dtype):
    check_prefill(prefill, heads, kv_heads, head_dim, dtype, [(20, 45), (3, 3)], 16, 20, 1.5)


@needs_triton
def test_prefill_reads_no_tile_in_front_of_the_windows():
    q, k, v = randn(128, 1, 16), randn(128, 1, 16), randn(128, 1, 16)
    k[:32] = v[:32] = float("nan")  # two tiles of keys
    bounds = prefix_sums([128])
    out = varlen_prefill(
        q,
        k,
        v,
        None,
        None,
        bounds,
        bounds,
        128,
        128,
        0.25,
        window=17,
        config=PrefillConfig(16, 16, 4, 2),
    )
    # 0 times NaN is NaN: a query from 48 on, whose tile begins to see at key 32, would show it.
    assert not out[48:].isnan().any() and out[:48].isnan().all()


# --- the CPU's plan ---


def cpu_decode(q, k_cache, v_cache, context_lens, tables, scale, window, softcap):
    plan = CPU.plan_decode(context_lens, tables)
    options = AttentionOptions(scale, window, softcap)
    return CPU.attend(q, None, None, k_cache, v_cache, plan, options)


def cpu_prefill(q, k, v, k_cache, v_cache, cu_q, cu_k, max_q, max_k, scale, tables, **options):
    num_queries, num_keys = cu_q.diff().tolist(), cu_k.diff().tolist()
    tables = None if tables is None else tables.numpy()
    plan = CPU.plan_prefill(num_queries, num_keys, tables, torch.from_numpy)
    return CPU.attend(q, k, v, k_cache, v_cache, plan, AttentionOptions(scale, **options))


cpu_only = pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's backend")


@cpu_only
@options
def test_the_cpu_decodes(window, softcap):
    lengths = [130, 129, 66, 33, 17, 16, 1]
    unseen = None if window is None else float("nan")
    check_decode(cpu_decode, 6, 2, 16, 16, torch.float32, lengths, window, softcap, unseen)


@cpu_only
@options
@pytest.mark.parametrize("block_size", [None, 16])
def test_the_cpu_prefills(window, softcap, block_size):
    lengths = [(n, n) for n in (1, 16, 40, 100)]
    if block_size is not None:
        lengths += [(5, 21), (1, 70), (1, 30), (70, 150)]
    check_prefill(cpu_prefill, 4, 2, 16, torch.float32, lengths, block_size, window, softcap)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, n) for n in (150, 149, 60, 59, 58, 3, 2, 1)],
        [(1, 64)] * 3,
        [(7, 7), (1, 1), (20, 20), (2, 2)],
        [(7, 30), (1, 40), (1, 39), (20, 20), (2, 3)],
    ],
    ids=str,
)
def test_layers_of_one_step_may_have_different_windows(lengths, in_place):
    for windows in ((4, None), (None, 4), (50, 9)):
        options = tuple(AttentionOptions(0.25, window) for window in windows)
        ours, references = (attend(b, lengths, in_place, options) for b in (CPU, TORCH))
        for mine, reference in zip(ours, references, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_cpu_reads_in_place_what_a_window_sees_in_one_piece():
    tables = torch.tensor([[9, 2, 3, 4], [9, 5, 6, 7]], dtype=torch.int32).numpy()
    cache = torch.empty(10, 16, 1, 2)
    for window in (None, 50):  # block 9 is seen, and does not lie before block 2
        (group,) = CpuStep([1], [58], tables[:1])._plan(cache, window)
        assert group.slots is not None
    (group,) = CpuStep([1], [58], tables[:1])._plan(cache, 40)  # from token 18 on, in block 2
    assert (group.slots, group.first_slot, group.num_keys) == (None, 2 * 16 + 2, 40)
    (group,) = CpuStep([1, 1], [58, 58], tables)._plan(cache, 20)  # from token 38 on
    assert (group.slots, group.first_slot, group.num_keys) == (None, 3 * 16 + 6, 20)
    assert group.distance == 3 * 16


# --- flash_attn, and what no backend takes ---


@pytest.mark.parametrize("version", ["2", "4"])
@options
def test_flash_attention_passes_the_options_on(monkeypatch, version, window, softcap):
    functions = {"2": (package_2_varlen, package_2_kvcache), "4": (package_4_varlen, None)}
    monkeypatch.setattr(flash_attention, "flash_attention_version", lambda: version)
    monkeypatch.setattr(flash_attention, "_functions", lambda: functions[version])
    flash_attention.check_flash_attention(256, 128, torch.bfloat16)
    decode, prefill = flash_attention.flash_decode, flash_attention.flash_prefill
    check_decode(decode, 4, 2, 16, 16, torch.float32, [0, 1, 33], window, softcap)
    for block_size, lengths in ((None, [(3, 3), (30, 30)]), (16, [(3, 20), (9, 9)])):
        check_prefill(prefill, 4, 2, 16, torch.float32, lengths, block_size, window, softcap)


def test_a_flash_attention_without_soft_caps_is_refused_by_name(monkeypatch):
    def older(q, k, v, window_size=(-1, -1)):
        raise AssertionError("not to be called")

    for module in (attention_backend, flash_attention):
        monkeypatch.setattr(module, "flash_attention_version", lambda: "4")
    monkeypatch.setattr(flash_attention, "_functions", lambda: (older, None))
    monkeypatch.setattr(attention_backend, "is_hopper", lambda: True)
    with pytest.raises(ValueError, match="no softcap: install .* attention_backend='triton'"):
        attention_backend.select_backend("flash_attn", "cuda", 256, 128, torch.bfloat16)
    backend = attention_backend.select_backend("auto", "cuda", 256, 128, torch.bfloat16)
    assert backend.name == "triton"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"window": 0}, "window of 0 tokens .* at least 1"),
        ({"softcap": 0.0}, "soft cap of 0.0 .* positive"),
        ({"softcap": float("nan")}, "soft cap of nan"),
    ],
)
def test_impossible_options_are_refused_with_their_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        AttentionOptions(0.25, **wrong)
