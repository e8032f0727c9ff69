"""The attention backends on a GPU, at real sizes, against float64."""

import pytest
import torch

from nanovllm.kernels import flash_attention
from nanovllm.kernels import paged_decode as paged_decode_module
from nanovllm.kernels._triton import has_tma
from nanovllm.kernels.norm_rope_store import norm_rope_store, norm_rope_store_torch
from nanovllm.kernels.paged_decode import DecodeConfig, paged_decode, paged_decode_torch
from nanovllm.kernels.split_gemm import split_gemm
from nanovllm.kernels.torch_attention import varlen_prefill_torch
from nanovllm.kernels.varlen_prefill import varlen_prefill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 1e-2, FP16: 2e-3, FP32: 1e-5}
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128
NAN = float("nan")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, dtype):
    return torch.randn(*shape, dtype=torch.float32, device="cuda").to(dtype)


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def prefix_sums(lengths):
    return ints([0, *torch.tensor(lengths).cumsum(0).tolist()])


def relative_error(out, expected):
    assert not out.isnan().any()
    return ((out.double() - expected).norm() / expected.norm()).item()


def exact(q, k, v, scale, window=None, softcap=None):
    """float64 attention of q `[q_len, heads, dim]` over k, v `[k_len, kv_heads, dim]`; the last
    sees all, or as many as the window has."""
    (q_len, heads, _), (k_len, kv_heads, _) = q.shape, k.shape
    k, v = (x.double().repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    seen = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).tril(k_len - q_len)
    if window is not None:
        seen = seen.triu(k_len - q_len - window + 1)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


