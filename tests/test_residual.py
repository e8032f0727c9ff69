"""The residual stream: the same numbers however an addition and the norm behind it are computed."""

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Checkpoint, make_checkpoint, random_prompts
from e4m3 import convert_e4m3_by_torch
from torch import Tensor, nn

from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.kernels.attention_backend import PrefillPlan
from nanovllm.kernels.fp8_weight import FP8Input, Rounding, quantize_input_torch
from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Attended, ResidualStream
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.quantization import unquantized
from nanovllm.quantization.unquantized import MatmulChoice, MatmulKernel
from nanovllm.utils.context import StepInputs, reset_context, set_context
from nanovllm.utils.loader import load_model
from nanovllm.utils.tensor_parallel import tensor_parallel

HIDDEN = 16
needs_interpreter = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def random_layer(layer: nn.Module) -> Any:
    for param in layer.parameters():
        param.normal_()
    return layer


def make_norm() -> RMSNorm:
    return random_layer(RMSNorm(HIDDEN, 1e-5))


# --- one rank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_a_block_is_its_formula(num_tokens: int, bias: bool) -> None:
    """h += o(x); h += down(gate_up(norm(h))); norm(h)."""
    first, second = make_norm(), make_norm()
    o_proj = random_layer(RowParallelLinear(24, HIDDEN, bias))
    gate_up = random_layer(GateUpLinear(HIDDEN, 32))
    down = random_layer(RowParallelLinear(32, HIDDEN, bias))
    hidden, x = torch.randn(num_tokens, HIDDEN), torch.randn(num_tokens, 24)

    middle = hidden + o_proj(x)
    end = middle + down(gate_up(first(middle)))
    expected = second(end)

    stream = ResidualStream(hidden.clone())
    stream.add(o_proj, Attended(x))
    stream.add(down, stream.normed(first), before=gate_up)
    out = stream.normed(second)
    torch.testing.assert_close(out.values(), expected)
    torch.testing.assert_close(stream.hidden, end)


def test_nothing_is_added_before_the_norm_is_asked_for() -> None:
    layer, hidden = random_layer(RowParallelLinear(8, HIDDEN)), torch.randn(3, HIDDEN)
    stream = ResidualStream(hidden.clone())
    stream.add(layer, torch.ones(3, 8))
    assert torch.equal(stream.hidden, hidden)
    stream.normed(make_norm())
    assert not torch.equal(stream.hidden, hidden)


def test_post_norm_and_scale() -> None:
    """h += 0.5 * norm(layer(x)), as Gemma and Granite need it; and two additions in a row."""
    layer, post_norm, norm = random_layer(RowParallelLinear(8, HIDDEN)), make_norm(), make_norm()
    hidden, x = torch.randn(3, HIDDEN), torch.randn(3, 8)
    stream = ResidualStream(hidden.clone())
    stream.add(layer, x, post_norm=post_norm, scale=0.5)
    stream.add(layer, x)
    expected = hidden + 0.5 * post_norm(layer(x)) + layer(x)
    torch.testing.assert_close(stream.normed(norm).values(), norm(expected))
    torch.testing.assert_close(stream.hidden, expected)


def test_a_layer_can_read_the_stream_as_it_is() -> None:
    """h += norm(o(h)); h += norm(down(gate_up(h))), as OLMo has it."""
    first, second, last = make_norm(), make_norm(), make_norm()
    o_proj = random_layer(RowParallelLinear(HIDDEN, HIDDEN))
    gate_up = random_layer(GateUpLinear(HIDDEN, 32))
    down = random_layer(RowParallelLinear(32, HIDDEN))
    hidden = torch.randn(3, HIDDEN)

    middle = hidden + first(o_proj(hidden))
    end = middle + second(down(gate_up(middle)))

    stream = ResidualStream(hidden.clone())
    stream.add(o_proj, stream.values(), post_norm=first)
    torch.testing.assert_close(stream.values(), middle)
    stream.add(down, stream.values(), before=gate_up, post_norm=second)
    torch.testing.assert_close(stream.normed(last).values(), last(end))


def test_only_some_rows_go_on() -> None:
    layer, norm = random_layer(RowParallelLinear(8, HIDDEN)), make_norm()
    hidden, x, rows = torch.randn(6, HIDDEN), torch.randn(2, 8), torch.tensor([1, 5])
    stream = ResidualStream(hidden.clone())
    stream.add(layer, Attended(x, rows))
    torch.testing.assert_close(stream.normed(norm).values(), norm(hidden[rows] + layer(x)))
    assert len(stream.hidden) == 2


