"""Each Triton kernel, and each PyTorch reference, against plain float64 attention written out
below.

Without a GPU the Triton kernels run in Triton's interpreter (tests/conftest.py turns it on).
"""

import subprocess
import sys

import pytest
import torch

from nanovllm.kernels import attention_backend, flash_attention
from nanovllm.kernels._triton import HAS_TRITON, gemm_tile_rows, padded_empty
from nanovllm.kernels.gate_mul import gate_mul, gate_mul_torch
from nanovllm.kernels.gemv import gemv
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.paged_decode import (
    DecodeConfig,
    decode_config,
    paged_decode,
    paged_decode_torch,
)
from nanovllm.kernels.prefill_config import PrefillConfig, prefill_config
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_torch
from nanovllm.kernels.split_gemm import split_gemm, whole_tile_columns
from nanovllm.kernels.token_ranks import token_ranks, token_ranks_torch
from nanovllm.kernels.torch_attention import varlen_prefill_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory is NaN, so that an output element that a kernel forgets to write shows."""
    torch.manual_seed(0)
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    monkeypatch.setattr(torch, "empty", poisoned_empty)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def prefix_sums(lengths):
    return ints([0, *torch.tensor(lengths).cumsum(0).tolist()])


def naive_attention(q, k, v, scale):
    """q `[q_len, heads, dim]`, k and v `[k_len, kv_heads, dim]`, the last query sees all keys; in
    float64."""
    q_len, heads, _ = q.shape
    k_len, kv_heads, _ = k.shape
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for head in range(heads):
        keys, values = (x[:, head // (heads // kv_heads)].double() for x in (k, v))
        for i in range(q_len):
            seen = k_len - q_len + i + 1
            scores = keys[:seen] @ q[i, head].double() * scale
            weights = (scores - scores.max()).exp()
            out[i, head] = weights @ values[:seen] / weights.sum()
    return out


def paged(sequences, block_size, unused=-1):
    """Sequences of `[length, kv_heads, dim]` scattered over a cache; what none uses is NaN or
    `unused`."""
    _, kv_heads, dim = sequences[0].shape
    counts = [-(-len(x) // block_size) for x in sequences]
    cache = torch.full((sum(counts) + 3, block_size, kv_heads, dim), float("nan"))
    cache = cache.to(DEVICE, sequences[0].dtype)
    shuffled = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1))
    free = shuffled + 1  # block 0 stays NaN
    tables = torch.full((len(sequences), max(counts) + 2), unused, dtype=torch.int32)
    for i, (x, count) in enumerate(zip(sequences, counts, strict=True)):
        blocks, free = free[:count], free[count:]
        tables[i, :count] = blocks
        slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[: len(x)]
        cache.view(-1, kv_heads, dim)[slots.to(DEVICE)] = x
    return cache, tables.to(DEVICE)


def assert_near(out, expected, dtype):
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


# --- the elementwise kernels ---


def norm64(x, weight, eps):
    x = x.double()
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps) * weight.double()


@pytest.mark.parametrize("norm", [rms_norm_torch, pytest.param(rms_norm, marks=needs_triton)])
@pytest.mark.parametrize("rows, size", [(1, 64), (5, 100), (3, 1024)])
@both_dtypes
def test_rms_norm(norm, rows, size, dtype):
    x, weight = randn(rows, size, dtype=dtype), randn(size, dtype=dtype)
    assert_near(norm(x, weight, 1e-3), norm64(x, weight, 1e-3), dtype)


@needs_triton
@pytest.mark.parametrize(
    "out_size, in_size",
    [(10, 48), (33, 1500), (7, 3072), (9, 1024), (9, 4608), (2, 6912), (2, 10000), (3, 17000)],
)
@both_dtypes
def test_gemv(out_size, in_size, dtype):
    x, weight = randn(1, in_size, dtype=dtype), randn(out_size, in_size, dtype=dtype) / in_size**0.5
    bias, norm, residual = (
        randn(*shape, dtype=dtype) for shape in ((out_size,), (in_size,), (1, out_size))
    )
    assert_near(gemv(x, weight), x.double() @ weight.double().T, dtype)
    expected = residual.double() + norm64(x, norm, 1e-3) @ weight.double().T + bias.double()
    out = gemv(x, weight, bias, norm, 1e-3, residual)
    assert out is residual  # in place
    assert_near(out, expected, dtype)
    gate_up = randn(2 * out_size, in_size, dtype=dtype) / in_size**0.5
    gate, up = (norm64(x, norm, 1e-3) @ gate_up.double().T).chunk(2, dim=-1)
    assert_near(
        gemv(x, gate_up, None, norm, 1e-3, activation="silu"),
        gate / (1 + torch.exp(-gate)) * up,
        dtype,
    )


@needs_triton
@pytest.mark.parametrize("num_tokens, splits", [(2, 3), (33, 1), (140, 2)])
@pytest.mark.parametrize("out_size, in_size", [(10, 48), (130, 1496), (64, 3072)])
@both_dtypes
def test_split_gemm(num_tokens, splits, out_size, in_size, dtype):
    x, weight = (
        randn(num_tokens, in_size, dtype=dtype),
        randn(out_size, in_size, dtype=dtype) / in_size**0.5,
    )
    for bias in (None, randn(out_size, dtype=dtype)):
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        partial_sums = split_gemm(x, weight, bias, splits)
        used_splits = splits if in_size > 48 else 1  # no split is empty
        assert partial_sums.shape == (used_splits, num_tokens, out_size)
        assert_near(partial_sums.sum(0), expected, dtype)


@needs_triton
@pytest.mark.parametrize(
    "num_tokens, splits, columns",
    [(2, 3, 512), (16, 1, 1024), (17, 2, 512), (33, 2, 256), (40, 1, 0), (64, 4, 256), (65, 2, 0)],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no_bias"])
def test_split_gemm_of_whole_tiles_and_in_chunks(num_tokens, splits, columns, has_bias):
    """A width of 1024, as of Qwen3-0.6B, is a power of two; another one is not."""
    assert whole_tile_columns(num_tokens, 1024, splits, itemsize=2) == columns
    for in_size in (1024, 1000):
        x = randn(num_tokens, in_size, dtype=torch.float16)
        weight = randn(70, in_size, dtype=torch.float16) / in_size**0.5
        bias = randn(70, dtype=torch.float16) if has_bias else None
        expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
        partial_sums = split_gemm(x, weight, bias, splits)
        num_sums = -(-in_size // columns) if columns else splits
        assert partial_sums.shape == (num_sums, num_tokens, 70)
        assert_near(partial_sums.sum(0), expected, torch.float16)


@pytest.mark.parametrize(
    "num_tokens, in_size, splits, columns",
    [
        (16, 3072, 8, 512),  # six splits of 512, not eight
        (32, 1024, 1, 1024),  # the largest tiles that fit
        (16, 4096, 1, 0),
        (16, 2048, 32, 256),  # no tile is narrower
    ],
)
def test_whole_tiles_fit_the_shared_memory(num_tokens, in_size, splits, columns):
    assert whole_tile_columns(num_tokens, in_size, splits, itemsize=2) == columns


@needs_triton
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 33, 128, 140, 255])
def test_split_gemm_of_rows_with_others_behind_them(num_tokens):
    x = padded_empty(num_tokens, 64, randn(1))
    others = torch.as_strided(x, (x.untyped_storage().nbytes() // x.itemsize // 64, 64), (64, 1))
    assert len(others) == max(num_tokens, gemm_tile_rows(num_tokens)) >= 16
    others.fill_(float("nan"))
    x.copy_(randn(num_tokens, 64))
    weight = randn(80, 64)
    assert_near(split_gemm(x, weight, None, 1)[0], x.double() @ weight.double().T, torch.float32)


@needs_triton
def test_split_gemm_reads_past_the_rows_only_where_there_is_memory(monkeypatch):
    module = sys.modules[split_gemm.__module__]
    descriptor, shapes = module.TensorDescriptor, []

    def spy(x, shape, *args):
        shapes.append(shape[0])
        return descriptor(x, shape, *args)

    spy.from_tensor = descriptor.from_tensor
    monkeypatch.setattr(module, "TensorDescriptor", spy)
    x, weight = randn(40, 64), randn(80, 64)
    for rows, read in (
        (x[:17], 32),
        (x[8:25], 32),
        (x[9:26], 17),
        (x[23:], 17),
        (x[:17].clone(), 17),
        (x, 40),
    ):
        assert_near(
            split_gemm(rows, weight, None, 1)[0], rows.double() @ weight.double().T, torch.float32
        )
        assert shapes.pop() == read


@needs_triton
@pytest.mark.parametrize("num_parts, rows, size", [(1, 3, 64), (3, 5, 1000)])
@both_dtypes
def test_add_rms_norm(num_parts, rows, size, dtype):
    x, weight = randn(rows, size, dtype=dtype), randn(size, dtype=dtype)
    parts = randn(num_parts, rows, size, dtype=dtype)
    expected = x.double() + parts.double().sum(0)
    for norm in (weight, None):
        added = x.clone()
        out = add_rms_norm(added, parts, norm, 1e-3)
        assert_near(added, expected, dtype)
        assert out is None if norm is None else out is not None
        if norm is not None:
            assert_near(out, norm64(expected, norm, 1e-3), dtype)


@needs_triton
@pytest.mark.parametrize("num_parts, rows, size", [(1, 3, 64), (3, 5, 1000)])
@both_dtypes
def test_add_rms_norm_of_an_addend_that_is_changed(num_parts, rows, size, dtype):
    x, weight, post_weight = randn(rows, size, dtype=dtype), randn(size), randn(size)
    parts = randn(num_parts, rows, size, dtype=dtype)
    total = parts.double().sum(0)
    for post, scale in ((post_weight, 1.0), (None, 0.25), (post_weight, 0.25)):
        changed = total if post is None else norm64(total, post, 1e-2)
        expected = x.double() + scale * changed
        for norm in (weight, None):
            added = x.clone()
            out = add_rms_norm(added, parts, norm, 1e-3, post, 1e-2, scale)
            assert_near(added, expected, dtype)
            if norm is not None:
                assert_near(out, norm64(expected, norm, 1e-3), dtype)


@pytest.mark.parametrize("activation", [gate_mul_torch, pytest.param(gate_mul, marks=needs_triton)])
@pytest.mark.parametrize("rows, size", [(1, 16), (3, 100), (2, 1500)])
@both_dtypes
def test_gate_mul(activation, rows, size, dtype):
    x = randn(rows, 2 * size, dtype=dtype) * 3
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(activation(x), gate / (1 + torch.exp(-gate)) * up, dtype)


@needs_triton
@pytest.mark.parametrize("rows, vocab", [(1, 5), (3, 4096), (4, 10_001)])
@both_dtypes
def test_token_ranks(rows, vocab, dtype):
    logits = randn(rows, vocab + 3, dtype=dtype)[:, :vocab] * 5
    logits[0, vocab // 2] = float("-inf")
    token_ids = torch.tensor([vocab // 2, 0, vocab - 1, 1][:rows], device=DEVICE)
    ours = token_ranks(logits, token_ids)
    for found in (ours, token_ranks_torch(logits, token_ids)):
        exact = logits.double()
        torch.testing.assert_close(
            found.logsumexp, exact.logsumexp(1).float(), atol=2e-5, rtol=1e-6
        )
        given = exact.gather(1, token_ids[:, None])
        assert torch.equal(found.ranks, 1 + (exact > given).sum(1))
        assert torch.equal(exact.gather(1, found.likeliest[:, None])[:, 0], exact.amax(1))
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    assert torch.equal(ours.likeliest, first)  # in float16 some are equally likely


def rotated64(x, positions, cos, sin):
    """Each pair (i, i + dim / 2) as a complex number times exp(i angle), in float64."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double())
    turned = turned * torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize(
    "fused", [norm_rope_store_torch, pytest.param(norm_rope_store, marks=needs_triton)]
)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 16), (3, 1, 24), (12, 4, 64)])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("num_parts", [0, 1, 3])  # 0: not in parts
@both_dtypes
def test_norm_rope_store(fused, heads, kv_heads, head_dim, has_norm, num_parts, dtype):
    slots = [35, -1, 0, 7, -1, 16, 47]
    positions = torch.tensor([3, 0, 39, 7, 1, 22, 22], device=DEVICE)
    angles = (torch.rand(40, head_dim // 2) * 6).to(DEVICE)
    cos, sin = angles.cos(), angles.sin()
    weights = [randn(head_dim, dtype=dtype) if has_norm else None for _ in range(2)]
    qkv = randn(max(1, num_parts), len(slots), heads + 2 * kv_heads, head_dim, dtype=dtype)
    q, k, v = qkv.double().sum(0).split([heads, kv_heads, kv_heads], dim=1)
    if has_norm:
        q, k = (norm64(x, weight, 1e-6) for x, weight in zip((q, k), weights, strict=True))
    q, k = (rotated64(x, positions, cos, sin) for x in (q, k))
    caches = [randn(3, 16, kv_heads, head_dim, dtype=dtype) for _ in range(2)]
    expected = [cache.double() for cache in caches]
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[0][slot // 16, slot % 16] = k[token]
            expected[1][slot // 16, slot % 16] = v[token]
    out = fused(
        qkv[0] if num_parts == 0 else qkv,
        positions,
        cos,
        sin,
        *weights,
        1e-6,
        *caches,
        ints(slots),
        heads,
    )
    assert num_parts > 0 or out.data_ptr() == qkv.data_ptr()  # in place
    assert_near(out, torch.cat((q, k, v), dim=1), dtype)
    for cache, want in zip(caches, expected, strict=True):
        assert_near(cache, want, dtype)


@pytest.mark.parametrize(
    "fused", [norm_rope_store_torch, pytest.param(norm_rope_store, marks=needs_triton)]
)
@pytest.mark.parametrize("slots", [None, [-1, -1, -1]], ids=["no_cache_yet", "padding"])
def test_nothing_is_stored_where_there_is_no_slot(fused, slots):
    qkv, cache, angles = randn(3, 6, 16), randn(2, 16, 2, 16), randn(9, 8)
    k_cache, v_cache = cache.clone(), cache.clone()
    mapping = None if slots is None else ints(slots)
    positions = torch.tensor([1, 2, 8], device=DEVICE)
    fused(qkv, positions, angles.cos(), angles.sin(), None, None, 0.0, k_cache, v_cache, mapping, 2)
    assert torch.equal(k_cache, cache) and torch.equal(v_cache, cache)


# --- paged_decode ---

DECODES = [
    paged_decode_torch,
    pytest.param(paged_decode, marks=needs_triton, id="triton"),
    pytest.param(
        lambda *args: paged_decode(*args, config=DecodeConfig(32, 4)),
        marks=needs_triton,
        id="triton-4-splits",
    ),
]


def check_decode(decode, heads, kv_heads, head_dim, block_size, dtype, lengths, unused=-1):
    keys = [randn(n, kv_heads, head_dim, dtype=dtype) for n in lengths]
    values = [randn(n, kv_heads, head_dim, dtype=dtype) for n in lengths]
    k_cache, tables = paged(keys, block_size, unused)
    v_cache, _ = paged(values, block_size, unused)
    q = randn(len(lengths), heads, head_dim, dtype=dtype)
    scale = head_dim**-0.5
    out = decode(q, k_cache, v_cache, ints(lengths), tables, scale)
    assert out.shape == q.shape
    for i, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(out[i], torch.zeros_like(out[i]))
        else:
            assert_near(
                out[i : i + 1], naive_attention(q[i : i + 1], keys[i], values[i], scale), dtype
            )


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 16), (6, 2, 64), (3, 1, 80)], ids=str)
@both_dtypes
def test_decode_at_block_and_tile_borders(decode, heads, kv_heads, head_dim, dtype):
    check_decode(
        decode, heads, kv_heads, head_dim, 16, dtype, [0, 1, 15, 16, 17, 31, 33, 127, 128, 129]
    )


@pytest.mark.parametrize("decode", DECODES)
@pytest.mark.parametrize("block_size", [1, 24, 256])
@pytest.mark.parametrize("unused", [-1, 2**30])
def test_decode_with_any_block_size_reads_no_unused_entry(decode, block_size, unused):
    check_decode(decode, 4, 2, 16, block_size, torch.float32, [5, 0, 255, 257, 300], unused)


@needs_triton
@pytest.mark.parametrize("splits", [1, 2, 8, 32])
def test_decode_split_among_more_programs_than_tiles(splits):
    def decode(*args):
        return paged_decode(*args, config=DecodeConfig(16, splits))

    check_decode(decode, 4, 2, 16, 16, torch.float32, [0, 1, 16, 40, 200])


@pytest.mark.parametrize("decode", DECODES)
def test_decode_of_padding_alone_gives_zeros(decode):
    cache = torch.full((2, 16, 2, 16), float("nan"), device=DEVICE)
    tables = torch.full((3, 2), -1, dtype=torch.int32, device=DEVICE)
    out = decode(randn(3, 4, 16), cache, cache, ints([0, 0, 0]), tables, 0.25)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("decode", DECODES)
def test_decode_takes_a_query_that_is_a_slice(decode):
    k_cache, tables = paged([randn(20, 2, 16)], 16)
    qkv = randn(1, 2 * 4 * 16)
    q = qkv[:, 64:].view(1, 4, 16)
    args = (k_cache, k_cache, ints([20]), tables, 0.25)
    assert torch.equal(decode(q, *args), decode(q.clone(), *args))


@needs_triton
@pytest.mark.parametrize("stages", [2, 3, 5])
@pytest.mark.parametrize("block_size", [16, 24, 64])
def test_decode_in_tiles_that_lie_in_one_block_and_that_do_not(block_size, stages):
    def decode(*args):
        return paged_decode(*args, config=DecodeConfig(16, 2, num_stages=stages))

    check_decode(
        decode, 4, 2, 16, block_size, torch.float32, [0, 1, 31, 32, 33, 64, 65, 96, 97, 200]
    )


@pytest.mark.parametrize(
    "num_seqs, block_n, splits, registers",
    [
        (1, 64, 32, None),
        (4, 64, 16, None),
        (12, 64, 4, None),
        (13, 64, 1, None),  # a program for most multiprocessors, and for none two
        (16, 64, 1, None),
        (17, 64, 2, None),
        (33, 64, 2, None),
        (34, 64, 1, None),
        (99, 64, 1, None),
        (100, 32, 1, 128),
    ],
)
def test_decode_splits_small_batches_only(monkeypatch, num_seqs, block_n, splits, registers):
    monkeypatch.setattr(
        "nanovllm.kernels.decode_config.device_limits", lambda device: (132, 227 * 1024)
    )
    config = decode_config(num_seqs, 8, 128, torch.bfloat16, torch.device("cuda"), 256)
    assert config == DecodeConfig(block_n, splits, num_stages=3, max_registers=registers)


@pytest.mark.parametrize(
    "block_size, block_n", [(256, 64), (16, 16), (48, 16), (96, 32), (24, 64), (1, 64)]
)
def test_decode_tiles_lie_in_one_block_where_they_can(monkeypatch, block_size, block_n):
    monkeypatch.setattr(
        "nanovllm.kernels.decode_config.device_limits", lambda device: (132, 227 * 1024)
    )
    assert (
        decode_config(64, 8, 128, torch.bfloat16, torch.device("cuda"), block_size).block_n
        == block_n
    )


# --- varlen_prefill ---

PREFILLS = [
    varlen_prefill_torch,
    pytest.param(varlen_prefill, marks=needs_triton, id="triton"),
    pytest.param(
        lambda *args: varlen_prefill(*args, config=PrefillConfig(16, 32, 4, 2)),
        marks=needs_triton,
        id="triton-small-tiles",
    ),
]


def check_prefill(prefill, heads, kv_heads, head_dim, dtype, lengths, block_size=None, unused=-1):
    """`lengths`: (new, all) tokens of each sequence; with a block_size, all keys are read from the
    cache."""
    scale = head_dim**-0.5
    q_lens, k_lens = zip(*lengths, strict=True)
    cu_q, cu_k = prefix_sums(q_lens), prefix_sums(k_lens)
    qkv = randn(sum(q_lens), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q, k, v = qkv.view(-1, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    keys, values = list(k.split(q_lens)), list(v.split(q_lens))
    k_cache = v_cache = tables = None
    if block_size is not None:
        for i, (q_len, k_len) in enumerate(lengths):
            keys[i] = torch.cat([randn(k_len - q_len, kv_heads, head_dim, dtype=dtype), keys[i]])
            values[i] = torch.cat(
                [randn(k_len - q_len, kv_heads, head_dim, dtype=dtype), values[i]]
            )
        k_cache, tables = paged(keys, block_size, unused)
        v_cache, _ = paged(values, block_size, unused)
        k, v = torch.full_like(k, float("nan")), torch.full_like(v, float("nan"))  # not to be read
    out = prefill(q, k, v, k_cache, v_cache, cu_q, cu_k, max(q_lens), max(k_lens), scale, tables)
    assert out.shape == q.shape and out.is_contiguous()
    expected = [
        naive_attention(*args, scale) for args in zip(q.split(q_lens), keys, values, strict=True)
    ]
    assert_near(out, torch.cat(expected), dtype)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(2, 2, 16), (6, 2, 64), (3, 1, 80)], ids=str)
@both_dtypes
def test_prefill_of_fresh_sequences(prefill, heads, kv_heads, head_dim, dtype):
    lengths = [1, 15, 32, 33, 2, 50]
    check_prefill(prefill, heads, kv_heads, head_dim, dtype, [(n, n) for n in lengths])


@pytest.mark.parametrize("prefill", PREFILLS)
@both_dtypes
def test_prefill_of_the_last_tokens_of_fresh_sequences(prefill, dtype):
    lengths = [1, 15, 32, 33, 2, 50]
    bounds, (q, k, v) = prefix_sums(lengths), randn(133, 6, 16, dtype=dtype).split([2, 2, 2], dim=1)
    out = prefill(q, k, v, None, None, bounds, bounds, 50, 50, 0.25)
    last = bounds[1:].long() - 1
    of_last = prefill(q[last], k, v, None, None, prefix_sums([1] * 6), bounds, 1, 50, 0.25)
    assert_near(of_last, out[last].double(), dtype)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("block_size, unused", [(16, -1), (24, 2**30), (256, -1)])
@both_dtypes
def test_prefill_after_a_cached_prefix(prefill, block_size, unused, dtype):
    lengths = [(1, 1), (1, 64), (5, 21), (16, 32), (17, 49), (40, 40), (3, 259)]
    check_prefill(prefill, 4, 2, 16, dtype, lengths, block_size, unused)


@pytest.mark.parametrize("prefill", PREFILLS)
@both_dtypes
def test_prefill_of_several_tiles(prefill, dtype):
    check_prefill(prefill, 2, 1, 16, dtype, [(129, 129), (257, 257), (128, 128)])
    check_prefill(prefill, 2, 1, 24, dtype, [(130, 300), (1, 257)], block_size=16)
    check_prefill(prefill, 2, 1, 24, dtype, [(130, 300), (1, 257)], block_size=128)


@pytest.mark.parametrize("prefill", PREFILLS)
@both_dtypes
def test_a_sequence_of_nan_does_not_harm_its_neighbours_in_prefill(prefill, dtype):
    bounds, qkv = prefix_sums([20, 40, 20]), randn(80, 3, 16, dtype=dtype)
    qkv[20:60] = float("nan")
    out = prefill(*qkv.split(1, dim=1), None, None, bounds, bounds, 40, 40, 0.25, None)
    assert out[20:60].isnan().all() and not out[:20].isnan().any() and not out[60:].isnan().any()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_the_shared_memory(monkeypatch, head_dim, shared_memory, dtype):
    monkeypatch.setattr(
        "nanovllm.kernels.decode_config.device_limits", lambda device: (132, shared_memory)
    )
    monkeypatch.setattr(
        "nanovllm.kernels.prefill_config.device_limits", lambda device: (132, shared_memory)
    )
    row = head_dim * dtype.itemsize
    for num_seqs in (1, 32, 256):
        decode = decode_config(num_seqs, 8, head_dim, dtype, torch.device("cuda"), 256)
        assert (
            2 * (decode.num_stages - 1) * decode.block_n * row <= shared_memory
            and decode.block_n >= 16
        )
        assert decode.num_stages >= 3
    for block_size in (1, 256):
        prefill = prefill_config(head_dim, dtype, torch.device("cuda"), block_size)
        # One stage less than asked for is what a kernel that reads through the block table takes at
        # the least.
        assert (
            prefill.block_m + 2 * prefill.block_n * (prefill.num_stages - 1)
        ) * row <= shared_memory


# --- flash_attention: how it calls the package, without the package ---


def package_options(window_size, softcap):
    left, right = window_size
    if left in (-1, None):
        assert right == left
        left = None
    else:
        assert right == 0
        left += 1
    return {"window": left, "softcap": softcap or None}


def package_2_varlen(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    block_table=None,
):
    assert causal
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    options = package_options(window_size, softcap)
    return varlen_prefill_torch(q, k, v, k, v, *lengths, softmax_scale, block_table, **options)


def package_2_kvcache(
    q,
    k_cache,
    v_cache,
    cache_seqlens=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    assert q.shape[1] == 1
    inputs = (q[:, 0], k_cache, v_cache, cache_seqlens, block_table, softmax_scale)
    return paged_decode_torch(*inputs, **package_options(window_size, softcap))[:, None]


def package_4_varlen(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    seqused_k=None,
    page_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    softcap=0.0,
):
    options = {"causal": causal, "window_size": window_size, "softcap": softcap}
    assert causal and (page_table is None) == (cu_seqlens_k is not None) == (seqused_k is None)
    if cu_seqlens_q is None:
        return package_2_kvcache(q, k, v, seqused_k, page_table, softmax_scale, **options), None
    if page_table is not None:
        assert seqused_k.dtype == torch.int32
        cu_seqlens_k = prefix_sums(seqused_k.tolist())
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    inputs = (q, k, v, *lengths, softmax_scale)
    return package_2_varlen(*inputs, block_table=page_table, **options), None


@pytest.mark.parametrize("version", ["2", "4"])
def test_flash_attention_calls_either_package(monkeypatch, version):
    functions = (
        (package_2_varlen, package_2_kvcache) if version == "2" else (package_4_varlen, None)
    )
    monkeypatch.setattr(flash_attention, "flash_attention_version", lambda: version)
    monkeypatch.setattr(flash_attention, "_functions", lambda: functions)
    flash_attention.check_flash_attention(256, 128, torch.bfloat16)
    check_decode(flash_attention.flash_decode, 4, 2, 16, 16, torch.float32, [0, 1, 33])
    check_prefill(flash_attention.flash_prefill, 4, 2, 16, torch.float32, [(3, 3), (9, 9)])
    check_prefill(
        flash_attention.flash_prefill, 4, 2, 16, torch.float32, [(3, 20), (9, 9)], block_size=16
    )


@pytest.mark.parametrize(
    "version, head_dim, dtype, name",
    [
        ("4", 128, torch.bfloat16, "flash_attn+triton"),
        ("4", 60, torch.bfloat16, "triton"),
        ("4", 128, torch.float32, "triton"),
        ("2", 128, torch.bfloat16, "triton"),
        (None, 128, torch.bfloat16, "triton"),
    ],
)
def test_auto_takes_flash_attention_4_for_prefill_where_it_serves(
    monkeypatch, version, head_dim, dtype, name
):
    for module in (attention_backend, flash_attention):
        monkeypatch.setattr(module, "flash_attention_version", lambda: version)
    monkeypatch.setattr(flash_attention, "_functions", lambda: (package_4_varlen, None))
    # Not torch.cuda's functions: `is_hopper` remembers what they said first, for later tests too.
    monkeypatch.setattr(attention_backend, "is_hopper", lambda: True)
    backend = attention_backend.select_backend("auto", "cuda", 256, head_dim, dtype)
    assert (backend.name, backend.decode) == (name, paged_decode)
    assert attention_backend.select_backend(backend.name, "cuda", 256, head_dim, dtype) is backend
    assert (
        attention_backend.select_backend("triton", "cuda", 256, head_dim, dtype).prefill
        is varlen_prefill
    )


@pytest.mark.parametrize(
    "version, block_size, head_dim, dtype, message",
    [
        (None, 256, 128, torch.bfloat16, "not installed: pip install"),
        ("4", 256, 128, torch.float32, "not torch.float32"),
        ("2", 16, 128, torch.bfloat16, "multiple of 256, not 16"),
        ("2", 256, 80, torch.bfloat16, "head_dim 64 and 128, not 80"),
        ("4", 16, 60, torch.bfloat16, "multiples of 8 up to 128, not 60"),
    ],
)
def test_flash_attention_says_what_it_cannot_serve(
    monkeypatch, version, block_size, head_dim, dtype, message
):
    monkeypatch.setattr(flash_attention, "flash_attention_version", lambda: version)
    with pytest.raises(ValueError, match=message) as error:
        flash_attention.check_flash_attention(block_size, head_dim, dtype)
    assert "attention_backend='triton'" in str(error.value)


@pytest.mark.parametrize("version, error", [("2", ImportError), ("4", RuntimeError)])
def test_flash_attention_that_does_not_import_is_a_clear_error(monkeypatch, version, error):
    def broken():
        raise error("undefined symbol")

    for module in (attention_backend, flash_attention):
        monkeypatch.setattr(module, "flash_attention_version", lambda: version)
    monkeypatch.setattr(flash_attention, "_functions", broken)
    monkeypatch.setattr(attention_backend, "is_hopper", lambda: True)
    with pytest.raises(ValueError, match="undefined symbol"):
        attention_backend.select_backend("flash_attn", "cuda", 256, 128, torch.bfloat16)
    assert (
        attention_backend.select_backend("auto", "cuda", 256, 128, torch.bfloat16).name == "triton"
    )


# --- without Triton ---

WITHOUT_TRITON = """
import sys, types
sys.modules["triton"] = None
package = types.ModuleType("nanovllm"); package.__path__ = ["nanovllm"]
sys.modules["nanovllm"] = package  # the kernels alone, not the engine
import torch
from nanovllm.kernels import flash_attention, gemv, gumbel, norm_rope_store, paged_decode
from nanovllm.kernels import penalties, rms_norm, gate_mul, split_gemm, threshold, varlen_prefill
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_backend import select_backend
x, weight = torch.randn(2, 32), torch.ones(32)
assert rms_norm.rms_norm_torch(x, weight, 0.0).square().mean().sub(1).abs() < 1e-5
assert not HAS_TRITON and select_backend("auto", "cpu", 256, 64, torch.float32).name == "torch"
try:
    select_backend("auto", "cuda", 256, 64, torch.float32)
except ValueError as error:
    print(error)
"""


def test_references_work_where_triton_is_not_installed(pytestconfig):
    command = [sys.executable, "-c", WITHOUT_TRITON]
    result = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "needs Triton" in result.stdout and "device='cpu'" in result.stdout
