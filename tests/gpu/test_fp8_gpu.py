"""FP8 weights on a GPU: each kernel at the sizes of Qwen3-8B, alone and in a CUDA graph, and the
engine against `transformers` running the dequantised weights.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_llm, random_prompts
from quantized import block_config, block_fp8, quantize_checkpoint
from torch import Tensor
from torch.nn import functional as F

from nanovllm.kernels._triton import has_tma
from nanovllm.kernels.fp8_dequantize import fp8_dequantize
from nanovllm.kernels.fp8_quantize import quantize_input
from nanovllm.kernels.fp8_scaled_gemm import fp8_scaled_gemm
from nanovllm.kernels.fp8_weight import (
    FP8Input,
    FP8Weight,
    Rounding,
    dequantize_fp8,
    dequantize_input,
    quantize_input_torch,
    scale_of,
    to_e4m3,
)
from nanovllm.kernels.gate_mul import gate_mul, gate_mul_rounded, gate_mul_torch
from nanovllm.kernels.moe import MoEWeights, moe_gemv, moe_partial_sums, moe_torch
from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm_torch
from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.residual import ResidualStream
from nanovllm.quantization import fp8_matmul
from nanovllm.quantization.fp8 import FP8, FP8Rows
from nanovllm.quantization.fp8_blocks import FP8Blocks
from nanovllm.quantization.fp8_matmul import FP8Kernel, choose_fp8_kernel, multiply_fp8
from nanovllm.quantization.weight_format import PLAIN, READER_SUMS, Epilogue, PartialSums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

GRAINS = {"rows": (1, 0), "blocks": (128, 128), "small": (64, 32)}
LAYERS = [(6144, 4096), (4096, 12288), (1040, 1024)]  # qkv, down; one that fills no tiles
TOKENS = [1, 2, 16, 17, 64, 65, 128, 200, 300, 513, 2048]


def make_weight(rows: int, columns: int, grains: str) -> FP8Weight:
    row_grain, column_grain = GRAINS[grains]
    if rows % row_grain:
        row_grain = 16
    column_grain = column_grain or columns
    matrix = torch.randn(rows, columns, device="cuda") * columns**-0.5
    matrix *= torch.exp2(torch.randn(rows, 1, device="cuda"))
    blocks = matrix.view(-1, row_grain, columns // column_grain, column_grain)
    scales = scale_of(blocks.abs().amax((1, 3)))
    values = to_e4m3(blocks / scales[:, None, :, None]).view(rows, columns)
    return FP8Weight(values, scales, row_grain, column_grain)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def whole(product: Tensor | PartialSums) -> Tensor:
    return product.values.float().sum(0) if isinstance(product, PartialSums) else product.float()


def assert_near(out: Tensor, expected: Tensor) -> None:
    """Rounding to bf16 is an error of 0.2%, that of several partial sums is less than twice as
    much; a scale, row or block mistaken for another is one of 10% and more.
    """
    assert out.shape == expected.shape
    errors = (out.float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert errors.max() < 0.01, errors.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("quantizes_input", [False, True], ids=["16-bit", "fp8"])
@pytest.mark.parametrize("grains", GRAINS)
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_products(
    layer: tuple[int, int], grains: str, quantizes_input: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows, columns = layer
    weight = make_weight(rows, columns, grains)
    matrix = dequantize_fp8(weight, torch.float32)
    bias = randn(rows, dtype=dtype)
    for num_tokens in TOKENS:
        x = randn(num_tokens, columns, dtype=dtype)
        seen = x.float()
        kernel = choose_fp8_kernel(x, weight, quantizes_input)
        if kernel is FP8Kernel.SCALED:
            seen = dequantize_input(quantize_input_torch(x, weight.column_grain))
        expected = F.linear(seen, matrix, bias.float())

        def multiply(epilogue: Epilogue, x: Tensor = x) -> Tensor:
            return whole(multiply_fp8(weight, x, bias, epilogue, None, quantizes_input))

        assert_near(multiply(PLAIN), expected)
        assert_near(multiply(READER_SUMS), expected)
        residual = randn(num_tokens, rows, dtype=dtype)
        before = residual.float()
        added = multiply_fp8(weight, x, bias, Epilogue(add_to=residual), None, quantizes_input)
        if isinstance(added, PartialSums):
            assert torch.equal(residual.float(), before)
            assert_near(whole(added), expected)
        else:
            assert added is residual
            assert_near(residual, expected + before)
        if kernel is not FP8Kernel.GEMV:
            pieces = torch.full((2 * num_tokens, rows), torch.nan, dtype=dtype, device="cuda")
            out = pieces[num_tokens:]
            assert_near(multiply(Epilogue(out=out)), expected)
            assert_near(out, expected)
            assert pieces[:num_tokens].isnan().all()


def test_all_kernels_are_taken() -> None:
    """So that the test above is of all of them."""
    if not has_tma():
        pytest.skip("before Hopper, wider steps are dequantised")
    rows, blocks = (make_weight(2048, 1024, grains) for grains in ("rows", "blocks"))
    for weight in (rows, blocks):
        chosen = {choose_fp8_kernel(randn(n, 1024), weight, n != 2048) for n in TOKENS}
        assert chosen == set(FP8Kernel)


@pytest.mark.parametrize("grains", GRAINS)
def test_sums_of_one_sign(grains: str) -> None:
    """The tensor cores' own sum of so many products that only grow would be 15% too small."""
    torch.manual_seed(0)
    weight = make_weight(1024, 12288, grains)
    weight = weight._replace(values=weight.values.float().abs().to(weight.values.dtype))
    for num_tokens in (65, 200):
        x = quantize_input_torch(randn(num_tokens, 12288).abs(), weight.column_grain)
        expected = F.linear(dequantize_input(x), dequantize_fp8(weight, torch.float32))
        ratio = fp8_scaled_gemm(x, weight, None, reader_sums=True).float().sum(0) / expected
        assert (ratio.mean() - 1).abs() < 0.002


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("grains", GRAINS)
def test_one_token_with_norm_and_activation(grains: str, activation: str | None) -> None:
    torch.manual_seed(0)
    weight = make_weight(2 * 12288 if activation else 6144, 4096, grains)
    norm = RMSNorm(4096, 1e-6).to("cuda", torch.bfloat16)
    norm.weight.copy_(randn(4096))
    x = randn(1, 4096)
    normed = rms_norm_torch(x.float(), norm.weight.float(), 1e-6)
    expected = F.linear(normed, dequantize_fp8(weight, torch.float32))
    if activation is not None:
        expected = gate_mul_torch(expected, activation)
    out = multiply_fp8(weight, x, None, Epilogue(activation=activation), norm, False)
    assert_near(whole(out), expected)