class Cache:
    """A cache whose sequences lie scattered; slots without a token hold `unused`, spare table
    entries -1."""

    def __init__(
        self,
        lengths,
        block_size,
        dtype,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        unused=NAN,
        spare_blocks=1,
    ):
        counts = [-(-n // block_size) for n in lengths]
        num_blocks = sum(counts) + spare_blocks
        shape = (num_blocks, block_size, kv_heads, head_dim)
        self.k = torch.full(shape, unused, dtype=dtype, device="cuda")
        self.v = torch.full(shape, unused, dtype=dtype, device="cuda")
        used = (spare_blocks + torch.randperm(sum(counts))).split(
            counts
        )  # after the spare ones: high addresses
        tables = torch.full((len(lengths), max(counts) + 3), -1, dtype=torch.int32)
        self.slots = []
        for i, (n, blocks) in enumerate(zip(lengths, used, strict=True)):
            tables[i, : len(blocks)] = blocks
            self.slots.append(
                (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:n].cuda()
            )
        self.tables = tables.cuda()
        slots = torch.cat(self.slots)
        for cache in (self.k, self.v):
            cache.flatten(0, 1)[slots] = randn(len(slots), kv_heads, head_dim, dtype=dtype)

    def keys_and_values(self, i, length=None):
        return self.k.flatten(0, 1)[self.slots[i][:length]], self.v.flatten(0, 1)[
            self.slots[i][:length]
        ]


def exact_decode(q, cache, lengths, scale, **options):
    rows = []
    for i, n in enumerate(lengths):
        rows.append(
            exact(q[i : i + 1], *cache.keys_and_values(i, n), scale, **options)
            if n
            else torch.zeros_like(q[i : i + 1])
        )
    return torch.cat(rows).double()


def random_lengths(count, longest):
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    lengths[0] = longest
    return lengths


def flash(block_size, head_dim=HEAD_DIM, dtype=BF16):
    try:
        flash_attention.check_flash_attention(block_size, head_dim, dtype)
    except ValueError as error:
        pytest.skip(str(error))


# --- decode ---


DECODES = {
    "triton": paged_decode,
    "torch": paged_decode_torch,
    "flash_attn": flash_attention.flash_decode,
}


@pytest.mark.parametrize("backend", DECODES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("num_seqs", [1, 3, 16, 64, 256])
def test_decode(backend, dtype, block_size, num_seqs):
    if backend == "flash_attn":
        flash(block_size, dtype=dtype)
    lengths = random_lengths(num_seqs, 4096)
    cache = Cache(lengths, block_size, dtype, unused=0.0 if backend == "flash_attn" else NAN)
    q = randn(num_seqs, HEADS, HEAD_DIM, dtype=dtype)
    scale = HEAD_DIM**-0.5
    out = DECODES[backend](q, cache.k, cache.v, ints(lengths), cache.tables, scale)
    assert out.dtype == dtype
    assert relative_error(out, exact_decode(q, cache, lengths, scale)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(8, 8, 64), (14, 2, 64), (12, 1, 80), (4, 2, 16), (4, 4, 256)]
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("num_splits", [1, 4, 32])
def test_decode_shapes(heads, kv_heads, head_dim, dtype, num_splits):
    lengths = [0, 1, 63, 64, 65, 127, 128, 129, 700]
    cache = Cache(lengths, 48, dtype, kv_heads, head_dim)
    q = randn(len(lengths), heads, head_dim, dtype=dtype)
    config = DecodeConfig(32, num_splits)
    out = paged_decode(q, cache.k, cache.v, ints(lengths), cache.tables, 0.1, config=config)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert relative_error(out, exact_decode(q, cache, lengths, 0.1)) < TOLERANCE[dtype]


@pytest.mark.skipif(not has_tma(), reason="older cards start no kernel early, and have no TMA")
@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("num_stages", [2, 3, 5])
@pytest.mark.parametrize("block_size", [48, 256])
@pytest.mark.parametrize("window", [None, 1, 300])
def test_decode_reads_ahead_but_not_the_new_token(window, block_size, num_stages, num_splits):
    lengths = [*range(1, 1200, 9)]  # the new token in any of the first tiles, or later
    cache, scale, config = (
        Cache(lengths, block_size, BF16),
        0.1,
        DecodeConfig(64, num_splits, num_stages=num_stages),
    )
    q = randn(len(lengths), HEADS, HEAD_DIM, dtype=BF16)
    expected = exact_decode(q, cache, lengths, scale, window=window)
    options = {"window": window, "config": config}
    slots = torch.stack([s[-1] for s in cache.slots])
    qkv = torch.cat((q, *(values.flatten(0, 1)[slots] for values in (cache.k, cache.v))), dim=1)
    sin = torch.zeros(1, HEAD_DIM // 2, device="cuda")
    rope, store = (torch.zeros_like(slots), sin.cos(), sin), (cache.k, cache.v, slots.int(), HEADS)
    lens, x, weight = (
        ints(lengths),
        randn(len(lengths), 4096, dtype=BF16),
        randn(4096, 4096, dtype=BF16),
    )

    def step():
        for values in (cache.k, cache.v):
            values.flatten(0, 1).index_fill_(0, slots, NAN)
        split_gemm(
            x, weight, None, 4
        )  # only takes time: the next kernels start beside it, and wait
        new = norm_rope_store(qkv, *rope, None, None, 0.0, *store)
        q = new[:, :HEADS]
        return paged_decode(q, cache.k, cache.v, lens, cache.tables, scale, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    assert relative_error(out, expected) < TOLERANCE[BF16]


@pytest.mark.parametrize("backend", DECODES)
@pytest.mark.parametrize("num_seqs", [1, 8, 64])
def test_decode_in_a_graph_follows_the_context_lengths(backend, num_seqs):
    if backend == "flash_attn":
        flash(256)
    scale = HEAD_DIM**-0.5
    most = random_lengths(num_seqs, 2048)
    cache = Cache(most, 256, BF16, unused=0.0 if backend == "flash_attn" else NAN)
    q = randn(num_seqs, HEADS, HEAD_DIM, dtype=BF16)
    context_lens, tables = (
        torch.zeros(num_seqs, dtype=torch.int32, device="cuda"),
        torch.full_like(cache.tables, -1),
    )
    args = (q, cache.k, cache.v, context_lens, tables, scale)
    DECODES[backend](*args)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captured while every row is padding
        out = DECODES[backend](*args)
    shorter, with_padding = (
        [max(1, n // 3) for n in most],
        [0 if i % 2 else n for i, n in enumerate(most)],
    )
    for lengths in (most, shorter, with_padding, [1] * num_seqs):
        context_lens.copy_(ints(lengths))
        tables.copy_(torch.where(context_lens[:, None] > 0, cache.tables, -1))
        q.copy_(randn(*q.shape, dtype=BF16))
        graph.replay()
        rows = [i for i, n in enumerate(lengths) if n or backend != "flash_attn"]
        expected = exact_decode(q, cache, lengths, scale)
        assert relative_error(out[rows], expected[rows]) < TOLERANCE[BF16]


def test_decode_is_not_compiled_anew_for_each_batch():
    def variants():
        kernel = paged_decode_module._paged_decode_kernel
        caches = kernel.device_caches if hasattr(kernel, "device_caches") else kernel.cache
        cache = caches[torch.cuda.current_device()]
        return len(cache[0] if isinstance(cache, tuple) else cache)

    def run(num_seqs, width):
        cache = Cache([100] * num_seqs, 16, BF16)
        context_lens = ints([0] + [100] * num_seqs)[1:]  # not 16-byte aligned
        tables = torch.full((num_seqs, width), -1, dtype=torch.int32, device="cuda")
        tables[:, :7] = cache.tables[:, :7]
        q = randn(num_seqs, HEADS, HEAD_DIM, dtype=BF16)
        paged_decode(q, cache.k, cache.v, context_lens, tables, 0.1)

    run(1, 16), run(200, 16)  # split and not split
    before = variants()
    for num_seqs, width in [(2, 7), (3, 8), (8, 32), (16, 9), (100, 7), (256, 16)]:
        run(num_seqs, width)
    assert variants() == before


# --- prefill ---

PREFILLS = {
    "triton": varlen_prefill,
    "torch": varlen_prefill_torch,
    "flash_attn": flash_attention.flash_prefill,
}


def check_prefill(
    backend, dtype, lengths, block_size, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM
):
    """`lengths`: (new, all) tokens of each sequence; with a block_size, all keys come from the
    cache."""
    q_lens, k_lens = zip(*lengths, strict=True)
    scale = head_dim**-0.5
    qkv = randn(sum(q_lens), (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    if block_size is None:
        keys_and_values = list(zip(k.split(q_lens), v.split(q_lens), strict=True))
        paged = (None, None)
        tables = None
    else:
        cache = Cache(
            k_lens,
            block_size,
            dtype,
            kv_heads,
            head_dim,
            unused=0.0 if backend == "flash_attn" else NAN,
        )
        keys_and_values = [cache.keys_and_values(i) for i in range(len(lengths))]
        paged, tables = (cache.k, cache.v), cache.tables
    sums = (prefix_sums(q_lens), prefix_sums(k_lens), max(q_lens), max(k_lens))
    out = PREFILLS[backend](q, k, v, *paged, *sums, scale, tables)
    assert out.dtype == dtype
    for one_out, one_q, kv in zip(out.split(q_lens), q.split(q_lens), keys_and_values, strict=True):
        assert relative_error(one_out, exact(one_q, *kv, scale)) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", PREFILLS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_prefill_of_fresh_sequences(backend, dtype):
    if backend == "flash_attn":
        flash(256, dtype=dtype)
    check_prefill(
        backend, dtype, [(n, n) for n in (2048, 1, 127, 128, 129, 1000, 1024, 16, 333)], None
    )


@pytest.mark.parametrize("backend", PREFILLS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("block_size", [16, 256])
def test_prefill_after_a_cached_prefix(backend, dtype, block_size):
    if backend == "flash_attn":
        flash(block_size, dtype=dtype)
    lengths = [
        (1, 4096),
        (1, 1),
        (128, 2176),
        (1000, 1000),
        (513, 2000),
        (256, 257),
        (64, 128),
        (1, 257),
        (255, 512),
    ]
    check_prefill(backend, dtype, lengths, block_size)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(8, 8, 64), (14, 2, 64), (12, 1, 80), (4, 2, 16), (4, 4, 256)]
)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("block_size", [None, 48, 256])
def test_prefill_shapes(heads, kv_heads, head_dim, dtype, block_size):
    lengths = (
        [(1, 1), (33, 33), (300, 300)]
        if block_size is None
        else [(1, 200), (33, 33), (200, 500), (65, 129)]
    )
    check_prefill("triton", dtype, lengths, block_size, heads, kv_heads, head_dim)


# --- the cache ---


def test_norm_rope_store_equals_its_reference():
    slots = torch.randperm(4096)[:1000].int().cuda()
    slots[::7] = -1
    qkv = randn(1000, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=BF16)
    positions = torch.randint(0, 4096, (1000,), device="cuda")
    angles = torch.rand(4096, HEAD_DIM // 2, device="cuda") * 6
    weights = [randn(HEAD_DIM, dtype=BF16) for _ in range(2)]
    results = []
    for fused in (norm_rope_store, norm_rope_store_torch):
        out, caches = (
            qkv.clone(),
            [torch.zeros(16, 256, KV_HEADS, HEAD_DIM, dtype=BF16, device="cuda") for _ in "kv"],
        )
        fused(out, positions, angles.cos(), angles.sin(), *weights, 1e-6, *caches, slots, HEADS)
        results.append((out, *caches))
    for ours, reference in zip(*results, strict=True):
        assert relative_error(ours, reference) < TOLERANCE[BF16]


def test_a_cache_of_more_than_2_to_the_31_elements():
    lengths = [300, 1000]
    cache = Cache(lengths, 256, BF16, spare_blocks=8500)
    assert cache.k.numel() > 2**31
    new = randn(2, KV_HEADS, HEAD_DIM, dtype=BF16)
    kv = torch.cat((new, new), dim=1)  # no query heads, no norm, no rotation: a plain store
    no_angle = torch.zeros(1, HEAD_DIM // 2, device="cuda")
    slots = ints([int(s[-1]) for s in cache.slots])
    zeros = torch.zeros(2, dtype=torch.int64, device="cuda")
    norm_rope_store(
        kv, zeros, no_angle.cos(), no_angle, None, None, 0.0, cache.k, cache.v, slots, 0
    )
    assert torch.equal(cache.keys_and_values(1)[0][-1], new[1])
    q = randn(2, HEADS, HEAD_DIM, dtype=BF16)
    scale = HEAD_DIM**-0.5
    expected = exact_decode(q, cache, lengths, scale)
    for config in (None, DecodeConfig(128, 1)):
        out = paged_decode(q, cache.k, cache.v, ints(lengths), cache.tables, scale, config=config)
        assert relative_error(out, expected) < TOLERANCE[BF16]
    sums = (prefix_sums([1, 1]), prefix_sums(lengths), 1, 1000)
    out = varlen_prefill(q, None, None, cache.k, cache.v, *sums, scale, cache.tables)
    assert relative_error(out, expected) < TOLERANCE[BF16]
