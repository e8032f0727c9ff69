"""Every family: the tokens of `transformers`, however the work is cut; in float32 on the CPU.

What all families share is tested at more cuts, on Qwen, in test_equality.py.
"""

from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import (
    QWEN2,
    QWEN3,
    Checkpoint,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import SamplingParams
from nanovllm.layers.residual import Normed, ResidualStream
from nanovllm.models.mistral import MistralForCausalLM

NUM_TOKENS = 24
LENGTHS = [1, 2, 15, 16, 17, 7, 3, 31, 120, 33, 48, 64, 90]

GEMMA3: dict[str, Any] = dict(architecture="Gemma3ForCausalLM", head_dim=16, num_hidden_layers=4)
LONGROPE: dict[str, Any] = dict(
    architecture="Phi3ForCausalLM",
    num_attention_heads=2,  # of 24 numbers each, of which 6 are rotated
    partial_rotary_factor=0.25,
    rope_scaling=dict(type="longrope", short_factor=[1.0, 1.2, 1.5], long_factor=[2.0, 5.0, 12.0]),
)
QWEN3_MOE: dict[str, Any] = dict(
    architecture="Qwen3MoeForCausalLM",
    head_dim=16,
    moe_intermediate_size=24,
    num_experts=7,
    num_experts_per_tok=3,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(architecture="LlamaForCausalLM", rope_theta=5e5),
    "llama-tied-mqa": dict(
        architecture="LlamaForCausalLM", num_key_value_heads=1, tie_word_embeddings=True
    ),
    "llama-bias-wide-heads": dict(
        architecture="LlamaForCausalLM", attention_bias=True, head_dim=32, rms_norm_eps=1e-3
    ),
    # Windows: smaller than most prompts, and as long as a block; then larger than all of them.
    "qwen3-window": dict(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=16, max_window_layers=1
    ),
    "qwen2-window": dict(
        architecture=QWEN2,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3": dict(
        GEMMA3, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8
    ),
    "gemma3-tied-scaled": dict(
        GEMMA3 | dict(num_hidden_layers=3),
        tie_word_embeddings=True,
        std=0.05,  # with larger weights the embedding outweighs the layers, and tokens repeat
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        sliding_window=33,
        rope_theta=1e6,
        rope_scaling=dict(rope_type="linear", factor=8.0),  # not of the layers with a window
        rope_local_base_freq=1e3,
        query_pre_attn_scalar=40,
        final_logit_softcapping=3.0,
    ),
    "gemma3-wide-window": dict(
        GEMMA3, sliding_window=200, sliding_window_pattern=2, attention_bias=True
    ),
    "gemma3-wrapped": dict(
        GEMMA3 | dict(architecture="Gemma3ForConditionalGeneration", num_hidden_layers=2),
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=17,
    ),
    "gemma2": dict(
        architecture="Gemma2ForCausalLM",
        head_dim=16,
        num_hidden_layers=3,  # of a window in the first and the last
        sliding_window=12,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=8.0,
    ),
    "gemma2-uncapped": dict(
        architecture="Gemma2ForCausalLM",
        head_dim=16,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
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
    # All sequences are shorter than the original length.
    "phi3-partial-longrope": dict(LONGROPE, original_max_position_embeddings=256),
    "olmo2-shared-kv-head": dict(
        architecture="Olmo2ForCausalLM", num_key_value_heads=1, rms_norm_eps=1e-3
    ),
    "olmo2-bias": dict(architecture="Olmo2ForCausalLM", attention_bias=True, std=0.6),
    "olmo3": dict(
        architecture="Olmo3ForCausalLM",
        num_hidden_layers=4,
        num_key_value_heads=4,
        sliding_window=20,  # in all layers but the last, the only one whose RoPE is scaled
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=40),
    ),
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
    "qwen3-moe": dict(**QWEN3_MOE, norm_topk_prob=True, seed=1),
    "qwen3-moe-one-expert-a-token": dict(**{**QWEN3_MOE, "num_experts_per_tok": 1}, seed=1),
    "qwen3-moe-some-layers-dense": dict(
        **QWEN3_MOE, num_hidden_layers=4, decoder_sparse_step=2, mlp_only_layers=[3], seed=2
    ),
    # Scaled RoPE, of texts longer than the original ones.
    "llama-3.1": dict(
        architecture="LlamaForCausalLM",
        rope_theta=1e4,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        seed=1,
    ),
    "qwen3-yarn": dict(
        rope_theta=1e4,
        rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32),
        seed=1,
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
    architecture = options.get("architecture", QWEN3)
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")


@pytest.fixture(scope="module", params=FAMILIES)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts of many lengths, some that begin alike, and their completions."""
    name = request.param
    need(FAMILIES[name])
    options = {"seed": 1, **FAMILIES[name]}
    checkpoint = make_checkpoint(tmp_path_factory.mktemp(name), **options)
    prompts = random_prompts(0, LENGTHS)
    prompts += [prompts[8][:40] + tail for tail in random_prompts(1, [3, 20])] + [prompts[11]]
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS)


@pytest.mark.parametrize("cut", CUTS)
def test_same_tokens_however_the_work_is_cut(
    reference: tuple[Checkpoint, list[list[int]], list[list[int]]], cut: str
) -> None:
    checkpoint, prompts, expected = reference
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


def test_a_norm_for_one_reader_has_no_other(
    reference: tuple[Checkpoint, list[list[int]], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may come in FP8, rounded as that layer wants it, which no other could read."""
    told: list[tuple[Normed, Any]] = []
    readers: list[tuple[Normed, Any]] = []
    reads: list[Normed] = []
    normed, project, values = ResidualStream.normed, Normed.project, Normed.values

    def telling(stream: ResidualStream, norm: Any, reader: Any = None) -> Normed:
        result = normed(stream, norm, reader)
        if reader is not None:
            told.append((result, reader))
        return result

    def projecting(x: Normed, layer: Any, epilogue: Any) -> Any:
        readers.append((x, layer))
        return project(x, layer, epilogue)

    def reading(x: Normed) -> Any:
        reads.append(x)
        return values(x)

    monkeypatch.setattr(ResidualStream, "normed", telling)
    monkeypatch.setattr(Normed, "project", projecting)
    monkeypatch.setattr(Normed, "values", reading)
    checkpoint, prompts, expected = reference
    llm = make_llm(checkpoint.path)
    try:
        assert generate_ids(llm, prompts[:5], greedy(2)) == [ids[:2] for ids in expected[:5]]
    finally:
        llm.exit()
    assert bool(told) == (not llm.config.hf_config.model_type.startswith("olmo"))  # has no pre-norm
    for x, reader in told:
        assert [layer for other, layer in readers if other is x] == [reader]
        assert sum(other is x for other in reads) == 1


def test_longrope_beyond_the_original_length(tmp_path: Path) -> None:
    """An engine for longer sequences has the factors for these, as transformers for each such."""
    checkpoint = make_checkpoint(tmp_path, **LONGROPE, original_max_position_embeddings=16)
    prompts = random_prompts(0, [17, 30, 100])
    llm = make_llm(checkpoint.path, max_num_batched_tokens=23)
    assert generate_ids(llm, prompts, greedy(8)) == checkpoint.complete(prompts, 8)


def test_same_log_probabilities(
    reference: tuple[Checkpoint, list[list[int]], list[list[int]]],
) -> None:
    """Factors and caps of the logits leave the likeliest token what it is, and change these."""
    checkpoint, prompts, expected = reference
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=3)
    llm = make_llm(checkpoint.path)
    try:
        outputs = llm.generate(prompts[:9], params, use_tqdm=False)
    finally:
        llm.exit()
    for prompt, tokens, output in zip(prompts, expected, outputs, strict=False):
        logits = checkpoint.logits(prompt + tokens[:3])[len(prompt) - 1 :]
        for theirs, ours in zip(logits.log_softmax(-1), output["logprobs"], strict=True):
            assert len(ours) == 3
            for token_id, value in ours.items():
                assert value == pytest.approx(theirs[token_id].item(), abs=2e-4)


# --- what is refused ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama-mlp-bias": (dict(architecture="LlamaForCausalLM", mlp_bias=True), "mlp_bias True"),
    "llama-act": (dict(architecture="LlamaForCausalLM", hidden_act="gelu"), "hidden_act 'gelu'"),
    "gemma3-act": (dict(GEMMA3, hidden_activation="gelu"), "hidden_activation 'gelu'.*'gelu_pytor"),
    "gemma3-bidirectional": (
        dict(GEMMA3, use_bidirectional_attention=True),
        "use_bidirectional_attention True is not supported for gemma3_text",
    ),
    "gemma3-cap": (dict(GEMMA3, attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0"),
    "gemma2-bidirectional": (
        dict(architecture="Gemma2ForCausalLM", use_bidirectional_attention=True),
        "use_bidirectional_attention True is not supported for gemma2",
    ),
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
    "qwen3-moe-top-k": (
        dict(**{**QWEN3_MOE, "num_experts_per_tok": 8}),
        r"num_experts_per_tok \(8\) must be 1 to num_experts \(7\)",
    ),
    "qwen3-moe-act": (
        dict(**QWEN3_MOE, hidden_act="gelu_pytorch_tanh"),
        "hidden_act 'gelu_pytorch_tanh' is not supported for qwen3_moe",
    ),
    "qwen3-moe-window": (
        dict(**QWEN3_MOE, use_sliding_window=True, sliding_window=32),
        "use_sliding_window True is not supported for qwen3_moe",
    ),
    "qwen3-moe-sparse-step": (
        dict(**QWEN3_MOE, decoder_sparse_step=0, mlp_only_layers=[0, 1]),
        r"decoder_sparse_step \(0\)",
    ),
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
