"""The configurations of published models, as their files have them.

Each is taken, and makes a model of as many parameters as the checkpoint holds.

So no option of theirs is refused, and no size is misread. What their tokens must be is tested on
small models, in test_families.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from nanovllm.config import Config
from nanovllm.models import MODELS, model_class

COMMON: dict[str, Any] = dict(
    hidden_act="silu",
    initializer_range=0.02,
    rms_norm_eps=1e-5,
    torch_dtype="bfloat16",
    bos_token_id=1,
    eos_token_id=2,
    attention_dropout=0.0,
    tie_word_embeddings=False,
)
PHI: dict[str, Any] = dict(
    COMMON,
    architectures=["Phi3ForCausalLM"],
    model_type="phi3",
    attention_bias=False,
    embd_pdrop=0.0,
    resid_pdrop=0.0,
)
OLMO_7B: dict[str, Any] = dict(
    COMMON,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    attention_bias=False,
    rms_norm_eps=1e-6,
    rope_theta=500000,
)
# By the name on the hub: config.json, and the number of parameters.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "meta-llama/Llama-2-7b-hf": (
        dict(
            COMMON,
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            pretraining_tp=1,
            rope_scaling=None,
        ),
        6_738_415_616,
    ),
    "google/gemma-2-2b": (
        dict(
            COMMON,
            architectures=["Gemma2ForCausalLM"],
            model_type="gemma2",
            vocab_size=256000,
            hidden_size=2304,
            head_dim=256,
            intermediate_size=9216,
            num_hidden_layers=26,
            num_attention_heads=8,
            num_key_value_heads=4,
            attention_bias=False,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            cache_implementation="hybrid",
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
            max_position_embeddings=8192,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            sliding_window=4096,
            tie_word_embeddings=True,
        ),
        2_614_341_888,
    ),
    # Of the two with an image encoder, the text model's parameters.
    "google/gemma-3-4b-it": (
        dict(
            architectures=["Gemma3ForConditionalGeneration"],
            model_type="gemma3",
            torch_dtype="bfloat16",
            eos_token_id=[1, 106],
            boi_token_index=255999,
            eoi_token_index=256000,
            image_token_index=262144,
            initializer_range=0.02,
            mm_tokens_per_image=256,
            text_config=dict(
                model_type="gemma3_text",
                hidden_size=2560,
                intermediate_size=10240,
                num_hidden_layers=34,
                rope_scaling=dict(factor=8.0, rope_type="linear"),
                sliding_window=1024,
            ),
            vision_config=dict(
                model_type="siglip_vision_model",
                hidden_size=1152,
                image_size=896,
                intermediate_size=4304,
                num_attention_heads=16,
                num_hidden_layers=27,
                patch_size=14,
                vision_use_head=False,
            ),
        ),
        3_880_263_168,
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": (
        dict(
            architectures=["Mistral3ForConditionalGeneration"],
            model_type="mistral3",
            torch_dtype="bfloat16",
            image_token_index=10,
            multimodal_projector_bias=False,
            projector_hidden_act="gelu",
            spatial_merge_size=2,
            vision_feature_layer=-1,
            text_config=dict(
                model_type="mistral",
                vocab_size=131072,
                hidden_act="silu",
                hidden_size=5120,
                head_dim=128,
                intermediate_size=32768,
                num_hidden_layers=40,
                num_attention_heads=32,
                num_key_value_heads=8,
                max_position_embeddings=131072,
                rms_norm_eps=1e-5,
                rope_theta=1000000000.0,
                sliding_window=None,
            ),
            vision_config=dict(
                model_type="pixtral",
                head_dim=64,
                hidden_act="gelu",
                hidden_size=1024,
                image_size=1540,
                intermediate_size=4096,
                num_attention_heads=16,
                num_channels=3,
                num_hidden_layers=24,
                patch_size=14,
                rope_theta=10000.0,
            ),
        ),
        23_572_403_200,
    ),
    "Qwen/Qwen3-235B-A22B": (
        dict(
            COMMON,
            architectures=["Qwen3MoeForCausalLM"],
            model_type="qwen3_moe",
            vocab_size=151936,
            hidden_size=4096,
            head_dim=128,
            intermediate_size=12288,
            moe_intermediate_size=1536,
            num_hidden_layers=94,
            num_attention_heads=64,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            attention_bias=False,
            max_position_embeddings=40960,
            max_window_layers=94,
            rms_norm_eps=1e-6,
            rope_scaling=None,
            rope_theta=1000000.0,
            router_aux_loss_coef=0.001,
            output_router_logits=False,
            sliding_window=None,
            use_sliding_window=False,
        ),
        235_093_634_560,
    ),
    "mistralai/Mistral-7B-v0.1": (
        dict(
            COMMON,
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            rope_theta=10000.0,
            sliding_window=4096,
        ),
        7_241_732_096,
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        dict(
            COMMON,
            architectures=["MistralForCausalLM"],
            model_type="mistral",
            vocab_size=131072,
            hidden_size=5120,
            head_dim=128,
            intermediate_size=14336,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=1024000,
            rope_theta=1000000.0,
            sliding_window=None,
        ),
        12_247_782_400,
    ),
    "microsoft/Phi-3-mini-4k-instruct": (
        dict(
            PHI,
            vocab_size=32064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            rope_scaling=None,
            rope_theta=10000.0,
            sliding_window=2047,
        ),
        3_821_079_552,
    ),
    "microsoft/phi-4": (
        dict(
            PHI,
            vocab_size=100352,
            hidden_size=5120,
            intermediate_size=17920,
            num_hidden_layers=40,
            num_attention_heads=40,
            num_key_value_heads=10,
            max_position_embeddings=16384,
            original_max_position_embeddings=16384,
            rope_scaling=None,
            rope_theta=250000,
            sliding_window=None,
        ),
        14_659_507_200,
    ),
    "microsoft/Phi-4-mini-instruct": (
        dict(
            PHI,
            vocab_size=200064,
            hidden_size=3072,
            intermediate_size=8192,
            num_hidden_layers=32,
            num_attention_heads=24,
            num_key_value_heads=8,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            partial_rotary_factor=0.75,
            # As many as the published ones, which test_rope.py has.
            rope_scaling=dict(type="longrope", short_factor=[1.0] * 48, long_factor=[8.0] * 48),
            rope_theta=10000.0,
            sliding_window=262144,
            tie_word_embeddings=True,
            lm_head_bias=False,
            mlp_bias=False,
            interpolate_factor=1,
            full_attn_mod=1,
        ),
        3_836_021_760,
    ),
    "allenai/OLMo-2-1124-7B": (
        dict(
            OLMO_7B,
            architectures=["Olmo2ForCausalLM"],
            model_type="olmo2",
            vocab_size=100352,
            max_position_embeddings=4096,
            rope_scaling=None,
        ),
        7_298_617_344,
    ),
    "allenai/Olmo-3-1025-7B": (
        dict(
            OLMO_7B,
            architectures=["Olmo3ForCausalLM"],
            model_type="olmo3",
            vocab_size=100278,
            max_position_embeddings=65536,
            sliding_window=4096,
            layer_types=[*["sliding_attention"] * 3, "full_attention"] * 8,
            rope_scaling=dict(
                attention_factor=1.2079441541679836,
                beta_fast=32.0,
                beta_slow=1.0,
                factor=8.0,
                original_max_position_embeddings=8192,
                rope_type="yarn",
            ),
        ),
        7_298_011_136,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        dict(
            COMMON,
            architectures=["SmolLM3ForCausalLM"],
            model_type="smollm3",
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=11008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=4,
            attention_bias=False,
            mlp_bias=False,
            layer_types=["full_attention"] * 36,
            max_position_embeddings=65536,
            max_window_layers=28,
            no_rope_layer_interval=4,
            no_rope_layers=[1, 1, 1, 0] * 9,
            pretraining_tp=2,
            rope_scaling=None,
            rope_theta=5000000.0,
            sliding_window=None,
            use_sliding_window=False,
            tie_word_embeddings=True,
        ),
        3_075_098_624,
    ),
    "ibm-granite/granite-3.3-8b-instruct": (
        dict(
            COMMON,
            architectures=["GraniteForCausalLM"],
            model_type="granite",
            vocab_size=49159,
            hidden_size=4096,
            intermediate_size=12800,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            attention_bias=False,
            mlp_bias=False,
            attention_multiplier=0.0078125,
            embedding_multiplier=12.0,
            logits_scaling=16.0,
            residual_multiplier=0.22,
            max_position_embeddings=131072,
            rope_scaling=None,
            rope_theta=10000000.0,
            tie_word_embeddings=True,
        ),
        8_170_864_640,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("tp_size", [1, 2])
def test_published_configurations_are_taken(name: str, tp_size: int, tmp_path: Path) -> None:
    options, num_parameters = PUBLISHED[name]
    (architecture,) = options["architectures"]
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {architecture}")
    (tmp_path / "config.json").write_text(json.dumps(options))
    config = Config(
        str(tmp_path),
        load_format="dummy",
        device="cpu",
        tensor_parallel_size=tp_size,
        architectures=MODELS,
    )
    make_model = model_class(config.hf_config)
    make_model.check_config(config.hf_config, tp_size)
    if tp_size == 1:
        with torch.device("meta"):
            model = make_model(config.hf_config, max_position=64)
        assert sum(param.numel() for param in model.parameters()) == num_parameters
