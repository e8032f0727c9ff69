"""The option `hf_overrides`: what is laid over a model's configuration."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import (
    Checkpoint,
    edit_json,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config, Qwen3Config

from nanovllm import LLM
from nanovllm.checkpoints.hf_overrides import override_config
from nanovllm.config import Config
from nanovllm.models.rope import Rope, rope_frequencies

YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
DEFAULT = dict(rope_type="default", rope_theta=5e4)


@pytest.mark.parametrize(
    "stored",
    [
        dict(rope_parameters=DEFAULT),
        dict(rope_parameters=None, rope_theta=5e4, rope_scaling=None),
    ],
    ids=["transformers_5", "transformers_4"],
)
@pytest.mark.parametrize(
    "spelling", [dict(rope_scaling=YARN), dict(rope_parameters=YARN)], ids=["scaling", "parameters"]
)
def test_yarn_on_a_model_without(
    tmp_path: Path, stored: dict[str, Any], spelling: dict[str, Any]
) -> None:
    """Prompts longer than the original length, and the theta as it was."""
    scaled = make_checkpoint(
        tmp_path / "scaled",
        seed=3,
        max_position_embeddings=128,
        rope_theta=5e4,
        rope_scaling=dict(YARN),  # transformers adds the theta
    )
    plain = tmp_path / "plain"
    shutil.copytree(scaled.path, plain)
    edit_json(plain / "config.json", max_position_embeddings=32, **stored)
    prompts = random_prompts(0, [3, 31, 40, 90])
    expected = scaled.complete(prompts, 12)
    llm = make_llm(str(plain), hf_overrides={"max_position_embeddings": 128, **spelling})
    assert llm.config.max_model_len == 128
    assert generate_ids(llm, prompts, greedy(12)) == expected
    llm.exit()
    llm = make_llm(str(plain), hf_overrides={"max_position_embeddings": 128})
    assert generate_ids(llm, prompts, greedy(12)) != expected


def test_the_checkpoint_and_what_is_passed_stay_as_they_were(checkpoint: Checkpoint) -> None:
    hf_config = checkpoint.model.config
    before = json.dumps(hf_config.to_dict(), default=str)
    overrides = {"rope_scaling": YARN, "rms_norm_eps": 1e-3}
    config = Config(checkpoint.path, device="cpu", hf_config=hf_config, hf_overrides=overrides)
    assert config.hf_config.rms_norm_eps == 1e-3
    assert json.dumps(hf_config.to_dict(), default=str) == before
    assert overrides == {"rope_scaling": YARN, "rms_norm_eps": 1e-3}


def overridden(config: Any, head_dim: int, overrides: dict[str, Any], *layer_type: str) -> Rope:
    override_config(config, overrides)
    return rope_frequencies(config, head_dim, 64, *layer_type)


def test_theta_and_share_are_kept_and_can_be_set() -> None:
    yarn = dict(YARN, original_max_position_embeddings=4096)
    options = dict(hidden_size=64, num_attention_heads=4, max_position_embeddings=4096)
    rope: dict[str, Any] = dict(rope_theta=1e6, partial_rotary_factor=0.5)

    def expected(theta: float, share: float = 1.0, **scaling: Any) -> Any:
        flat = dict(scaling, rope_theta=theta, partial_rotary_factor=share)
        return rope_frequencies(
            SimpleNamespace(rope_parameters=flat, **options), 16, 64
        ).frequencies  # type: ignore[arg-type]

    def of(config: Any, **overrides: Any) -> Any:
        return overridden(config, 16, overrides).frequencies

    assert of(Phi3Config(**options, **rope), rope_scaling=yarn).equal(expected(1e6, 0.5, **yarn))
    assert of(LlamaConfig(**options, rope_theta=1e6), rope_theta=1e4).equal(expected(1e4))
    other = dict(yarn, rope_theta=2e4)
    assert of(Qwen3Config(**options, rope_theta=1e6), rope_parameters=other).equal(
        expected(2e4, **yarn)
    )
    scaled = LlamaConfig(
        **options, rope_theta=1e6, rope_scaling=dict(rope_type="linear", factor=2.0)
    )
    assert of(scaled, rope_scaling=None).equal(expected(1e6))


def test_layers_with_full_attention_are_scaled_where_types_differ() -> None:
    linear = dict(rope_type="linear", factor=2.0)
    plain = [
        rope_frequencies(Gemma3TextConfig(), 256, 64, layer_type).frequencies
        for layer_type in ("full_attention", "sliding_attention")
    ]
    config = Gemma3TextConfig()
    override_config(config, {"rope_scaling": linear})
    full = rope_frequencies(config, 256, 64, "full_attention").frequencies
    local = rope_frequencies(config, 256, 64, "sliding_attention").frequencies
    assert full.equal(plain[0] / 2.0) and local.equal(plain[1])
    by_type = dict(full_attention=dict(linear, rope_theta=1e5), sliding_attention=linear)
    override_config(config, {"rope_parameters": by_type})
    local = rope_frequencies(config, 256, 64, "sliding_attention").frequencies
    assert local.equal(plain[1] / 2.0)
    config = Gemma3TextConfig()
    if getattr(config, "rope_parameters", None):  # transformers 5
        with pytest.raises(ValueError, match="rope_theta, but types of layers have their own"):
            override_config(config, {"rope_theta": 1e5})


def test_another_architecture(checkpoint: Checkpoint, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint.path, copy)
    edit_json(copy / "config.json", architectures=["MyOwnForCausalLM"])
    with pytest.raises(ValueError, match="'MyOwnForCausalLM'; supported"):
        make_llm(str(copy))
    make_llm(str(copy), hf_overrides={"architectures": ["Qwen3ForCausalLM"]}).exit()
    with pytest.raises(ValueError, match="hf_config names the architecture 'Other'"):
        make_llm(checkpoint.path, hf_overrides={"architectures": ["Other"]})


@pytest.mark.parametrize(
    "overrides, error, message",
    [
        ([("rope_theta", 1e4)], TypeError, "hf_overrides must be a dict or None"),
        (lambda config: config, TypeError, "hf_overrides must be a dict or None"),  # as in vLLM
        ({"max_position_embedding": 64}, ValueError, "mean 'max_position_embeddings'"),
        ({"rope_scalings": YARN}, ValueError, "qwen3 has no such option.*mean 'rope_scaling'"),
        ({1: 2}, ValueError, "hf_overrides has 1"),
        ({"max_position_embeddings": "64"}, TypeError, "of the type of 1024, not '64'"),
        ({"max_position_embeddings": True}, TypeError, "of the type of 1024, not True"),
        ({"tie_word_embeddings": 1}, TypeError, "of the type of False, not 1"),
        ({"hidden_act": None}, (TypeError, ValueError), "hidden_act"),
        ({"rope_scaling": "yarn"}, TypeError, "hf_overrides.'rope_scaling'. must be"),
        ({"rope_theta": "1e4"}, (TypeError, ValueError), "rope_theta.*not '1e4'"),
        ({"rope_scaling": dict(rope_type="yarn")}, ValueError, "factor for RoPE of type 'yarn'"),
    ],
)
def test_what_is_wrong_is_named(
    checkpoint: Checkpoint, overrides: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM(checkpoint.path, device="cpu", hf_overrides=overrides)
