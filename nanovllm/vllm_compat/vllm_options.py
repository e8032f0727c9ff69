"""Options of vLLM's `LLM`, from which those of ours are made: other names for the same,
options that make no difference here, and those that are absent.
"""

from __future__ import annotations

import logging
from typing import Any

from nanovllm.vllm_compat.absent import Absent, without_absent

LOGGER = logging.getLogger("nanovllm")  # not set up any further: it prints lines to stderr

# Other names of options of Config.
ALIASES = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}

ONLY_HERE = "use tensor_parallel_size, which splits a model over up to 8 GPUs of one machine"
NO_CODE = "no code of a checkpoint or of the user's is run inside the engine"
ONE_SAMPLER = "pass sampling_params"
TEXT_ONLY = "images, sounds and videos are not read; pass texts"

# How vLLM runs what runs here in one way: whatever they say, the results are the same.
WITHOUT_EFFECT = (
    "all2all_backend",
    "async_scheduling",
    "attention_config",
    "compilation_config",
    "cudagraph_capture_sizes",
    "cudagraph_metrics",
    "disable_async_output_proc",
    "disable_cascade_attn",
    "disable_custom_all_reduce",
    "disable_hybrid_kv_cache_manager",
    "disable_log_requests",
    "disable_log_stats",
    "enable_log_requests",
    "enable_sleep_mode",
    "interleave_mm_strings",
    "kernel_config",
    "limit_mm_per_prompt",
    "long_prefill_token_threshold",
    "max_context_len_to_capture",
    "max_long_partial_prefills",
    "max_num_partial_prefills",
    "max_parallel_loading_workers",
    "max_seq_len_to_capture",
    "media_io_kwargs",
    "mm_encoder_tp_mode",
    "mm_processor_cache_gb",
    "num_scheduler_steps",
    "observability_config",
    "optimization_level",
    "prefix_caching_hash_algo",
    "ray_workers_use_nsight",
    "safetensors_load_strategy",
    "served_model_name",
    "show_hidden_metrics_for_version",
    "skip_mm_profiling",
    "stream_interval",
    "structured_outputs_config",
    "swap_space",
    "use_tqdm_on_load",
    "use_v2_block_manager",
)

