"""What all families read from their configurations, of transformers 5 and of 4."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import QWEN3, edit_json, generate_ids, greedy, make_checkpoint, make_llm

from nanovllm.config import Config
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.models.options import rotary_embeddings, windows


@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(model_type="llama"), [None] * 5),
        (dict(model_type="mistral", sliding_window=None), [None] * 5),
        (dict(model_type="mistral", sliding_window=8), [8] * 5),
        (dict(model_type="qwen2", sliding_window=8, use_sliding_window=False), [None] * 5),
        (
            dict(
                model_type="qwen3", sliding_window=8, use_sliding_window=True, max_window_layers=3
            ),
            [None, None, None, 8, 8],
        ),
        (dict(model_type="gemma2", sliding_window=8), [8, None, 8, None, 8]),
        (
            dict(model_type="gemma3_text", sliding_window=8, sliding_window_pattern=3),
            [8, 8, None, 8, 8],
        ),
    ],
)
def test_windows_of_configurations_that_name_no_types_of_layers(
    options: dict[str, Any], expected: list[int | None]
) -> None:
    """As those of transformers before 4.53."""
    assert windows(SimpleNamespace(num_hidden_layers=5, **options)) == expected


def test_types_are_named_of_every_layer(tmp_path: Path) -> None:
    """A model may be cut short, and not be longer than what is said of it."""
    options = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
    checkpoint = make_checkpoint(tmp_path, num_hidden_layers=3, save=False, **options)
    config = checkpoint.model.config
    config.architectures = [QWEN3]
    config.num_hidden_layers = 2
    llm = make_llm("no/such/path", load_format="dummy", hf_config=config)
    try:
        assert [layer.options.window for layer in llm.model_runner.attention_layers] == [None, 16]
    finally:
        llm.exit()
    config.num_hidden_layers = 4
    with pytest.raises(ValueError, match="names 3 layers, and num_hidden_layers is 4"):
        make_llm("no/such/path", load_format="dummy", hf_config=config)


@pytest.mark.parametrize(
    "architecture, overrides, message",
    [
        (QWEN3, dict(intermediate_size=-3), "intermediate_size must be at least 1, not -3"),
        (QWEN3, dict(num_attention_heads=0), "num_attention_heads must be at least 1, not 0"),
        (QWEN3, dict(max_position_embeddings=0), "max_position_embeddings must be at least 1"),
        (
            QWEN3,
            dict(rope_scaling=dict(rope_type="yarn", factor=2.0), rope_theta=1.0),
            "RoPE of type 'yarn' cannot be computed .* with theta 1.0",
        ),
        (
            QWEN3,
            dict(rope_scaling=dict(rope_type="dynamic", factor=2.0), head_dim=2),
            "RoPE of type 'dynamic' cannot be computed",
        ),
        ("Gemma3ForCausalLM", dict(query_pre_attn_scalar=0), "positive query_pre_attn_scalar"),
        ("Gemma2ForCausalLM", dict(final_logit_softcapping=0.0), "positive final_logit_softc"),
        ("GraniteForCausalLM", dict(logits_scaling=0.0), "positive logits_scaling, not 0.0"),
        ("GraniteForCausalLM", dict(attention_multiplier=-1.0), "positive attention_multiplier"),
        (
            "SmolLM3ForCausalLM",
            dict(no_rope_layers=[1]),
            "no_rope_layers names 1 layers, and num_hidden_layers is 2",
        ),
    ],
)
def test_numbers_that_no_model_can_have_are_refused(
    architecture: str, overrides: dict[str, Any], message: str, tmp_path: Path
) -> None:
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    checkpoint = make_checkpoint(tmp_path, architecture)
    with pytest.raises(ValueError, match=message):
        make_llm(checkpoint.path, hf_overrides=overrides)


@pytest.mark.parametrize(
    "architecture, changes, message",
    [
        # transformers goes by the type, and would read other options than the class here.
        (QWEN3, dict(model_type="qwen3_moe"), "names the architecture Qwen3ForCausalLM, and the"),
        (
            "LlamaForCausalLM",
            dict(architectures=["Qwen3MoeForCausalLM"]),
            "the model_type 'llama', which is another model's; it must be qwen3_moe",
        ),
        (
            "LlamaForCausalLM",
            dict(architectures=["Gemma3ForConditionalGeneration"]),
            "Gemma3ForConditionalGeneration with a text model of type None is not supported",
        ),
        (QWEN3, dict(architectures=QWEN3), "must have a list of names as architectures, not 'Qw"),
    ],
)
def test_architecture_and_type_of_a_model_belong_together(
    architecture: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path, architecture)
    edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(ValueError, match=message):
        make_llm(checkpoint.path)


def test_dtypes_that_no_model_is_run_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", dtype="float64", torch_dtype="float64")
    assert Config(checkpoint.path, device="cpu").dtype == torch.float32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="the checkpoint's dtype is float64"):
        Config(checkpoint.path, device="cuda")
    assert Config(checkpoint.path, device="cuda", dtype="bfloat16").dtype == torch.bfloat16


def test_layers_that_rotate_alike_share_a_table() -> None:
    types = ["full_attention", "sliding_attention", "full_attention"]
    options = dict(
        model_type="gemma3_text",
        layer_types=types,
        num_hidden_layers=3,
        head_dim=16,
        max_position_embeddings=64,
    )
    for local_theta in (1e6, 1e4):
        parameters = {
            "full_attention": dict(rope_type="default", rope_theta=1e6),
            "sliding_attention": dict(rope_type="default", rope_theta=local_theta),
        }
        config = SimpleNamespace(rope_parameters=parameters, **options)
        tables = rotary_embeddings(config, 64)
        assert set(tables) == set(types)
        are_one = tables["full_attention"] is tables["sliding_attention"]
        assert are_one == (local_theta == 1e6)


def test_dummy_weights_of_norms_are_one() -> None:
    """Of Gemma's too, whose checkpoints hold the weight minus 1, and which float32 holds."""
    config = transformers.Gemma3TextConfig(
        vocab_size=127,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    config.architectures = ["Gemma3ForCausalLM"]
    llm = make_llm("no/such/path", load_format="dummy", hf_config=config, dtype="bfloat16")
    try:
        (tokens,) = generate_ids(llm, [[1, 2, 3]], greedy(4))
        assert len(tokens) == 4
        norms = [m for m in llm.model_runner.model.modules() if isinstance(m, RMSNorm)]
        assert len(norms) == 2 * 6 + 1
        for norm in norms:
            assert norm.weight.dtype == torch.float32
            assert torch.equal(norm.weight, torch.ones(norm.weight.shape))
    finally:
        llm.exit()
