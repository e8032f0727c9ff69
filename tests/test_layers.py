"""The layers: against `transformers`' modules, and cut over tensor-parallel ranks without any
process.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import QWEN2, QWEN3, Checkpoint, make_checkpoint
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from nanovllm.kernels.attention_backend import PrefillPlan
from nanovllm.kernels.gate_mul import gate_mul_torch
from nanovllm.kernels.norm_rope_store import norm_rope_store_torch
from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from nanovllm.layers.residual import ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.rope import default_frequencies, rope_frequencies
from nanovllm.utils.context import StepInputs, reset_context, set_context
from nanovllm.utils.loader import load_model
from nanovllm.utils.tensor_parallel import get_tensor_parallel, tensor_parallel

all_sizes = pytest.mark.parametrize("size", [1, 2, 4])


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def on_ranks(size: int, make: Any) -> list[Any]:
    """What `make()` builds on each of `size` ranks."""
    built = []
    for rank in range(size):
        with tensor_parallel(rank, size):
            built.append(make())
    return built


def load(param: nn.Parameter, *arguments: Any) -> None:
    """Fill a parameter from a checkpoint tensor; what the loader forgets stays NaN."""
    param.weight_loader(param, *arguments)


def empty(layer: nn.Module) -> nn.Module:
    for param in layer.parameters():
        param.fill_(float("nan"))
    return layer


def make_norm(size: int) -> tuple[RMSNorm, Callable[[torch.Tensor], torch.Tensor]]:
    """A norm with random weights, and the same by `transformers`."""
    ours, theirs = RMSNorm(size, 1e-3), Qwen3RMSNorm(size, 1e-3)
    weight = torch.randn(size)
    load(ours.weight, weight)
    theirs.weight.data.copy_(weight)
    return ours, theirs.requires_grad_(False)


# --- linear layers over ranks ---------------------------------------------------------------------


@all_sizes
@pytest.mark.parametrize("bias", [False, True])
def test_column_parallel(size: int, bias: bool) -> None:
    weight, vector, x = torch.randn(24, 10), torch.randn(24), torch.randn(5, 10)
    layers = on_ranks(size, lambda: empty(MergedColumnParallelLinear(10, [24], bias)))
    for layer in layers:
        load(layer.weight, weight, 0)
        if bias:
            load(layer.bias, vector, 0)
    assert torch.equal(torch.cat([layer.weight for layer in layers]), weight)
    out = torch.cat([layer(x) for layer in layers], dim=1)
    torch.testing.assert_close(out, x @ weight.T + (vector if bias else 0))
    norm, normed = make_norm(10)
    out = torch.cat([layer(ResidualStream(x).normed(norm)) for layer in layers], dim=1)
    torch.testing.assert_close(out, normed(x) @ weight.T + (vector if bias else 0))


@all_sizes
def test_merged_columns(size: int) -> None:
    """Each rank holds its part of the first matrix, then its part of the second."""
    gate, up, x = torch.randn(16, 10), torch.randn(32, 10), torch.randn(3, 10)
    layers = on_ranks(size, lambda: empty(MergedColumnParallelLinear(10, [16, 32])))
    for layer in layers:
        load(layer.weight, up, 1)  # in any order
        load(layer.weight, gate, 0)
    parts = [layer(x).split([16 // size, 32 // size], dim=1) for layer in layers]
    torch.testing.assert_close(torch.cat([first for first, _ in parts], dim=1), x @ gate.T)
    torch.testing.assert_close(torch.cat([second for _, second in parts], dim=1), x @ up.T)


@all_sizes
def test_silu_gate_up(size: int) -> None:
    """Each rank has the same columns of gate and up projection, and normalises all of x."""
    gate, up, x = torch.randn(16, 10), torch.randn(16, 10), torch.randn(3, 10)
    norm, normed = make_norm(10)
    layers = on_ranks(size, lambda: empty(GateUpLinear(10, 16)))
    for layer in layers:
        load(layer.weight, up, 1)
        load(layer.weight, gate, 0)
    gated = normed(x) @ gate.T
    expected = gated * torch.sigmoid(gated) * (normed(x) @ up.T)
    x_normed = ResidualStream(x).normed(norm)
    torch.testing.assert_close(torch.cat([layer(x_normed) for layer in layers], dim=1), expected)


@all_sizes
@pytest.mark.parametrize("bias", [False, True])
def test_row_parallel(size: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, vector, x = torch.randn(10, 24), torch.randn(10), torch.randn(5, 24)
    layers = on_ranks(size, lambda: empty(RowParallelLinear(24, 10, bias)))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)  # the sum is made below
    total = torch.zeros(5, 10)
    for rank, layer in enumerate(layers):
        load(layer.weight, weight)
        if bias:
            load(layer.bias, vector)
        total += layer(x[:, rank * 24 // size : (rank + 1) * 24 // size])
    torch.testing.assert_close(total, x @ weight.T + (vector if bias else 0))
    # Now with the sum, as every rank sees it: it is added to the stream once, in place.
    hidden = torch.randn(5, 10)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.copy_(total))
    norm, normed = make_norm(10)
    for rank, layer in enumerate(layers):
        stream = ResidualStream(hidden.clone())
        given = stream.hidden
        stream.add(layer, x[:, rank * 24 // size : (rank + 1) * 24 // size])
        values = stream.normed(norm).values()
        expected = hidden + x @ weight.T + (vector if bias else 0)
        assert stream.hidden is given
        torch.testing.assert_close(given, expected)
        torch.testing.assert_close(values, normed(expected))


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 4), (8, 2), (4, 1), (12, 4)])
@all_sizes
def test_qkv_splits_by_heads(size: int, heads: int, kv_heads: int) -> None:
    """With fewer KV heads than ranks, each rank holds the KV head that its query heads use."""
    head_dim, hidden = 6, 10
    full = {"q": torch.randn(heads * head_dim, hidden)}
    full |= {name: torch.randn(kv_heads * head_dim, hidden) for name in "kv"}
    bias = {name: torch.randn(len(weight)) for name, weight in full.items()}
    x = torch.randn(3, hidden)
    norm, normed = make_norm(hidden)
    layers = on_ranks(
        size, lambda: empty(QKVParallelLinear(hidden, head_dim, heads, kv_heads, bias=True))
    )
    q_per_kv = heads // kv_heads
    for rank, layer in enumerate(layers):
        for name in "vkq":
            load(layer.weight, full[name], name)
            load(layer.bias, bias[name], name)
        assert layer.num_heads == heads // size and layer.num_kv_heads == max(kv_heads // size, 1)
        out = layer(x).unflatten(1, (-1, head_dim))
        assert out.shape[1] == layer.num_heads + 2 * layer.num_kv_heads
        q, k, v = out.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
        torch.testing.assert_close(layer(ResidualStream(x).normed(norm)), layer(normed(x)))
        whole = {
            name: (x @ full[name].T + bias[name]).unflatten(1, (-1, head_dim)) for name in "qkv"
        }
        for local in range(layer.num_heads):
            head = rank * layer.num_heads + local
            local_kv = local // (layer.num_heads // layer.num_kv_heads)
            torch.testing.assert_close(q[:, local], whole["q"][:, head])
            torch.testing.assert_close(k[:, local_kv], whole["k"][:, head // q_per_kv])
            torch.testing.assert_close(v[:, local_kv], whole["v"][:, head // q_per_kv])


@pytest.mark.parametrize(
    "make, numbers",
    [
        (lambda: MergedColumnParallelLinear(8, [10]), r"10.*tensor_parallel_size 4"),
        (lambda: MergedColumnParallelLinear(8, [8, 6]), r"6.*tensor_parallel_size 4"),
        (lambda: RowParallelLinear(10, 8), r"10.*tensor_parallel_size 4"),
        (
            lambda: QKVParallelLinear(8, 4, 6, 2, False),
            r"num_attention_heads \(6\).*tensor_parallel_size 4",
        ),
        (
            lambda: QKVParallelLinear(8, 4, 12, 6, False),
            r"num_key_value_heads \(6\).*tensor_parallel_size 4",
        ),
        (lambda: QKVParallelLinear(8, 4, 12, 3, False), r"4.*3"),
    ],
)
def test_what_does_not_divide_is_refused(make: Any, numbers: str) -> None:
    with tensor_parallel(0, 4), pytest.raises(ValueError, match=numbers):
        make()


@all_sizes
@pytest.mark.parametrize("vocab", [16, 13, 5, 3])
def test_vocabulary(size: int, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to a multiple of the ranks; no padding row wins. With 3 ids, a rank has none."""
    weight, ids = torch.randn(vocab, 6), torch.randint(vocab, (20,))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)
    embeddings = on_ranks(size, lambda: empty(VocabParallelEmbedding(vocab, 6)))
    heads = on_ranks(size, lambda: empty(ParallelLMHead(vocab, 6)))
    for layer in (*embeddings, *heads):
        load(layer.weight, weight)
        assert not layer.weight.isnan().any()
    assert len({layer.weight.shape for layer in embeddings}) == 1
    embedded = sum(layer(ids) for layer in embeddings)
    torch.testing.assert_close(embedded, weight[ids])
    hidden = torch.randn(4, 6)
    norm, normed = make_norm(6)
    logits = [head(ResidualStream(hidden).normed(norm)) for head in heads]
    torch.testing.assert_close(torch.cat(logits, dim=1), normed(hidden) @ weight.T)


