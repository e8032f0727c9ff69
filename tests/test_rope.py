"""All kinds of RoPE: frequencies and rotations are those of `transformers`, for published
configurations.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3TextConfig,
    Glm4Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4 import modeling_glm4
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3 import modeling_phi3

from nanovllm.kernels.norm_rope_store import norm_rope_store_torch
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.rope import Rope, default_frequencies, rope_frequencies


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- frequencies ----------------------------------------------------------------------------------

# The factors of Phi-3.5 are rounded to two places.
PHI_35_SHORT = [1.0, 1.02, 1.03, 1.03] + 5 * [1.05]
PHI_35_SHORT += [1.07, 1.1, 1.11, 1.16, 1.16, 1.17, 1.29, 1.34, 1.68, 1.79, 1.82, 1.85, 1.88]
PHI_35_SHORT += [1.91, 1.94, 1.99] + 6 * [2.02] + 9 * [2.03]
PHI_35_SHORT += [2.08, 2.09, 2.19, 2.22, 2.59, 2.73, 2.75, 2.84]
PHI_35_LONG = [1.08, 1.11, 1.14, 1.34, 1.59, 1.6, 1.62, 2.62, 3.23, 3.23, 4.79, 7.4, 7.7, 9.09]
PHI_35_LONG += [12.2, 17.67, 24.46, 28.57, 30.42, 30.84, 32.59, 32.93, 42.32, 44.96, 50.34]
PHI_35_LONG += [50.45, 57.55, 57.93, 58.21, 60.14, 62.61, 62.62, 62.71, 63.14, 63.14, 63.77]
PHI_35_LONG += [63.93, 63.96, 63.97, 64.03, 64.07, 64.08, 64.12, 64.41, 64.48, 64.51, 64.53, 64.84]
PHI_4_LONG = [1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817]
PHI_4_LONG += [2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687]
PHI_4_LONG += [4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894]
PHI_4_LONG += [8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252]
PHI_4_LONG += [16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884]
PHI_4_LONG += [32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97]
PHI_4_LONG += [33.28, 33.49, 33.5, 44.16, 47.77]

LLAMA_3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA_3.update(original_max_position_embeddings=8192)
DEEPSEEK = dict(type="yarn", factor=40, beta_fast=32, beta_slow=1)
DEEPSEEK.update(original_max_position_embeddings=4096)
# What the config.json of each has about RoPE, as published: transformers 4 spells it so.
PUBLISHED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "mistral-7b-v0.3": (
        LlamaConfig,
        dict(head_dim=128, rope_theta=1e6, max_position_embeddings=32768),
    ),
    "llama-3.1-8b": (
        LlamaConfig,
        dict(
            head_dim=128,
            rope_theta=5e5,
            max_position_embeddings=131072,
            rope_scaling=dict(factor=8.0, **LLAMA_3),
        ),
    ),
    "llama-3.2-1b": (
        LlamaConfig,
        dict(
            head_dim=64,
            rope_theta=5e5,
            max_position_embeddings=131072,
            rope_scaling=dict(factor=32.0, **LLAMA_3),
        ),
    ),
    "vicuna-7b-v1.5-16k": (
        LlamaConfig,
        dict(
            head_dim=128,
            rope_theta=1e4,
            max_position_embeddings=4096,
            rope_scaling=dict(type="linear", factor=4.0),
        ),
    ),
    "internlm2-chat-7b": (
        LlamaConfig,
        dict(
            head_dim=128,
            rope_theta=1e6,
            max_position_embeddings=32768,
            rope_scaling=dict(type="dynamic", factor=2.0),
        ),
    ),
    "qwen3-8b-for-131072": (
        Qwen3Config,
        dict(
            head_dim=128,
            rope_theta=1e6,
            max_position_embeddings=131072,
            rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
        ),
    ),
    "deepseek-v3": (
        LlamaConfig,
        dict(
            head_dim=64,
            rope_theta=1e4,
            max_position_embeddings=163840,
            rope_scaling=dict(mscale=1.0, mscale_all_dim=1.0, **DEEPSEEK),
        ),
    ),
    "deepseek-with-unequal-mscales": (
        LlamaConfig,
        dict(
            head_dim=64,
            rope_theta=1e4,
            max_position_embeddings=163840,
            rope_scaling=dict(mscale=1.0, mscale_all_dim=0.707, **DEEPSEEK),
        ),
    ),
    "gpt-oss-20b": (
        LlamaConfig,
        dict(
            head_dim=64,
            rope_theta=150000,
            max_position_embeddings=131072,
            rope_scaling=dict(
                rope_type="yarn",
                factor=32.0,
                beta_fast=32.0,
                beta_slow=1.0,
                original_max_position_embeddings=4096,
                truncate=False,
            ),
        ),
    ),
    "olmo-3-7b-full-attention": (
        LlamaConfig,
        dict(
            head_dim=128,
            rope_theta=5e5,
            max_position_embeddings=65536,
            rope_scaling=dict(
                rope_type="yarn",
                factor=8.0,
                attention_factor=1.2079441541679836,
                beta_fast=32.0,
                beta_slow=1.0,
                original_max_position_embeddings=8192,
            ),
        ),
    ),
    "phi-3.5-mini": (
        Phi3Config,
        dict(
            hidden_size=3072,
            num_attention_heads=32,
            rope_theta=1e4,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(type="longrope", short_factor=PHI_35_SHORT, long_factor=PHI_35_LONG),
        ),
    ),
    "phi-4-mini": (
        Phi3Config,
        dict(
            hidden_size=3072,
            num_attention_heads=24,
            rope_theta=1e4,
            partial_rotary_factor=0.75,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling=dict(type="longrope", short_factor=48 * [1.0], long_factor=PHI_4_LONG),
        ),
    ),
    "glm-4-9b-0414": (
        Glm4Config,
        dict(
            head_dim=128,
            rope_theta=1e4,
            partial_rotary_factor=0.5,
            max_position_embeddings=32768,
        ),
    ),
}
ROTARY = {
    Phi3Config: modeling_phi3.Phi3RotaryEmbedding,
    Glm4Config: modeling_glm4.Glm4RotaryEmbedding,
}


def head_size(options: dict[str, Any]) -> int:
    return options.get("head_dim") or options["hidden_size"] // options["num_attention_heads"]


def kind_of(options: dict[str, Any]) -> str:
    scaling = options.get("rope_scaling") or {}
    return scaling.get("rope_type", scaling.get("type", "default"))


def theirs(name: str, max_position: int) -> Rope:
    config_class, options = PUBLISHED[name]
    config = config_class(**options)
    kind = kind_of(options)
    if kind == "default":  # in transformers 5 it is the models' own
        rotary = ROTARY.get(config_class, LlamaRotaryEmbedding)(config)
        return Rope(rotary.inv_freq, rotary.attention_scaling)
    return Rope(*ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=max_position))


def assert_same(ours: Rope, reference: Rope) -> None:
    torch.testing.assert_close(ours.frequencies, reference.frequencies, rtol=1e-6, atol=0.0)
    assert ours.frequencies.dtype == torch.float32
    assert ours.factor == pytest.approx(reference.factor, rel=1e-12)


@pytest.mark.parametrize("spelling", ["as_published", "as_transformers_reads_it"])
@pytest.mark.parametrize("max_position", [100, 4096, 4097, 200_000])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_of_published_models(name: str, max_position: int, spelling: str) -> None:
    config_class, options = PUBLISHED[name]
    config: Any = SimpleNamespace(**options)
    if spelling == "as_transformers_reads_it":
        config = config_class(**options)
    ours = rope_frequencies(config, head_size(options), max_position)
    assert_same(ours, theirs(name, max_position))


def test_the_kinds_differ() -> None:
    """Else the test above could not tell them apart."""
    unscaled = dict(head_dim=128, max_position_embeddings=4096, rope_theta=1e4)
    scalings: list[dict[str, Any]] = [
        dict(),
        dict(rope_type="linear", factor=4.0),
        dict(rope_type="dynamic", factor=4.0),
        dict(rope_type="yarn", factor=4.0),
        dict(factor=4.0, **LLAMA_3),
        dict(rope_type="longrope", short_factor=64 * [1.5], long_factor=64 * [2.5]),
        dict(partial_rotary_factor=0.5),
    ]
    found = [
        rope_frequencies(SimpleNamespace(rope_scaling=scaling, **unscaled), 128, 8192).frequencies
        for scaling in scalings
    ]
    for index, one in enumerate(found):
        for other in found[:index]:
            assert one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3)


GEMMA = dict(
    head_dim=256,
    rope_theta=1e6,
    rope_local_base_freq=1e4,
    rope_scaling=dict(rope_type="linear", factor=8.0),
    max_position_embeddings=131072,
    num_hidden_layers=6,
)
GEMMA_NAMESPACE = SimpleNamespace(model_type="gemma3_text", **GEMMA)


@pytest.mark.parametrize("config", [GEMMA_NAMESPACE, Gemma3TextConfig(**GEMMA)])
def test_gemma_3_has_two(config: Any) -> None:
    """Scaled in the layers with full attention, another theta and no scaling in the others."""
    local = rope_frequencies(config, 256, 4096, "sliding_attention")
    assert_same(local, Rope(default_frequencies(256, 1e4)))
    full = rope_frequencies(config, 256, 4096, "full_attention")
    assert_same(full, Rope(default_frequencies(256, 1e6) / 8.0))


def test_parameters_by_layer_types() -> None:
    yarn = dict(rope_type="yarn", rope_theta=5e5, factor=8.0, original_max_position_embeddings=8192)
    by_type = dict(full_attention=yarn, sliding_attention=dict(rope_type="default", rope_theta=5e5))
    options: Any = dict(max_position_embeddings=65536, model_type="olmo3")
    flat = SimpleNamespace(rope_parameters=yarn, **options)
    nested = SimpleNamespace(rope_parameters=by_type, **options)
    expected = rope_frequencies(flat, 128, 4096)
    assert_same(rope_frequencies(nested, 128, 4096, "full_attention"), expected)
    assert_same(rope_frequencies(flat, 128, 4096, "sliding_attention"), expected)  # all are alike
    local = rope_frequencies(nested, 128, 4096, "sliding_attention")
    assert_same(local, Rope(default_frequencies(128, 5e5)))


def test_which_families_scale_full_attention_only() -> None:
    """As transformers 4 spells it, where nothing in the configuration tells."""
    options = dict(rope_theta=1e4, rope_scaling=dict(rope_type="linear", factor=2.0))
    options.update(max_position_embeddings=64)
    for model_type, factor in (("olmo3", 1.0), ("qwen2", 2.0)):
        config: Any = SimpleNamespace(model_type=model_type, **options)
        local = rope_frequencies(config, 16, 64, "sliding_attention")
        assert_same(local, Rope(default_frequencies(16, 1e4) / factor))
        full = rope_frequencies(config, 16, 64, "full_attention")
        assert_same(full, Rope(default_frequencies(16, 1e4) / 2.0))


YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0)


@pytest.mark.parametrize(
    "parameters, message",
    [
        (dict(rope_type="xpos", rope_theta=1e4), "'xpos' is not supported; supported: default, li"),
        (dict(type="mrope", rope_theta=1e4), "'mrope' is not supported"),
        (dict(rope_type="default"), "positive rope_theta, not None"),
        (dict(rope_type="default", rope_theta=-1), "positive rope_theta, not -1"),
        (dict(rope_type="linear", rope_theta=1e4), "factor for RoPE of type 'linear', not None"),
        (dict(rope_type="linear", rope_theta=1e4, factor="2"), "factor .* not '2'"),
        (dict(YARN, factor=float("nan")), "factor .* not nan"),
        (dict(YARN, factor=True), "factor .* not True"),
        (dict(YARN, beta_slow=0), "beta_slow .* not 0"),
        (dict(YARN, original_max_position_embeddings="4k"), "original_max.* not '4k'"),
        (dict(rope_type="llama3", rope_theta=1e4, factor=8.0), "low_freq_factor .* not None"),
        (dict(LLAMA_3, rope_theta=1e4, factor=8.0, low_freq_factor=4), "must be less than high"),
        (dict(rope_type="longrope", rope_theta=1e4), "list of 8 numbers as short_factor"),
        (dict(rope_type="longrope", rope_theta=1e4, short_factor=7 * [1.0]), "list of 8 numbers"),
        (dict(rope_type="longrope", rope_theta=1e4, short_factor=8 * [0]), "short_factor, not 0"),
        (dict(rope_theta=1e4, partial_rotary_factor=0.2), "rotate 3 of the 16 numbers"),
        (dict(rope_theta=1e4, partial_rotary_factor=1.5), "rotate 24 of the 16 numbers"),
        (dict(full_attention=YARN, sliding_attention=YARN), "by types of layers .* for some_model"),
    ],
)
def test_what_is_not_there_or_wrong_is_named(parameters: dict[str, Any], message: str) -> None:
    config = SimpleNamespace(
        rope_parameters=parameters, max_position_embeddings=4096, model_type="some_model"
    )
    with pytest.raises(ValueError, match=message):
        rope_frequencies(config, 16, 4096)  # type: ignore[arg-type]


def test_a_layer_type_that_is_not_there() -> None:
    config = SimpleNamespace(
        rope_parameters=dict(full_attention=YARN), max_position_embeddings=64, model_type="olmo3"
    )
    with pytest.raises(ValueError, match="lack 'sliding_attention'"):
        rope_frequencies(config, 16, 64, "sliding_attention")  # type: ignore[arg-type]


# --- rotating -------------------------------------------------------------------------------------


def test_tables_have_the_factor() -> None:
    name = "qwen3-8b-for-131072"
    config_class, options = PUBLISHED[name]
    rope = rope_frequencies(config_class(**options), 128, 131072)
    ours = RotaryEmbedding(rope.frequencies, 131072, rope.factor)
    positions = torch.tensor([0, 1, 77, 32768, 131071])
    rotary = LlamaRotaryEmbedding(config_class(**options))
    cos, sin = rotary(torch.zeros(1), positions[None])
    assert ours.cos.shape == ours.sin.shape == (131072, 64)
    # At position 131071 the last bit of a frequency of 1 is an angle of 0.008.
    torch.testing.assert_close(ours.cos[positions], cos[0, :, :64], rtol=0.0, atol=1e-4)
    torch.testing.assert_close(ours.sin[positions], sin[0, :, :64], rtol=0.0, atol=1e-4)
    assert ours.cos[0, 0] == pytest.approx(0.1 * torch.tensor(4.0).log().item() + 1.0)


@pytest.mark.parametrize(
    "name, modeling, interleaved",
    [("phi-4-mini", modeling_phi3, False), ("glm-4-9b-0414", modeling_glm4, True)],
)
def test_partial_rope_is_that_of_transformers(name: str, modeling: Any, interleaved: bool) -> None:
    config_class, options = PUBLISHED[name]
    rope = rope_frequencies(config_class(**options), 128, 4096)
    ours = RotaryEmbedding(rope.frequencies, 4096, rope.factor, interleaved)
    positions = torch.tensor([0, 5, 4095])
    q, k, v = torch.randn(3, 4, 128), torch.randn(3, 2, 128), torch.randn(3, 2, 128)
    cos, sin = ROTARY[config_class](config_class(**options))(q, positions[None])
    expected = modeling.apply_rotary_pos_emb(
        q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin
    )
    none = torch.empty(0)
    out = norm_rope_store_torch(
        torch.cat((q, k, v), dim=1),
        positions,
        ours.cos,
        ours.sin,
        None,
        None,
        0.0,
        none,
        none,
        None,
        4,
        ours.interleaved,
    )
    for rotated, wanted in zip(out.split((4, 2, 2), dim=1), expected, strict=False):
        torch.testing.assert_close(rotated, wanted[0].transpose(0, 1), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:, 6:], v)
