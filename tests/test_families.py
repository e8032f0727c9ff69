"""Every family: the tokens of `transformers`, however the work is cut; in float32 on the CPU.

What all families share is tested at more cuts, on Qwen, in test_equality.py.
"""

from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import (
    Checkpoint,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import SamplingParams
from nanovllm.models.mistral import MistralForCausalLM

NUM_TOKENS = 24
LENGTHS = [1, 2, 15, 16, 17, 7, 3, 31, 120, 33, 48, 64, 90]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(architecture="LlamaForCausalLM", rope_theta=5e5),
    "llama-tied-mqa": dict(
        architecture="LlamaForCausalLM", num_key_value_heads=1, tie_word_embeddings=True
    ),
    "llama-bias-wide-heads": dict(
        architecture="LlamaForCausalLM", attention_bias=True, head_dim=32, rms_norm_eps=1e-3
    ),
    "mistral": dict(
        architecture="MistralForCausalLM", sliding_window=None, head_dim=24, rope_theta=1e6
    ),
    # A window smaller than most prompts, that ends inside a block.
    "mistral-window": dict(
        architecture="MistralForCausalLM", sliding_window=21, tie_word_embeddings=True
    ),
    "ministral": dict(
        architecture="MinistralForCausalLM",
        head_dim=16,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        sliding_window=16,
    ),
    "phi3-window": dict(architecture="Phi3ForCausalLM", sliding_window=9),
    "phi3-shared-kv-head-tied": dict(
        architecture="Phi3ForCausalLM", num_key_value_heads=1, tie_word_embeddings=True
    ),
    "olmo2-shared-kv-head": dict(
        architecture="Olmo2ForCausalLM", num_key_value_heads=1, rms_norm_eps=1e-3
    ),
    "olmo2-bias": dict(architecture="Olmo2ForCausalLM", attention_bias=True, std=0.6),
    "smollm3": dict(
        architecture="SmolLM3ForCausalLM",
        num_hidden_layers=3,
        no_rope_layer_interval=2,  # the second layer has no RoPE
        tie_word_embeddings=True,
    ),
    "smollm3-window-bias": dict(
        architecture="SmolLM3ForCausalLM",
        num_hidden_layers=3,
        no_rope_layers=[0, 1, 0],  # these have the window
        use_sliding_window=True,
        sliding_window=20,
        attention_bias=True,
        head_dim=16,
    ),
    "granite": dict(
        architecture="GraniteForCausalLM",
        embedding_multiplier=6.0,
        attention_multiplier=0.5,
        residual_multiplier=0.4,
        logits_scaling=0.5,
    ),
    "granite-bias-tied": dict(
        architecture="GraniteForCausalLM",
        embedding_multiplier=3,
        attention_multiplier=0.1,
        residual_multiplier=1.5,
        logits_scaling=2,
        attention_bias=True,
        tie_word_embeddings=True,
    ),
}
CUTS: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    # Just enough for the longest prompt, so the smallest cache there can be.
    "tiny-cache": dict(max_model_len=145, kvcache_block_size=4, num_kvcache_blocks=37),
    "ranks": dict(tensor_parallel_size=2, max_num_batched_tokens=50),
}


def need(options: dict[str, Any]) -> None:
    """Skip a test of an architecture that is newer than the installed transformers."""
    architecture = options["architecture"]
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")


@pytest.fixture(scope="module", params=FAMILIES)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts of many lengths, some that begin alike, and their completions."""
    name = request.param
    need(FAMILIES[name])
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(name), **{"seed": 1, **FAMILIES[name]})
    prompts = random_prompts(0, LENGTHS)
    prompts += [prompts[8][:40] + tail for tail in random_prompts(1, [3, 20])] + [prompts[11]]
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS)


@pytest.mark.parametrize("cut", CUTS)
def test_same_tokens_however_the_work_is_cut(
    reference: tuple[Checkpoint, list[list[int]], list[list[int]]], cut: str
) -> None:
    checkpoint, prompts, expected = reference
    config = checkpoint.model.config.get_text_config()
    if cut == "ranks" and config.num_attention_heads % 2:
        pytest.skip("heads that two ranks cannot share")
    llm = make_llm(checkpoint.path, **CUTS[cut])
    try:
        assert generate_ids(llm, prompts, greedy(NUM_TOKENS)) == expected
        preemptions = llm.scheduler.counters["preemptions"]
        assert (preemptions > 3) == (cut == "tiny-cache"), preemptions
        # Again: now most of it is in the prefix cache, and the order must not matter.
        params = [greedy(1 + 5 * i % NUM_TOKENS) for i in range(len(prompts))]
        expected = [tokens[: p.max_tokens] for tokens, p in zip(expected, params, strict=True)]
        assert generate_ids(llm, prompts[::-1], params[::-1]) == expected[::-1]
    finally:
        llm.exit()


def test_logits_are_scaled(tmp_path: Path) -> None:
    """Which greedy tokens do not show."""
    options = dict(FAMILIES["granite"], logits_scaling=2.5)
    checkpoint = make_checkpoint(tmp_path, **options)
    prompts = random_prompts(2, [5, 40])
    llm = make_llm(checkpoint.path)
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, logprobs=3))
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = checkpoint.logits(prompt)[-1].log_softmax(-1)
        (logprobs,) = output["logprobs"]
        assert len(logprobs) >= 3
        for token, logprob in logprobs.items():
            assert logprob == pytest.approx(expected[token].item(), abs=1e-4)


# --- what is refused ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama-mlp-bias": (dict(architecture="LlamaForCausalLM", mlp_bias=True), "mlp_bias True"),
    "llama-act": (dict(architecture="LlamaForCausalLM", hidden_act="gelu"), "hidden_act 'gelu'"),
    "mistral-bias": (
        dict(architecture="MistralForCausalLM", attention_bias=True),
        "attention_bias True is not supported for mistral",
    ),
    "phi3-bias": (dict(architecture="Phi3ForCausalLM", attention_bias=True), "attention_bias True"),
    "phi3-head-bias": (
        dict(architecture="Phi3ForCausalLM", lm_head_bias=True),
        "lm_head_bias True",
    ),
    "olmo2-act": (dict(architecture="Olmo2ForCausalLM", hidden_act="relu"), "hidden_act 'relu'"),
    "smollm3-mlp-bias": (dict(architecture="SmolLM3ForCausalLM", mlp_bias=True), "mlp_bias True"),
    "smollm3-no-window": (
        dict(
            architecture="SmolLM3ForCausalLM",
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=8,
        ),
        "use_sliding_window False",
    ),
    "granite-mlp-bias": (dict(architecture="GraniteForCausalLM", mlp_bias=True), "mlp_bias True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_be_run_wrongly_are_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    need(options)
    checkpoint = make_checkpoint(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        make_llm(checkpoint.path)


def test_types_of_layers_that_mistral_does_not_have_are_refused() -> None:
    """It has its window in all layers. (transformers reads a config.json with both as Ministral's,
    where there is that.)
    """
    config = transformers.MistralConfig(num_hidden_layers=1, layer_types=["full_attention"])
    with pytest.raises(ValueError, match="layer_types .* is not supported for mistral"):
        MistralForCausalLM.check_config(config, tp_size=1)