@pytest.mark.parametrize("num_tokens", [1, 16, 64, 256, 1000])
@pytest.mark.parametrize("grains", GRAINS)
def test_a_graph_computes_the_same_bits(grains: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    weight = make_weight(4096, 4096, grains)
    x = randn(num_tokens, 4096)

    def multiply() -> Tensor:
        product = multiply_fp8(weight, x, None, READER_SUMS, None, True)
        return product.values if isinstance(product, PartialSums) else product

    multiply()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = multiply()
    for _ in range(2):
        x.copy_(randn(num_tokens, 4096) * 3)
        graph.replay()
        assert torch.equal(out, multiply())


def assert_same_bits(out: FP8Input, expected: FP8Input) -> None:
    assert torch.equal(out.scales, expected.scales)
    assert torch.equal(out.values.float(), expected.values.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1024, 4096, 12288])
def test_rounding(columns: int, dtype: torch.dtype) -> None:
    """The bits of the references: of the inputs, and of a dequantised weight."""
    torch.manual_seed(0)
    x = randn(70, columns, dtype=dtype) * torch.exp2(randn(70, 1, dtype=dtype) * 3)
    x[3] = 0.0
    for group_size in (columns, 128, 32):
        rounding = Rounding(group_size, len(x))
        assert_same_bits(quantize_input(x, rounding), quantize_input_torch(x, group_size))
        sums, weight = randn(2, 70, columns, dtype=dtype), randn(columns, dtype=dtype)
        normed = add_rms_norm(x.clone(), sums, weight, 1e-6)
        out = add_rms_norm(x.clone(), sums, weight, 1e-6, rounding=rounding)
        assert isinstance(normed, Tensor) and isinstance(out, FP8Input)
        assert_same_bits(out, quantize_input_torch(normed, group_size))
        gate_up = randn(70, 2 * columns, dtype=dtype)
        out = gate_mul_rounded(gate_up, "silu", rounding)
        assert_same_bits(out, quantize_input_torch(gate_mul(gate_up), group_size))
    for grains in GRAINS:
        weight = make_weight(1040, columns, grains)
        assert torch.equal(fp8_dequantize(weight, dtype), dequantize_fp8(weight, dtype))


