"""Qwen3-MoE (Yang et al., Qwen3 Technical Report, 2025): Qwen3 with a mixture of experts as MLP.

A layer's router sends each token to a few of many experts. Attention is that of Qwen3.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import divide
from nanovllm.layers.residual import ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, GatedMLP
from nanovllm.models.options import check_option
from nanovllm.models.qwen3 import Qwen3Attention
from nanovllm.models.sparse_moe import SparseMoE


def has_experts(config: PretrainedConfig, index: int) -> bool:
    """Whether layer number `index` has experts, and not a dense MLP."""
    if index in (config.mlp_only_layers or ()):
        return False
    return config.num_experts > 0 and (index + 1) % config.decoder_sparse_step == 0


class Qwen3MoeDecoderLayer(nn.Module):
    """`h += attention(norm(h))`, then `h += experts(norm(h))`, in some models with dense layers."""

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, index, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: SparseMoE | GatedMLP
        if has_experts(config, index):
            self.mlp = SparseMoE(
                hidden_size=config.hidden_size,
                intermediate_size=config.moe_intermediate_size,
                num_experts=config.num_experts,
                top_k=config.num_experts_per_tok,
                is_normalized=config.norm_topk_prob,
            )
        else:
            self.mlp = GatedMLP(config)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        x = stream.normed(self.input_layernorm, self.self_attn.qkv_proj)
        stream.add(self.self_attn.o_proj, self.self_attn(positions, x))
        if isinstance(self.mlp, SparseMoE):
            stream.add(self.mlp, stream.normed(self.post_attention_layernorm))
        else:
            x = stream.normed(self.post_attention_layernorm, self.mlp.gate_up_proj)
            stream.add(self.mlp.down_proj, x, before=self.mlp.gate_up_proj)


class Qwen3MoeForCausalLM(CausalLM):
    """Qwen3 with experts."""

    model_types = ("qwen3_moe",)
    layer_class = Qwen3MoeDecoderLayer

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        super().check_config(config, tp_size)
        check_option(config, "hidden_act", "silu")  # the kernels of the experts know no other
        check_option(config, "use_sliding_window", False, None)
        if config.decoder_sparse_step < 1:
            raise ValueError(
                f"decoder_sparse_step ({config.decoder_sparse_step}) must be at least 1"
            )
        if not any(has_experts(config, index) for index in range(config.num_hidden_layers)):
            return
        if not 1 <= config.num_experts_per_tok <= config.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({config.num_experts_per_tok}) must be 1 to num_experts "
                f"({config.num_experts})"
            )
        divide("moe_intermediate_size", config.moe_intermediate_size, tp_size)
