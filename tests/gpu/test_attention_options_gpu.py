"""Sliding windows and soft caps of attention on a GPU, at real sizes, against float64."""

import pytest
import torch
from test_attention_gpu import (
    BF16,
    DECODES,
    FP32,
    NAN,
    PREFILLS,
    TOLERANCE,
    Cache,
    exact,
    exact_decode,
    flash,
    ints,
    prefix_sums,
    randn,
    random_lengths,
    relative_error,
    seeded,  # noqa: F401 (a fixture for every test here)
)

from nanovllm.kernels.paged_decode import paged_decode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# Scores have a standard deviation of 1, so that a cap of 2 changes them much.
options = pytest.mark.parametrize(
    "window, softcap", [(1, None), (512, None), (5000, None), (100, 2.0)]
)
shapes = pytest.mark.parametrize("heads, kv_heads, head_dim", [(16, 8, 128), (4, 1, 256)])


def unused_value(backend):
    return 0.0 if backend == "flash_attn" else NAN


@pytest.mark.parametrize("backend", DECODES)
@pytest.mark.parametrize("num_seqs", [1, 40])
@shapes
@options
def test_decode(backend, num_seqs, heads, kv_heads, head_dim, window, softcap):
    check_decode(backend, BF16, num_seqs, heads, kv_heads, head_dim, window, softcap)


def test_decode_in_float32():
    check_decode("triton", FP32, 40, 16, 8, 128, 100, 2.0)


def check_decode(backend, dtype, num_seqs, heads, kv_heads, head_dim, window, softcap):
    if backend == "flash_attn":
        flash(256, head_dim, dtype)
    lengths = random_lengths(num_seqs, 4000)
    cache = Cache(lengths, 256, dtype, kv_heads, head_dim, unused=unused_value(backend))
    q = randn(num_seqs, heads, head_dim, dtype=dtype)
    args = (q, cache.k, cache.v, ints(lengths), cache.tables, head_dim**-0.5)
    out = DECODES[backend](*args, window=window, softcap=softcap)
    expected = exact_decode(q, cache, lengths, args[-1], window=window, softcap=softcap)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_seqs", [1, 8, 100])
@pytest.mark.parametrize("window", [1, 100, 512])
def test_a_window_in_a_graph_follows_the_context_lengths(num_seqs, window):
    most = random_lengths(num_seqs, 2048)
    cache = Cache(most, 256, BF16)
    q = randn(num_seqs, 16, 128, dtype=BF16)
    context_lens = torch.zeros(num_seqs, dtype=torch.int32, device="cuda")
    args = (q, cache.k, cache.v, context_lens, cache.tables, 0.1)
    paged_decode(*args, window=window)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captured while every row is padding
        out = paged_decode(*args, window=window)
    for lengths in (
        most,
        [max(1, n // 3) for n in most],
        [n * (i % 2) for i, n in enumerate(most)],
    ):
        context_lens.copy_(ints(lengths))
        graph.replay()
        expected = exact_decode(q, cache, lengths, 0.1, window=window)
        difference = (out.double() - expected).norm()  # `expected` is 0 if all is padding
        assert difference <= TOLERANCE[BF16] * expected.norm()


@pytest.mark.parametrize("copies", [1, 50])  # split and not split
def test_nothing_in_front_of_the_window_is_read(copies):
    lengths = [600, 64, 1, 2048] * copies
    cache = Cache(lengths, 256, BF16)
    q = randn(len(lengths), 16, 128, dtype=BF16)
    expected = exact_decode(q, cache, lengths, 0.1, window=100)
    for slots, length in zip(cache.slots, lengths, strict=True):
        for values in (cache.k, cache.v):
            values.flatten(0, 1)[slots[: max(0, length - 100)]] = NAN
    out = paged_decode(q, cache.k, cache.v, ints(lengths), cache.tables, 0.1, window=100)
    assert relative_error(out, expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("backend", PREFILLS)
@pytest.mark.parametrize("block_size", [None, 48, 256])
@shapes
@options
def test_prefill(backend, block_size, heads, kv_heads, head_dim, window, softcap):
    check_prefill(backend, BF16, block_size, heads, kv_heads, head_dim, window, softcap)


@pytest.mark.parametrize("block_size", [None, 256])
def test_prefill_in_float32(block_size):
    check_prefill("triton", FP32, block_size, 16, 8, 128, 100, 2.0)


def check_prefill(backend, dtype, block_size, heads, kv_heads, head_dim, window, softcap):
    if backend == "flash_attn":
        flash(block_size or 256, head_dim, dtype)
    lengths = [(1, 1), (127, 127), (600, 600), (1000, 1000)]
    if block_size is not None:
        lengths += [(1, 700), (128, 1300), (500, 1999)]
    q_lens, k_lens = zip(*lengths, strict=True)
    cache = Cache(k_lens, block_size or 256, dtype, kv_heads, head_dim, unused_value(backend))
    keys_and_values = [cache.keys_and_values(i) for i in range(len(lengths))]
    q = randn(sum(q_lens), heads, head_dim, dtype=dtype)
    k, v = (torch.cat(x) for x in zip(*keys_and_values, strict=True))
    tables = None if block_size is None else cache.tables
    sums = (prefix_sums(q_lens), prefix_sums(k_lens), max(q_lens), max(k_lens))
    scale = head_dim**-0.5
    out = PREFILLS[backend](
        q, k, v, cache.k, cache.v, *sums, scale, tables, window=window, softcap=softcap
    )
    for one_out, one_q, kv in zip(out.split(q_lens), q.split(q_lens), keys_and_values, strict=True):
        expected = exact(one_q, *kv, scale, window, softcap)
        assert relative_error(one_out, expected) < TOLERANCE[dtype]