@pytest.mark.parametrize("num_tokens", [1, 64, 130, 301])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_norms_and_activations_round(
    num_tokens: int, in_blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder layer's second half, with the same bits as if each product rounded its input."""
    torch.manual_seed(0)
    weight_format: FP8
    weight_format = FP8Rows(has_row_scales=True, quantizes_input=True)
    if in_blocks:
        weight_format = FP8Blocks((128, 128), "weight_scale_inv", quantizes_input=True)

    def with_weight(layer: Any, *shard_ids: int) -> Any:
        layer.use_format(weight_format, [layer.shard(shard_id) for shard_id in shard_ids])
        made = make_weight(layer.output_size, layer.input_size, "blocks" if in_blocks else "rows")
        layer.weight.copy_(made.values)
        layer.weight_scale.copy_(made.scales.view_as(layer.weight_scale))
        return layer

    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            o_proj = with_weight(RowParallelLinear(1024, 2048), 0)
            gate_up = with_weight(GateUpLinear(2048, 3072), 0, 1)
            down = with_weight(RowParallelLinear(3072, 2048), 0)
            norms = [RMSNorm(2048, 1e-6) for _ in range(2)]
    finally:
        torch.set_default_dtype(torch.float32)
    for norm in norms:
        norm.weight.copy_(randn(2048))
    hidden, x = randn(num_tokens, 2048), randn(num_tokens, 1024)
    calls: list[Rounding] = []
    quantize = fp8_matmul.quantize_input

    def recording(x: Tensor, rounding: Rounding) -> FP8Input:
        calls.append(rounding)
        return quantize(x, rounding)

    monkeypatch.setattr(fp8_matmul, "quantize_input", recording)

    def run(rounds: bool) -> Tensor:
        calls.clear()
        stream = ResidualStream(hidden.clone())
        stream.add(o_proj, x)
        normed = stream.normed(norms[0], gate_up if rounds else None)
        before = gate_up if rounds else lambda x, reader: gate_up(x)
        stream.add(down, normed, before=before)
        return stream.normed(norms[1]).values()

    expected = run(rounds=False)
    num_calls = len(calls)
    out = run(rounds=True)
    assert torch.equal(out, expected)
    for layer in (gate_up, down):
        num_calls -= layer.rounding(hidden) is not None
    assert len(calls) == num_calls
    if num_tokens > 300:
        assert gate_up.rounding(hidden) is not None


# --- experts, of the size of Qwen3-30B-A3B --------------------------------------------------------


def make_experts(grains: str) -> tuple[MoEWeights, MoEWeights]:
    """In FP8, and dequantised to float32."""
    num_experts, hidden, intermediate = 128, 2048, 768
    gate_up = make_weight(num_experts * 2 * intermediate, hidden, grains)
    down = make_weight(num_experts * hidden, intermediate, grains)
    router = randn(num_experts, hidden) * 0.05
    fp8 = [
        weight._replace(values=weight.values.unflatten(0, (num_experts, -1)))
        for weight in (gate_up, down)
    ]
    exact = [
        dequantize_fp8(weight, torch.float32).unflatten(0, (num_experts, -1))
        for weight in (gate_up, down)
    ]
    return (
        MoEWeights(router, *fp8, top_k=8, is_normalized=True),
        MoEWeights(router.float(), *exact, top_k=8, is_normalized=True),
    )


def run_experts(x: Tensor, weights: MoEWeights) -> Tensor:
    return moe_gemv(x, weights) if len(x) == 1 else moe_partial_sums(x, weights).sum(0)


@pytest.mark.parametrize("grains", GRAINS)
def test_experts(grains: str) -> None:
    torch.manual_seed(0)
    weights, exact = make_experts(grains)
    for num_tokens in (1, 2, 16, 64, 129, 300, 1000):
        x = randn(num_tokens, 2048)
        expected = moe_torch(x.float(), exact)
        errors = (run_experts(x, weights).float() - expected).norm(dim=1) / expected.norm(dim=1)
        assert errors.median() < 0.01
        # Of two experts that score nearly alike, rounding may choose the other one.
        assert (errors > 0.02).sum() <= 0.002 * num_tokens


@pytest.mark.parametrize("num_tokens", [1, 2, 300])
def test_a_graph_of_experts_follows_the_routing(num_tokens: int) -> None:
    torch.manual_seed(0)
    weights, _ = make_experts("blocks")
    x = randn(num_tokens, 2048)
    run_experts(x, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run_experts(x, weights)
    for inputs in (randn(num_tokens, 2048), randn(1, 2048).expand(num_tokens, -1)):
        x.copy_(inputs)
        graph.replay()
        assert torch.equal(out, run_experts(x, weights))


# --- the engine -----------------------------------------------------------------------------------

SIZES: dict[str, Any] = dict(
    std=256**-0.5,
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=512,
    head_dim=64,
    num_hidden_layers=3,
)


@pytest.fixture(scope="module", params=["blocks", "channels", "blocks of experts"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    layout: Any = block_fp8(), block_config()
    sizes = dict(SIZES)
    if request.param == "blocks of experts":
        sizes.update(
            architecture="Qwen3MoeForCausalLM",
            seed=1,
            norm_topk_prob=True,
            mlp_only_layers=[1],
            moe_intermediate_size=128,
            num_experts=32,
            num_experts_per_tok=8,
        )
    if request.param == "channels":
        library = pytest.importorskip("compressed_tensors.quantization")
        from compressed_checkpoints import compressed, compressed_config

        args = library.QuantizationArgs(
            num_bits=8, type="float", symmetric=True, strategy="channel"
        )
        layout = compressed(args, "float-quantized"), compressed_config(args, "float-quantized")
    saved = quantize_checkpoint(tmp_path_factory.mktemp("fp8"), *layout, **sizes)
    checkpoint = Checkpoint(saved.path, saved.model.to("cuda"))
    prompts = random_prompts(0, [1, 2, 17, 63, 129, 256, 300, 513], 1000)
    return checkpoint, prompts, checkpoint.complete(prompts, 32, min_margin=2e-5)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_of_transformers(case: Any, dtype: str, eager: bool) -> None:
    checkpoint, prompts, expected = case
    llm = make_llm(
        checkpoint.path,
        device="cuda",
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=1024,
        kvcache_block_size=256,
        num_kvcache_blocks=100,
    )
    try:
        runs = [
            generate_ids(llm, prompts, greedy(32)),
            [generate_ids(llm, [prompt], greedy(32))[0] for prompt in prompts],  # one token a step
        ]
    finally:
        llm.exit()
    for completions in runs:
        if dtype == "float32":
            assert completions == expected
        else:
            assert share_of_good_choices(checkpoint, prompts, completions) > 0.95


def share_of_good_choices(
    checkpoint: Checkpoint, prompts: list[list[int]], completions: list[list[int]]
) -> float:
    """Of the chosen tokens, each given the tokens before it, how many have a logit near the largest
    in float32 with inputs that are not rounded.
    """
    good = []
    for prompt, tokens in zip(prompts, completions, strict=True):
        logits = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1)
        good.append((logits.max(dim=1).values - chosen) / logits.std(dim=1) < 0.2)
    return torch.cat(good).float().mean().item()


def test_online_quantisation_runs(tmp_path: Path) -> None:
    """`quantization="fp8"` of a checkpoint in 16 bits, in all kinds of steps."""
    from conftest import make_checkpoint

    saved = make_checkpoint(tmp_path, **SIZES)
    checkpoint = Checkpoint(saved.path, saved.model.to("cuda"))
    prompts = random_prompts(0, [2, 63, 129, 513], 1000)
    llm = make_llm(
        checkpoint.path,
        device="cuda",
        dtype="bfloat16",
        quantization="fp8",
        max_model_len=1024,
        kvcache_block_size=256,
        num_kvcache_blocks=100,
    )
    try:
        completions = generate_ids(llm, prompts, greedy(32))
    finally:
        llm.exit()
    assert share_of_good_choices(checkpoint, prompts, completions) > 0.7
