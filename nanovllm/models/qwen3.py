"""Qwen3 (Yang et al., Qwen3 Technical Report, 2025) and Qwen2: a decoder-only transformer.

Pre-norm blocks of grouped-query attention and a SwiGLU MLP. The layer that reads a norm computes it, the one that
ends a block adds to `hidden`, in place: on the way, where they can; what adds may compute the next norm, too.
Tensors have no batch dimension: the tokens of all sequences of a step lie one after the other, `[num_tokens, ...]`,
and only attention knows the borders. From the last layer's attention on, a prefill goes on with each sequence's last
token only.
"""

from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.layers.activation import SiluGateUpLinear
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead, VocabParallelEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear, divide
from nanovllm.layers.rotary_embedding import RotaryEmbedding, rope_theta
from nanovllm.utils.context import get_context
from nanovllm.utils.tensor_parallel import get_tensor_parallel


def head_size(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Qwen3Attention(nn.Module):
    """Grouped-query attention. Qwen3 normalises each head's q and k before RoPE; Qwen2 has a QKV bias instead."""

    def __init__(self, config: PretrainedConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        heads, kv_heads, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            head_size(config),
        )
        is_qwen3 = config.model_type == "qwen3"
        bias = is_qwen3 and bool(getattr(config, "attention_bias", False))
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, kv_heads, bias or not is_qwen3
        )
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if is_qwen3 else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if is_qwen3 else None
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(
        self,
        positions: Tensor,
        x: Tensor,
        norm: RMSNorm | None,
        residual: Tensor,
        next_norm: RMSNorm,
        wanted: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        attended = self.attn(positions, self.qkv_proj(x, norm), self.q_norm, self.k_norm, wanted)
        return self.o_proj(attended, residual if wanted is None else residual[wanted], next_norm)


class Qwen3MLP(nn.Module):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.gate_up_proj = SiluGateUpLinear(config.hidden_size, config.intermediate_size)
        self.down_proj = RowParallelLinear(config.intermediate_size, config.hidden_size)

    def forward(
        self, x: Tensor, norm: RMSNorm | None, residual: Tensor, next_norm: RMSNorm | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.down_proj(x, residual, next_norm, before=lambda x: self.gate_up_proj(x, norm))


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: PretrainedConfig, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(
        self,
        positions: Tensor,
        hidden: Tensor,
        normed: Tensor | None,
        next_norm: RMSNorm | None,
        wanted: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden `[n, hidden]`, and its norm if that is known -> the same, the norm being the next layer's; of all
        tokens, or of those `wanted` (indices). Where ranks sum piece by piece, they pass on the norm of all tokens
        and a part of hidden each."""
        norm = self.post_attention_layernorm
        x = (hidden, self.input_layernorm) if normed is None else (normed, None)
        hidden, normed = self.self_attn(
            positions, *x, hidden, norm, wanted
        )  # hidden + attention(norm(hidden))
        x = (hidden, norm) if normed is None else (normed, None)
        return self.mlp(*x, hidden, next_norm)  # hidden + mlp(norm(hidden))


class Qwen3Model(nn.Module):
    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__()
        self.tp = get_tensor_parallel()
        rotary_emb = RotaryEmbedding(head_size(config), max_position, rope_theta(config))
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Qwen3DecoderLayer(config, rotary_emb) for _ in range(config.num_hidden_layers)
        )
        self.next_norms = [layer.input_layernorm for layer in self.layers][
            1:
        ]  # each layer's but the last one's
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden, normed, context = self.embed_tokens(input_ids), None, get_context()
        wanted, next_norms = None, self.next_norms
        if (
            context.is_prefill
        ):  # the last layer's tokens leave K and V, but only each sequence's last one goes on
            wanted = context.cu_seqlens_q[1:] - 1
            # A rank may have only its part of `hidden` beside a norm; the last layer needs it all.
            next_norms = [None if norm is next_norms[-1] else norm for norm in next_norms]
        for layer, next_norm in zip(self.layers, next_norms):
            hidden, normed = layer(positions, hidden, normed, next_norm)
        self.tp.wait_for_pieces()
        hidden, _ = self.layers[-1](positions, hidden, normed, None, wanted)
        self.tp.wait_for_pieces()
        return hidden  # the last norm is left to the LM head


class Qwen3ForCausalLM(nn.Module):
    """The language model of a dense checkpoint; RoPE is tabulated for `max_position` positions."""

    # checkpoint name -> (merged parameter, its shard)
    packed_modules_mapping: dict[str, tuple[str, str | int]] = {
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", 0),
        "up_proj": ("gate_up_proj", 1),
    }

    def __init__(self, config: PretrainedConfig, max_position: int) -> None:
        super().__init__()
        self.model = Qwen3Model(config, max_position)
        self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @staticmethod
    def check_config(config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly or cannot split over `tp_size` ranks."""
        rope_theta(config)
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        layer_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if config.hidden_act != "silu":
            raise ValueError(
                f"hidden_act {config.hidden_act!r} is not supported; supported: 'silu'"
            )
        if getattr(config, "use_sliding_window", False) or layer_types:
            raise ValueError(
                "sliding-window attention is not supported; set use_sliding_window to false"
            )
        if getattr(config, "quantization_config", None):
            raise ValueError(
                "quantised checkpoints are not supported; use a bf16, fp16 or fp32 one"
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
            )
        divide("num_attention_heads", heads, tp_size)
        divide("intermediate_size", config.intermediate_size, tp_size)
        if (
            kv_heads % tp_size and tp_size % kv_heads
        ):  # else a rank has several KV heads, or several ranks share one
            raise ValueError(
                f"num_key_value_heads ({kv_heads}) and tensor_parallel_size {tp_size}: one must divide the other"
            )

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """`[num_tokens]` int64 each -> hidden states `[num_seqs, hidden_size]` of each sequence's last token."""
        return self.model(input_ids, positions)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """`[num_seqs, hidden_size]` -> logits `[num_seqs, vocab_size / tp]`."""
        return self.lm_head(hidden, self.model.norm)