def test_the_rank_is_given_back() -> None:
    assert (get_tensor_parallel().rank, get_tensor_parallel().size) == (0, 1)
    with pytest.raises(KeyError), tensor_parallel(1, 2):
        assert (get_tensor_parallel().rank, get_tensor_parallel().size) == (1, 2)
        raise KeyError
    assert (get_tensor_parallel().rank, get_tensor_parallel().size) == (0, 1)


@pytest.mark.parametrize("architecture", [QWEN3, QWEN2])
def test_all_ranks_together_hold_the_checkpoint(architecture: str, tmp_path: Any) -> None:
    """Each weight is held once; norms, and KV heads that are too few, by several ranks."""
    checkpoint = make_checkpoint(
        tmp_path, architecture, num_attention_heads=4, num_key_value_heads=4, vocab_size=128
    )
    config = checkpoint.model.config

    def make() -> nn.Module:
        model = empty(Qwen3ForCausalLM(config, 32))
        with torch.no_grad():
            load_model(model, checkpoint.path)
        return model

    models = on_ranks(4, make)
    parameters = [dict(model.named_parameters()) for model in models]
    for name, param in parameters[0].items():
        assert not any(p[name].isnan().any() for p in parameters)
        *_, module, kind = name.split(".")
        is_split = param.dim() == 2 or (kind == "bias" and module == "qkv_proj")
        assert all(torch.equal(p[name], param) for p in parameters) != is_split, name
    num_held = sum(p.numel() for one in parameters for name, p in one.items() if "norm" not in name)
    assert num_held == sum(
        p.numel() for name, p in checkpoint.model.named_parameters() if "norm" not in name
    )


