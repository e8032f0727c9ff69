"""FP8 weights: checkpoints of each layout give the logits and tokens of `transformers` running the
dequantised weights in float32.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors")  # the test extra has it from Python 3.11 on

from compressed_checkpoints import compressed, compressed_config
from compressed_tensors.quantization import QuantizationArgs
from conftest import (
    QWEN2,
    Checkpoint,
    generate_ids,
    greedy,
    make_llm,
    random_prompts,
)
from quantized import (
    QWEN3_MOE,
    WEIGHTS,
    Quantize,
    block_config,
    block_fp8,
    quantize_checkpoint,
    tensor_fp8,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm import SamplingParams
from nanovllm.config import Config
from nanovllm.kernels._triton import HAS_TRITON
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.models import build_model
from nanovllm.quantization import fp8_matmul
from nanovllm.quantization.fp8 import FP8Online
from nanovllm.quantization.fp8_blocks import FP8Blocks
from nanovllm.quantization.quantized import QuantizedFormat
from nanovllm.quantization.weight_format import Epilogue, PartialSums
from nanovllm.utils.tensor_parallel import tensor_parallel

LLAMA = "LlamaForCausalLM"
PROMPTS = random_prompts(3, [40, 3, 33])
FLOAT8: dict[str, Any] = dict(num_bits=8, type="float", symmetric=True)
CHANNEL = QuantizationArgs(**FLOAT8, strategy="channel")
TENSOR = QuantizationArgs(**FLOAT8, strategy="tensor")
BLOCK = QuantizationArgs(**FLOAT8, strategy="block", block_structure=[32, 16])
STATIC = json.loads(TENSOR.model_dump_json())
LAYOUT = "float-quantized"
Layout = tuple[Quantize, dict[str, Any]]
AUTO_FP8: Layout = (
    tensor_fp8,
    dict(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"]),
)
BLOCKS: Layout = (block_fp8(), block_config())
SMALL_BLOCKS: Layout = (block_fp8((32, 16)), block_config((32, 16)))
CHANNELS: Layout = (compressed(CHANNEL, LAYOUT), compressed_config(CHANNEL, LAYOUT))
CASES: dict[str, tuple[Layout, dict[str, Any]]] = {
    "blocks": (BLOCKS, {}),
    # Whole blocks, a part of one, and one that ranks would cut.
    "blocks-large": (BLOCKS, dict(hidden_size=128, intermediate_size=320, head_dim=32)),
    "blocks-moe": (BLOCKS, QWEN3_MOE),
    "blocks-stacked": (SMALL_BLOCKS, dict(architecture="Phi3ForCausalLM")),
    "blocks-exponents": ((block_fp8((16, 16), True), block_config((16, 16))), {}),
    "tensor": (AUTO_FP8, {}),
    "tensor-tied-bias": (
        AUTO_FP8,
        dict(architecture=QWEN2, tie_word_embeddings=True, num_key_value_heads=1),
    ),
    "tensor-moe": (AUTO_FP8, QWEN3_MOE),
    "compressed-tensor": (
        (
            compressed(TENSOR, LAYOUT),
            compressed_config(TENSOR, LAYOUT, input_activations=STATIC),
        ),
        dict(architecture=LLAMA),
    ),
    "compressed-channel": (CHANNELS, dict(architecture=LLAMA, tie_word_embeddings=True)),
    "compressed-channel-moe": (CHANNELS, QWEN3_MOE),
    "compressed-block": (
        (compressed(BLOCK, LAYOUT), compressed_config(BLOCK, LAYOUT)),
        dict(architecture=LLAMA),
    ),
}


def make(path: Path, layout: Layout, **options: Any) -> Checkpoint:
    return quantize_checkpoint(path, *layout, **options)


def outputs_of(path: str | Path, num_tokens: int = 8, **options: Any) -> list[list[int]]:
    llm = make_llm(str(path), **options)
    try:
        return generate_ids(llm, PROMPTS, greedy(num_tokens))
    finally:
        llm.exit()


def weights_of(path: Path, rank: int = 0, num_ranks: int = 1, **options: Any) -> dict[str, Tensor]:
    """The weights that a rank multiplies with, dequantised, by the names of their layers."""
    config = Config.from_options(str(path), dict(device="cpu", dtype="float32", **options))
    with tensor_parallel(rank, num_ranks):
        model = build_model(config, torch.device("cpu"))
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        weight_format = getattr(module, "weight_format", None)
        if isinstance(weight_format, QuantizedFormat):
            found[name] = weight_format.dequantize(module, torch.float32)
    for name, param in model.named_parameters():
        layer = name.removesuffix(".weight")
        if layer not in found and not hasattr(param, "is_quantized_weight"):
            found[layer] = param.flatten(0, -2) if param.dim() == 3 else param
    return found


# --- right results --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_run_as_its_dequantised_weights(case: str, tmp_path: Path) -> None:
    """Tokens, logits, and what ranks hold: also where a rank's part begins inside a block, and
    where ranks share a KV head.
    """
    layout, options = CASES[case]
    checkpoint = make(tmp_path, layout, **options)
    llm = make_llm(checkpoint.path)
    assert llm.config.quantization == layout[1]["quant_method"]
    assert generate_ids(llm, PROMPTS, greedy(8)) == checkpoint.complete(PROMPTS, 8)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    expected = checkpoint.logits(PROMPTS[0])[-1].log_softmax(-1)
    for token_id, logprob in output.outputs[0].logprobs[0].items():
        assert logprob.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)
    llm.exit()
    for num_ranks in (2, 4):
        for rank in range(num_ranks):
            check_weights(tmp_path, tmp_path / "dequantized", rank, num_ranks)


def check_weights(
    path: Path, expected_path: Path, rank: int = 0, num_ranks: int = 1, **options: Any
) -> None:
    """A rank's weights are the same, bit by bit, as of a checkpoint that is not quantised."""
    found = weights_of(path, rank, num_ranks, **options)
    expected = weights_of(expected_path, rank, num_ranks)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_two_ranks_give_the_same_tokens(tmp_path: Path) -> None:
    sizes = dict(QWEN3_MOE, moe_intermediate_size=320, num_experts=4)
    checkpoint = make(tmp_path, BLOCKS, **sizes)
    expected = checkpoint.complete(PROMPTS, 8)
    assert outputs_of(tmp_path, tensor_parallel_size=2) == expected


