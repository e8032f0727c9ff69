"""The models, by the architecture name in their config.json."""

from nanovllm.models.qwen3 import Qwen3ForCausalLM

# Qwen2 is Qwen3 with a QKV bias and without the norms on q and k: one class reads which from the configuration.
MODELS = {"Qwen3ForCausalLM": Qwen3ForCausalLM, "Qwen2ForCausalLM": Qwen3ForCausalLM}