# --- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rmsnorm(dtype: torch.dtype, eps: float) -> None:
    theirs, ours = Qwen3RMSNorm(32, eps).to(dtype), RMSNorm(32, eps).to(dtype)
    weight = torch.randn(32).to(dtype)
    theirs.weight.data.copy_(weight)
    load(ours.weight, weight)
    x = torch.randn(7, 32).to(dtype)
    before = x.clone()
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x).dtype == dtype and torch.equal(x, before)
    heads = torch.randn(5, 3, 32).to(dtype)
    torch.testing.assert_close(ours(heads), theirs(heads))


@pytest.mark.parametrize("theta, head_dim", [(1e4, 16), (1e6, 64), (5e5, 128)])
def test_rope(theta: float, head_dim: int) -> None:
    checkpoint = make_checkpoint(None, head_dim=head_dim, rope_theta=theta, save=False)
    theirs = Qwen3RotaryEmbedding(checkpoint.model.config)
    rope = rope_frequencies(checkpoint.model.config, head_dim, 1024)
    torch.testing.assert_close(rope.frequencies, default_frequencies(head_dim, theta))
    ours = RotaryEmbedding(rope.frequencies, 1024)
    positions = torch.tensor([0, 1, 2, 77, 500, 1023, 5])
    q, k = torch.randn(7, 4, head_dim), torch.randn(7, 2, head_dim)
    cos, sin = theirs(q, positions.unsqueeze(0))
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    assert ours.cos.shape == ours.sin.shape == (1024, head_dim // 2)
    assert ours.cos.dtype == ours.sin.dtype == torch.float32
    # The tables' two halves are the same in `transformers`.
    torch.testing.assert_close(ours.cos[positions].repeat(1, 2), cos[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours.sin[positions].repeat(1, 2), sin[0], rtol=1e-5, atol=2e-5)
    v = torch.randn(7, 2, head_dim)
    qkv = torch.cat((q, k, v), dim=1)
    none = torch.empty(0)
    norm_rope_store_torch(qkv, positions, ours.cos, ours.sin, None, None, 0.0, none, none, None, 4)
    rotated_q_and_k = qkv.split((4, 2, 2), dim=1)[:2]  # v is not rotated
    for rotated, wanted in zip(rotated_q_and_k, expected, strict=True):
        torch.testing.assert_close(rotated, wanted[0].transpose(0, 1), rtol=1e-5, atol=2e-5)
    assert torch.equal(qkv[:, 6:], v)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_rope_store(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """q and k normalised head by head, then rotated; k and v in the slots, and nowhere else."""
    config = make_checkpoint(None, save=False).model.config
    theirs = Qwen3RotaryEmbedding(config)
    ours = RotaryEmbedding(rope_frequencies(config, 16, 1024).frequencies, 1024)
    q_norm, q_normed = make_norm(16)
    k_norm, k_normed = make_norm(16)
    positions = torch.tensor([0, 1, 600, 3, 1023])
    qkv = torch.randn(5, heads + 2 * kv_heads, 16).to(dtype)
    q, k, v = qkv.float().split((heads, kv_heads, kv_heads), dim=1)
    wanted = apply_rotary_pos_emb(
        q_normed(q).transpose(0, 1)[None],
        k_normed(k).transpose(0, 1)[None],
        *theirs(q, positions[None]),
    )
    wanted_q, wanted_k = (x[0].transpose(0, 1).to(dtype) for x in wanted)
    k_cache, v_cache = torch.full((2, 4, 8, kv_heads, 16), 7.0, dtype=dtype)
    slots = torch.tensor([9, 0, -1, 31, 8], dtype=torch.int32)
    norm_rope_store_torch(
        qkv,
        positions,
        ours.cos,
        ours.sin,
        q_norm.weight,
        k_norm.weight,
        1e-3,
        k_cache,
        v_cache,
        slots,
        heads,
    )
    tolerance = dict(rtol=1e-5, atol=2e-5) if dtype == torch.float32 else {}
    torch.testing.assert_close(qkv[:, :heads], wanted_q, **tolerance)
    torch.testing.assert_close(qkv[:, heads : heads + kv_heads], wanted_k, **tolerance)
    assert torch.equal(qkv[:, heads + kv_heads :], v.to(dtype))
    stored = [0, 1, 3, 4]
    for cache, x in ((k_cache, qkv[:, heads : heads + kv_heads]), (v_cache, v.to(dtype))):
        expected = torch.full((32, kv_heads, 16), 7.0, dtype=dtype)
        expected[slots[stored].long()] = x[stored]
        assert torch.equal(cache.flatten(0, 1), expected)


def test_silu_and_mul() -> None:
    gate, up = torch.randn(2, 5, 8)
    torch.testing.assert_close(
        gate_mul_torch(torch.cat((gate, up), dim=1)), gate * torch.sigmoid(gate) * up
    )


@pytest.mark.parametrize("only_last_tokens", [True, False])
def test_logits_of_a_whole_model(checkpoint: Checkpoint, only_last_tokens: bool) -> None:
    """One prefill of two sequences, with nothing but the model: the numbers, not only which is
    largest.
    """
    model = Qwen3ForCausalLM(checkpoint.model.config, 64)
    with torch.no_grad():
        load_model(model, checkpoint.path)
    first, second = [5, 6, 7, 8, 9], [100, 3]
    borders = torch.tensor([0, 5, 7], dtype=torch.int32)
    inputs = StepInputs(
        is_prefill=True,
        attention=PrefillPlan(borders, borders, max_seqlen_q=5, max_seqlen_k=5),
        last_token_rows=borders[1:] - 1,
    )
    input_ids, positions = torch.tensor(first + second), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    model.model.layers[-1].self_attn.attn.only_last_tokens = only_last_tokens
    set_context(inputs)
    with torch.inference_mode():
        logits = model.compute_logits(model(input_ids, positions))
    reset_context()
    if not only_last_tokens:
        expected = torch.cat([checkpoint.logits(first), checkpoint.logits(second)])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        return
    expected = torch.stack([checkpoint.logits(first)[-1], checkpoint.logits(second)[-1]])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes, size, message",
    [
        (dict(), 3, r"num_attention_heads \(8\).*tensor_parallel_size 3"),
        (dict(intermediate_size=82), 4, r"intermediate_size \(82\).*tensor_parallel_size 4"),
        (
            dict(num_attention_heads=12, num_key_value_heads=3),
            4,
            r"num_key_value_heads \(3\).*tensor_parallel_size 4",
        ),
        (dict(num_key_value_heads=3), 1, r"num_attention_heads \(8\).*num_key_value_heads \(3\)"),
    ],
)
def test_a_configuration_that_cannot_be_split(
    changes: dict[str, Any], size: int, message: str
) -> None:
    options = dict(num_attention_heads=8, num_key_value_heads=2, intermediate_size=96) | changes
    config = make_checkpoint(None, save=False).model.config
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        Qwen3ForCausalLM.check_config(config, size)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_a_configuration_that_is_accepted_can_be_built(size: int, kv_heads: int) -> None:
    """Also a vocabulary that does not divide; every rank's layers exist."""
    options = dict(num_attention_heads=8, num_key_value_heads=kv_heads, intermediate_size=96)
    config = make_checkpoint(None, save=False, **options).model.config
    Qwen3ForCausalLM.check_config(config, size)
    for model in on_ranks(size, lambda: Qwen3ForCausalLM(config, 16)):
        assert model.model.layers[0].self_attn.qkv_proj.num_heads == 8 // size
