"""Every family: the tokens of `transformers`, however the work is cut; in float32 on the CPU.

What all families share is tested at more cuts, on Qwen, in test_equality.py.
"""

from pathlib import Path
from typing import Any

import pytest
from conftest import (
    Checkpoint,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

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
    "olmo2-shared-kv-head": dict(
        architecture="Olmo2ForCausalLM", num_key_value_heads=1, rms_norm_eps=1e-3
    ),
    "olmo2-bias": dict(architecture="Olmo2ForCausalLM", attention_bias=True, std=0.6),
    "phi3": dict(architecture="Phi3ForCausalLM"),
    "phi3-shared-kv-head-tied": dict(
        architecture="Phi3ForCausalLM", num_key_value_heads=1, tie_word_embeddings=True
    ),
}
CUTS: dict[str, dict[str, Any]] = {
    "whole": dict(),
    "chunks": dict(max_num_batched_tokens=23),
    # Just enough for the longest prompt, so the smallest cache there can be.
    "tiny-cache": dict(max_model_len=145, kvcache_block_size=4, num_kvcache_blocks=37),
    "ranks": dict(tensor_parallel_size=2, max_num_batched_tokens=50),
}


@pytest.fixture(scope="module", params=FAMILIES)
def reference(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Checkpoint, list[list[int]], list[list[int]]]:
    """A checkpoint, prompts of many lengths, some that begin alike, and their completions."""
    name = request.param
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


# --- what is refused ------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama-mlp-bias": (dict(architecture="LlamaForCausalLM", mlp_bias=True), "mlp_bias True"),
    "llama-act": (dict(architecture="LlamaForCausalLM", hidden_act="gelu"), "hidden_act 'gelu'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_would_be_run_wrongly_are_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    checkpoint = make_checkpoint(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        make_llm(checkpoint.path)