ABSENT_OPTIONS = {
    **dict.fromkeys(WITHOUT_EFFECT, Absent("", harmless=None)),
    # Those of which only some values ask for what is done anyway.
    "additional_config": Absent("nothing here reads any", (None, {})),
    "allowed_local_media_path": Absent(TEXT_ONLY, (None, "")),
    "allowed_media_domains": Absent(TEXT_ONLY, (None, [])),
    "calculate_kv_scales": Absent("the scales are the checkpoint's, or 1", (None, False)),
    "chat_template": Absent("pass it to chat"),
    "code_revision": Absent(NO_CODE),
    "config_format": Absent("config.json is read", (None, "auto", "hf")),
    "convert": Absent("embed, score and generate need no conversion", (None, "auto", "none")),
    "cpu_offload_gb": Absent("use a larger tensor_parallel_size", (None, 0, 0.0)),
    "data_parallel_size": Absent("start an engine for each part of the prompts", (None, 1)),
    "decode_context_parallel_size": Absent(ONLY_HERE, (None, 1)),
    "distributed_executor_backend": Absent(ONLY_HERE, (None, "mp", "uni", "ray")),
    "enable_chunked_prefill": Absent(
        "a prompt is computed in chunks where it is longer than max_num_batched_tokens; raise that",
        (None, True),
    ),
    "enable_dbo": Absent(ONLY_HERE, (None, False)),
    "ec_transfer_config": Absent("one engine computes all of a request"),
    "enable_eplb": Absent(ONLY_HERE, (None, False)),
    "enable_expert_parallel": Absent(ONLY_HERE, (None, False)),
    "enable_lora": Absent("merge the adapter into the weights and save them", (None, False)),
    "enable_prompt_adapter": Absent("put it into the prompts", (None, False)),
    "enable_prompt_embeds": Absent("pass texts or token ids", (None, False)),
    "enable_return_routed_experts": Absent("they are not recorded", (None, False)),
    "generation_config": Absent(ONE_SAMPLER, (None, "auto")),
    "guided_decoding_backend": Absent("it is llguidance", (None, "auto", "guidance")),
    "hf_config_path": Absent("pass hf_config or hf_overrides"),
    "hf_token": Absent("set HF_TOKEN in the environment"),
    "ignore_patterns": Absent("files that contradict each other are an error", (None, [])),
    "io_processor_plugin": Absent(NO_CODE),
    "kv_events_config": Absent("read LLM.stats() and LLM.trace()"),
    "kv_offloading_size": Absent("blocks that are in no use are computed again", (None, 0)),
    "kv_sharing_fast_prefill": Absent("no such layers are run", (None, False)),
    "kv_transfer_config": Absent("one engine computes all of a request"),
    "logits_processors": Absent(NO_CODE, (None, [])),
    "max_lora_rank": Absent("merge the adapter into the weights and save them"),
    "max_loras": Absent("merge the adapter into the weights and save them"),
    "mm_processor_kwargs": Absent(TEXT_ONLY, (None, {})),
    "model_impl": Absent("see README for the models that are run", (None, "auto", "vllm")),
    "model_loader_extra_config": Absent("*.safetensors are read", (None, {})),
    "nnodes": Absent(ONLY_HERE, (None, 1)),
    "otlp_traces_endpoint": Absent("read LLM.stats() and LLM.trace()"),
    "override_generation_config": Absent(ONE_SAMPLER, (None, {})),
    "override_pooler_config": Absent("pass the arguments of embed"),
    "pipeline_parallel_size": Absent(ONLY_HERE, (None, 1)),
    "pooler_config": Absent("pass the arguments of embed"),
    "prefill_context_parallel_size": Absent(ONLY_HERE, (None, 1)),
    "profiler_config": Absent("use LLM.trace(), or torch.profiler around the calls", (None, {})),
    "reasoning_parser": Absent("the text is returned as it is", (None, "")),
    "rope_scaling": Absent("pass hf_overrides={'rope_scaling': ...}", (None, {})),
    "rope_theta": Absent("pass hf_overrides={'rope_theta': ...}"),
    "runner": Absent("any engine does all", (None, "auto", "generate", "pooling")),
    "scheduler_cls": Absent(NO_CODE),
    "scheduling_policy": Absent("requests run in the order of arrival", (None, "fcfs")),
    "speculative_config": Absent("one token is decoded a step"),
    "task": Absent(
        "call generate, embed or score", (None, "auto", "generate", "embed", "embedding", "score")
    ),
    "tokenizer_mode": Absent("transformers' tokenizer is used", (None, "auto", "hf", "fast")),
    "trust_remote_code": Absent(
        "a checkpoint's own code is never run; see README for the architectures that there is "
        "code for",
        (None, False),
    ),
    "worker_cls": Absent(NO_CODE, (None, "auto")),
    "worker_extension_cls": Absent(f"{NO_CODE}; weights are changed by load_weights", (None, "")),
}


def our_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `LLM` by the names of Config, without those that make no difference: these are
    named in one line on stderr, if they are more than None.

    Raises:
        TypeError: for an option that is absent here and would make a difference, and for one that
            is passed under two names.
    """
    found = without_absent("LLM", options, ABSENT_OPTIONS)
    without_effect = [name for name in found.left_out if options[name] is not None]
    if without_effect:
        LOGGER.warning("nano-vllm: without effect here: %s", ", ".join(without_effect))
    ours: dict[str, Any] = {}
    for name, value in found.kept.items():
        our_name = ALIASES.get(name, name)
        if value is None and our_name in ("enable_prefix_caching", "kv_cache_dtype"):
            continue  # vLLM's default
        if our_name in ours:
            both = " and ".join(each for each in found.kept if ALIASES.get(each, each) == our_name)
            raise TypeError(f"{both} are two names of one option; pass one of them")
        ours[our_name] = value
    return ours