def test_a_norm_is_computed_once_for_all_its_readers() -> None:
    norm, calls = make_norm(), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    normed = ResidualStream(torch.randn(3, HIDDEN)).normed(norm)
    assert not calls
    qkv = random_layer(QKVParallelLinear(HIDDEN, 4, 2, 1, False))
    assert torch.equal(qkv(normed), qkv(normed.values())) and len(calls) == 1


def test_a_norm_that_nobody_read_is_lost_with_the_next_addition() -> None:
    layer, norm = random_layer(RowParallelLinear(8, HIDDEN)), make_norm()
    stream = ResidualStream(torch.randn(3, HIDDEN))
    early, late = stream.normed(norm), stream.normed(norm)
    kept = early.values()
    stream.add(layer, torch.ones(3, 8))
    stream.normed(norm)
    assert early.values() is kept
    with pytest.raises(AssertionError, match="the stream changed"):
        late.values()


@needs_interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("has_norm", [True, False])
def test_partial_sums_are_added_up_with_the_norm(
    splits: int, has_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real kernel that adds; split-K itself is replaced. What computes the norm is asked."""
    partial, hidden, norm = torch.randn(splits, 5, HIDDEN), torch.randn(5, HIDDEN), make_norm()
    replace_split_k(monkeypatch, partial)
    stream = ResidualStream(hidden.clone())
    stream.add(random_layer(RowParallelLinear(8, HIDDEN)), torch.randn(5, 8))
    check_sum(stream, hidden + partial.sum(0), norm if has_norm else None)


@needs_interpreter
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("has_post_norm", [True, False])
def test_partial_sums_are_normalised_and_scaled_before_they_are_added(
    splits: int, has_norm: bool, has_post_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same kernel, as Gemma and Granite need it."""
    partial, hidden, norm = torch.randn(splits, 5, HIDDEN), torch.randn(5, HIDDEN), make_norm()
    post_norm = make_norm() if has_post_norm else None
    output = partial.sum(0)
    expected = hidden + 0.5 * (output if post_norm is None else post_norm(output))
    replace_split_k(monkeypatch, partial)
    stream = ResidualStream(hidden.clone())
    layer = random_layer(RowParallelLinear(8, HIDDEN))
    stream.add(layer, torch.randn(5, 8), post_norm=post_norm, scale=0.5)
    check_sum(stream, expected, norm if has_norm else None)


@needs_interpreter
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_partial_sums_are_rounded_for_their_one_reader(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as if the norm was written, read and rounded."""
    partial, hidden, norm = torch.randn(2, 5, HIDDEN), torch.randn(5, HIDDEN), make_norm()
    layer, x = random_layer(RowParallelLinear(8, HIDDEN)), torch.randn(5, 8)
    convert_e4m3_by_torch(monkeypatch)
    replace_split_k(monkeypatch, partial)

    def values(reader: Any) -> Any:
        stream = ResidualStream(hidden.clone())
        stream.add(layer, x, scale=scale)
        return stream.normed(norm, reader).values()

    rounded = values(SimpleNamespace(rounding=lambda x: Rounding(HIDDEN // 4, len(x))))
    expected = quantize_input_torch(values(None), HIDDEN // 4)
    assert isinstance(rounded, FP8Input)
    assert torch.equal(rounded.scales, expected.scales)
    assert torch.equal(rounded.values.float(), expected.values.float())


def test_a_reader_is_asked_only_where_the_norm_comes_with_the_sum() -> None:
    """What it wants costs the host time, in each layer of each step."""
    asked: list[Tensor] = []
    reader: Any = SimpleNamespace(rounding=asked.append)
    layer, norm = random_layer(RowParallelLinear(8, HIDDEN)), make_norm()
    stream = ResidualStream(torch.randn(3, HIDDEN))
    stream.add(layer, torch.randn(3, 8))  # on a CPU the product is added where it is computed
    assert isinstance(stream.normed(norm, reader).values(), Tensor)
    assert not asked


def replace_split_k(monkeypatch: pytest.MonkeyPatch, partial: Tensor) -> None:
    """Have every product be these partial sums."""
    choice = MatmulChoice(MatmulKernel.SPLIT_K, len(partial))
    monkeypatch.setattr(unquantized, "choose_matmul", lambda x, weight, reader_sums: choice)
    monkeypatch.setattr(unquantized, "split_gemm", lambda x, weight, bias, splits: partial)


def check_sum(stream: ResidualStream, expected: Tensor, norm: RMSNorm | None) -> None:
    """Finish the stream's addition, and check it and the norm that is to come with it."""
    if norm is None:
        stream.keep(torch.arange(len(expected)))
    else:
        calls: list[int] = []
        norm.register_forward_hook(lambda *_: calls.append(1))
        values = stream.normed(norm).values()
        assert not calls  # it came with the sum
        torch.testing.assert_close(values, norm(expected))
    torch.testing.assert_close(stream.hidden, expected)


# --- several ranks, as threads of this process ----------------------------------------------------


class Exchange:
    """Sums over threads that stand for ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[Any] = [None] * size

    def sum(self, rank: int, x: Tensor) -> Tensor:
        self.slots[rank] = x
        self.barrier.wait()
        total = sum(self.slots[1:], self.slots[0])
        self.barrier.wait()
        return total


class Rank:
    """A TensorParallel whose sums are the exchange's. Sums in pieces come as their kernels leave
    them.

    Poisoned with NaN are the rows of the residual that a rank does not own, and those of a norm
    until somebody waits for them.
    """

    def __init__(self, exchange: Exchange, rank: int, in_pieces: bool) -> None:
        self.exchange, self.rank, self.size, self.in_pieces = (
            exchange,
            rank,
            exchange.size,
            in_pieces,
        )
        self.pieces: list[tuple[slice, Tensor]] = []
        self.num_sums_in_pieces = 0

    def all_reduce(self, x: Tensor) -> Tensor:
        return x.copy_(self.exchange.sum(self.rank, x.clone()))

    def add_all_reduced(self, residual: Tensor, product: Tensor, norm: Any) -> None:
        residual.add_(self.all_reduce(product))

    def sums_in_pieces(self, num_tokens: int) -> bool:
        return self.in_pieces and num_tokens > 8

    def owned(self, num_tokens: int) -> Tensor:
        return torch.arange(num_tokens) // 2 % self.size == self.rank

    def add_in_pieces(
        self, compute: Callable[[slice], Tensor], residual: Tensor, norm: Any
    ) -> Tensor:
        self.num_sums_in_pieces += 1
        num_tokens = len(residual)
        before, self.pieces = self.pieces, []
        out = torch.full_like(residual, torch.nan)
        complete = residual.masked_fill(~self.owned(num_tokens)[:, None], 0)
        if self.num_sums_in_pieces > 1:  # until then all ranks have all rows
            complete = self.exchange.sum(self.rank, complete)
        else:
            complete = residual.clone()
        for rows in (slice(0, num_tokens // 2), slice(num_tokens // 2, num_tokens)):
            for earlier, values in before:
                if earlier == rows:
                    self.last[rows] = values
            complete[rows] += self.exchange.sum(self.rank, compute(rows))
            self.pieces.append((rows, norm(complete[rows])))
        residual.copy_(complete.masked_fill(~self.owned(num_tokens)[:, None], torch.nan))
        self.last = out
        return out

    def arriving(self, num_tokens: int) -> Iterator[slice]:
        for rows, values in self.pieces:
            self.last[rows] = values
            yield rows
        self.pieces = []

    def wait_for_pieces(self) -> None:
        for rows, values in self.pieces:
            self.last[rows] = values
        self.pieces = []

    def collect_rows(self, hidden: Tensor, rows: Tensor) -> Tensor:
        self.wait_for_pieces()
        mine = hidden[rows].masked_fill(~self.owned(len(hidden))[rows.long()].unsqueeze(1), 0)
        return self.exchange.sum(self.rank, mine)


def run_ranks(
    checkpoint: Checkpoint, prompts: list[list[int]], in_pieces: bool, size: int = 2
) -> tuple[list[Tensor], list[Rank]]:
    """Each rank's logits of the last tokens, from one prefill."""
    exchange = Exchange(size)
    ranks = [Rank(exchange, rank, in_pieces) for rank in range(size)]
    models = []
    for rank in ranks:
        with tensor_parallel(rank.rank, size):
            model = Qwen3ForCausalLM(checkpoint.model.config, 64)
        with torch.no_grad():
            load_model(model, checkpoint.path)
        model.model.layers[-1].self_attn.attn.only_last_tokens = True
        for module in model.modules():
            if hasattr(module, "tp"):
                module.tp = rank
        models.append(model)
    borders = torch.tensor([0, *torch.tensor([len(p) for p in prompts]).cumsum(0)]).int()
    longest = max(map(len, prompts))
    inputs = StepInputs(
        is_prefill=True,
        attention=PrefillPlan(borders, borders, longest, longest),
        last_token_rows=borders[1:] - 1,
    )
    input_ids = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
    logits: list[Any] = [None] * size

    def work(index: int) -> None:
        set_context(inputs)
        with torch.inference_mode():
            logits[index] = models[index].compute_logits(models[index](input_ids, positions))
        reset_context()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return logits, ranks


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_ranks_agree_with_transformers(tmp_path: Any, in_pieces: bool, num_layers: int) -> None:
    """Whole models; the last tokens' rows are collected from the ranks that own them."""
    checkpoint = make_checkpoint(tmp_path, num_hidden_layers=num_layers, vocab_size=128)
    prompts = random_prompts(0, [5, 1, 9, 4, 1])
    logits, ranks = run_ranks(checkpoint, prompts, in_pieces)
    expected = torch.stack([checkpoint.logits(prompt)[-1] for prompt in prompts])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    # Two sums a layer; in the last layer the rows that go on are too few for pieces.
    assert ranks[0].num_sums_in_pieces == (2 * (num_layers - 1) if in_pieces else 0)


@pytest.mark.parametrize("reads_norm", [True, False])
def test_all_rows_are_completed_where_they_are_needed(reads_norm: bool) -> None:
    """Behind a sum in pieces: for a second norm of it or the stream itself, and for an addition
    that cannot be cut.
    """
    exchange, norm = Exchange(2), make_norm()
    layers = []
    for rank in range(2):
        with tensor_parallel(rank, 2):
            layers.append(random_layer(RowParallelLinear(8, HIDDEN)))
        layers[rank].tp = Rank(exchange, rank, in_pieces=True)
    hidden, x = torch.randn(12, HIDDEN), torch.randn(2, 12, 4)
    results: list[Any] = [None, None]

    def work(rank: int) -> None:
        stream = ResidualStream(hidden.clone())
        stream.add(layers[rank], x[rank])
        first = stream.normed(norm)
        values = first.values().clone()
        again = stream.normed(norm).values() if reads_norm else norm(stream.values())
        assert torch.equal(again, values)
        stream.add(layers[rank], x[rank], scale=2.0)
        results[rank] = stream.normed(norm).values()
        for read in (first.values, lambda: first.piece(slice(2))):  # the next sum overwrites it
            with pytest.raises(AssertionError, match="the stream changed"):
                read()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    product = sum(layer(part) for layer, part in zip(layers, x, strict=True))
    for result in results:
        torch.testing.assert_close(result, norm(hidden + 3 * product))


# --- the choice of the matmul ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_tokens, is_prefill, splits, reader_sums, kernel",
    [
        (1, False, 4, True, MatmulKernel.GEMV),
        (1, True, 0, False, MatmulKernel.GEMV),
        (16, False, 4, True, MatmulKernel.SPLIT_K),
        (16, False, 1, False, MatmulKernel.SPLIT_K),  # one split leaves nothing to add up
        (16, False, 4, False, MatmulKernel.CUBLAS),
        (16, False, 0, True, MatmulKernel.CUBLAS),
        (16, True, 4, True, MatmulKernel.CUBLAS),
        (4096, True, 4, True, MatmulKernel.CUBLAS),
    ],
)
def test_the_choice_on_a_gpu(
    num_tokens: int,
    is_prefill: bool,
    splits: int,
    reader_sums: bool,
    kernel: MatmulKernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With stand-ins for tensors on a GPU."""
    monkeypatch.setattr(unquantized, "num_splits", lambda x, weight: splits)
    x: Any = SimpleNamespace(is_cuda=True, shape=(num_tokens, 64))
    set_context(StepInputs(is_prefill=is_prefill))
    choice = unquantized.choose_matmul(x, torch.empty(0), reader_sums)
    reset_context()
    assert choice.kernel is kernel
    if kernel is MatmulKernel.SPLIT_K:
        assert choice.splits == splits