@pytest.mark.parametrize("layout", [BLOCKS, CHANNELS])
def test_only_the_product_with_the_scale_is_rounded(layout: Layout, tmp_path: Path) -> None:
    make(tmp_path, layout)
    llm = make_llm(str(tmp_path), dtype="bfloat16")
    assert llm.model_runner is not None
    layer: Any = llm.model_runner.model.get_submodule("model.layers.0.self_attn.qkv_proj")
    generate_ids(llm, PROMPTS, greedy(1))
    exact = layer.weight_format.dequantize(layer, torch.float32)
    assert layer.dequantized.dtype == torch.bfloat16
    assert torch.equal(layer.dequantized, exact.bfloat16())
    llm.exit()


class OnGPU(torch.Tensor):
    """A tensor for which the layers take the kernels. They run in the interpreter."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton's interpreter"
)
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize("layout", ["blocks", "channels"])
@pytest.mark.parametrize("has_kernels", [False, True], ids=["no kernels", "kernels"])
def test_a_gpu_with_and_without_kernels_for_the_format(
    has_kernels: bool, layout: str, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without, the weight is dequantised each time, and multiplied as one in 16 bits."""
    monkeypatch.setattr(fp8_matmul, "has_e4m3", lambda: has_kernels)
    layer = RowParallelLinear(64, 48)
    weight_format = FP8Blocks((32, 32), "") if layout == "blocks" else FP8Online(True)
    layer.use_format(weight_format, [layer.shard()])
    weight_format.quantize(layer, torch.randn(48, 64), layer.shard())
    x, hidden = torch.randn(num_tokens, 64), torch.randn(num_tokens, 48)
    expected = hidden + layer(x)
    assert layer.dequantized is not None
    layer.dequantized.zero_()  # of a CPU, and not for a GPU
    product = layer.matmul(x.as_subclass(OnGPU), Epilogue(add_to=hidden))
    if isinstance(product, PartialSums):
        product = hidden + product.sum()
    torch.testing.assert_close(product.as_subclass(Tensor), expected)


def test_experts_on_a_gpu_without_a_kernel_for_the_format(tmp_path: Path) -> None:
    """All at once, `[experts, rows, in]`, what a CPU dequantises one by one."""
    make(tmp_path, BLOCKS, **QWEN3_MOE)
    config = Config.from_options(str(tmp_path), dict(device="cpu"))
    model = build_model(config, torch.device("cpu"))
    experts: Any = model.get_submodule("model.layers.1.mlp.experts")
    x = torch.zeros(1, 48)
    for matrices, shape in ((experts.gate_up_proj, (8, 48, 48)), (experts.down_proj, (8, 48, 24))):
        on_gpu = matrices.weights_for(x.as_subclass(OnGPU))
        on_cpu = matrices.weights_for(x)
        assert on_gpu.shape == shape
        assert torch.equal(on_gpu[5], on_cpu[5])
        assert list(matrices.dequantized) == [5]  # of the others nothing is kept


# --- made from 16 bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["qwen3", "phi3", "moe", "moe-merged"])
def test_made_while_loading(model: str, tmp_path: Path) -> None:
    """As compressed-tensors makes them, on any number of ranks."""
    options = {"qwen3": {}, "phi3": dict(architecture="Phi3ForCausalLM")}.get(model, QWEN3_MOE)
    checkpoint = make(tmp_path, CHANNELS, **options)
    original = tmp_path / "original"
    if model == "moe-merged":
        merge_experts(original / WEIGHTS)
    else:
        llm = make_llm(str(original), quantization="fp8")
        assert llm.config.quantization == "fp8"
        assert generate_ids(llm, PROMPTS, greedy(8)) == checkpoint.complete(PROMPTS, 8)
        llm.exit()
    for rank in range(2):
        check_weights(original, tmp_path / "dequantized", rank, 2, quantization="fp8")


def merge_experts(file: Path) -> None:
    """Have two tensors for all experts of a layer, as transformers 5 names them."""
    tensors = load_file(file)
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        halves = {
            kind: torch.stack([tensors.pop(f"{prefix}.{i}.{kind}_proj.weight") for i in range(8)])
            for kind in ("gate", "up", "down")
        }
        tensors[f"{prefix}.gate_up_proj"] = torch.cat((halves["gate"], halves["up"]), dim=1)
        tensors[f"{prefix}.down_proj"] = halves["down"]
    save_file(tensors, file)


@pytest.mark.parametrize("is_quantized", [True, False])
def test_dummy_weights(is_quantized: bool, tmp_path: Path) -> None:
    make(tmp_path, BLOCKS, **QWEN3_MOE)
    path = tmp_path if is_quantized else tmp_path / "original"
    options = {} if is_quantized else dict(quantization="fp8")
    (tmp_path / WEIGHTS).unlink()
    weights = weights_of(path, load_format="dummy", **options)
    for name, weight in weights.items():
        if name.endswith("_proj"):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert len(weight.unique()) > 100
    again = weights_of(path, load_format="dummy", **options)
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())
