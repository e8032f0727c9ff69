"""The registry: models by the architecture name in their config.json, and how one is built."""

from contextlib import nullcontext

import torch
from transformers import PretrainedConfig

from nanovllm.config import Config
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.gemma3 import Gemma3ForCausalLM
from nanovllm.models.granite import GraniteForCausalLM
from nanovllm.models.llama import LlamaForCausalLM
from nanovllm.models.mistral import MistralForCausalLM
from nanovllm.models.olmo2 import Olmo2ForCausalLM
from nanovllm.models.options import head_size
from nanovllm.models.phi3 import Phi3ForCausalLM
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM
from nanovllm.models.smollm3 import SmolLM3ForCausalLM
from nanovllm.models.weight_formats import choose_formats, fill_quantized, finish_loading
from nanovllm.quantization.construction import formats_postponed
from nanovllm.quantization.read_scheme import check_device, read_scheme
from nanovllm.utils.loader import fill_dummy, load_model

__all__ = ["MODELS", "build_model", "check_model", "head_size", "model_class"]

MODELS: dict[str, type[CausalLM]] = {
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    # Qwen3 with a QKV bias and without the norms on q and k: one class reads from the configuration
    # which of them it is.
    "Qwen2ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
    # Gemma 2 has the same layers with other options.
    "Gemma3ForCausalLM": Gemma3ForCausalLM,
    "Gemma2ForCausalLM": Gemma3ForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "MinistralForCausalLM": MistralForCausalLM,  # it says in `layer_types` which have a window
    "Phi3ForCausalLM": Phi3ForCausalLM,
    "Olmo2ForCausalLM": Olmo2ForCausalLM,
    "Olmo3ForCausalLM": Olmo2ForCausalLM,  # with windows
    "SmolLM3ForCausalLM": SmolLM3ForCausalLM,
    "GraniteForCausalLM": GraniteForCausalLM,
}


def model_class(hf_config: PretrainedConfig) -> type[CausalLM]:
    """Return the class that runs the architecture which a configuration names."""
    assert hf_config.architectures, "Config checks that there is one"
    return MODELS[hf_config.architectures[0]]


def check_model(config: Config) -> None:
    """Raise a ValueError for what this code would run wrongly, or could not be split. Afterwards
    `config.quantization` is the name of the scheme.
    """
    model_class(config.hf_config).check_config(config.hf_config, config.tensor_parallel_size)
    scheme = read_scheme(config.hf_config, config.quantization)
    if scheme is not None:
        check_device(config.device)
    config.quantization = None if scheme is None else scheme.name


def build_model(config: Config, device: torch.device) -> CausalLM:
    """Build this rank's part of the model on `device`, in the engine's dtype, and load its weights.

    Raises:
        ValueError: the checkpoint does not match the configuration.
    """
    hf_config = config.hf_config
    scheme = read_scheme(hf_config, config.quantization)
    previous_dtype = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with device, nullcontext() if scheme is None else formats_postponed():
            model = model_class(hf_config)(hf_config, config.max_model_len)
            if scheme is not None:
                choose_formats(model, scheme)
    finally:
        torch.set_default_dtype(previous_dtype)
    if config.load_format == "dummy":
        std = getattr(hf_config, "initializer_range", 0.02)
        fill_dummy(model, std, config.seed)
        fill_quantized(model, std, config.seed)
    else:
        load_model(model, config.model)
    finish_loading(model)
    return model
