"""FP8 weights: checkpoints of each layout give the logits and tokens of `transformers` running the
dequantised weights in float32.
"""

from pathlib import Path
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationArgs
from conftest import Checkpoint, generate_ids, greedy, make_llm, random_prompts
from quantized import (
    Quantize,
    block_config,
    block_fp8,
    compressed,
    compressed_config,
    quantize_checkpoint,
    tensor_fp8,
)

QWEN3_MOE: dict[str, Any] = dict(
    architecture="Qwen3MoeForCausalLM",
    head_dim=16,
    moe_intermediate_size=24,
    num_experts=8,
    num_experts_per_tok=3,
)
PROMPTS = random_prompts(3, [40, 3, 33])
FLOAT8 = dict(num_bits=8, type="float", symmetric=True)
CHANNEL = QuantizationArgs(**FLOAT8, strategy="channel")
TENSOR = QuantizationArgs(**FLOAT8, strategy="tensor")
BLOCK = QuantizationArgs(**FLOAT8, strategy="block", block_structure=[32, 16])
STATIC = QuantizationArgs(**FLOAT8, strategy="tensor").model_dump(mode="json")

LAYOUT = "float-quantized"
FORMATS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "blocks": (block_fp8(), block_config()),
    "small-blocks": (block_fp8((32, 16)), block_config((32, 16))),
    "tensor": (
        tensor_fp8,
        dict(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"]),
    ),
    "compressed-tensor": (
        compressed(TENSOR, LAYOUT),
        compressed_config(TENSOR, LAYOUT, input_activations=STATIC),
    ),
    "compressed-channel": (compressed(CHANNEL, LAYOUT), compressed_config(CHANNEL, LAYOUT)),
    "compressed-block": (compressed(BLOCK, LAYOUT), compressed_config(BLOCK, LAYOUT)),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "llama-tied": dict(architecture="LlamaForCausalLM", tie_word_embeddings=True),
    "qwen3-moe": QWEN3_MOE,
}


def outputs_of(checkpoint: Checkpoint, num_tokens: int = 8, **options: Any) -> list[list[int]]:
    llm = make_llm(checkpoint.path, **options)
    try:
        return generate_ids(llm, PROMPTS, greedy(num_tokens))
    finally:
        llm.exit()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_are_those_of_the_dequantised_weights(
    model: str, layout: str, tmp_path: Path
) -> None:
    quantize, config = FORMATS[layout]
    checkpoint = quantize_checkpoint(tmp_path, quantize, config, **MODELS[model])
    assert outputs_of(checkpoint) == checkpoint.complete(PROMPTS, 8)
