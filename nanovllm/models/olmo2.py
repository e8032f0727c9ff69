"""OLMo 2 and 3 (OLMo team, 2 OLMo 2 Furious, 2024; Olmo 3, 2025).

The norms stand behind attention and MLP, not before them: `h += norm(attention(h))`. Queries and
keys are normalised over the whole projection, all heads together. OLMo 3 adds sliding windows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.layers.attention import Attention
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import QKVParallelLinear, RowParallelLinear
from nanovllm.layers.residual import Attended, ResidualStream
from nanovllm.layers.rotary_embedding import RotaryEmbedding
from nanovllm.models.causal_lm import CausalLM, GatedMLP, head_size
from nanovllm.quantization.weight_format import PLAIN
from nanovllm.utils.loader import check_shape, set_weight_loader
from nanovllm.utils.tensor_parallel import get_tensor_parallel


class ProjectionNorm(nn.Module):
    """RMSNorm over all heads of a projection, of which this rank has some.

    The sum of squares is made in two steps, since it runs over all ranks: each rank's own, then
    `normalise_` with their sum. `full_size` counts the elements of all heads, `local_size` those
    of this rank's heads.
    """

    def __init__(self, full_size: int, local_size: int, eps: float) -> None:
        super().__init__()
        tp = get_tensor_parallel()
        num_shards = full_size // local_size
        self.full_size = full_size
        self.eps = eps
        self.ranks_per_shard = tp.size // num_shards  # more than 1 where ranks share a KV head
        self.first = tp.rank // self.ranks_per_shard * local_size
        self.weight = nn.Parameter(torch.empty(local_size), requires_grad=False)
        set_weight_loader(self.weight, self.load_weight)

    def load_weight(self, param: nn.Parameter, loaded: Any, shard_id: None = None) -> None:
        """Copy the weights of this rank's heads."""
        check_shape(loaded, (self.full_size,))
        param.copy_(loaded[self.first : self.first + len(param)])

    def sum_of_squares(self, x: Tensor) -> Tensor:
        """This rank's share of the sum over all heads: `[n]` float32, of x `[n, local_size]`.

        A head that several ranks hold counts once when their shares are added up.
        """
        return x.float().square().sum(-1) / self.ranks_per_shard

    def normalise_(self, x: Tensor, sum_of_squares: Tensor) -> None:
        """Normalise x `[n, local_size]` in place; `sum_of_squares` `[n]` is that of all heads."""
        factor = torch.rsqrt(sum_of_squares / self.full_size + self.eps)
        x.copy_(x.float() * factor.unsqueeze(-1) * self.weight)


class Olmo2Attention(nn.Module):
    """Grouped-query attention, with q and k normalised over all heads together."""

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        head_dim = head_size(config)
        bias = bool(config.attention_bias)
        self.tp = get_tensor_parallel()
        self.qkv_proj = QKVParallelLinear(config.hidden_size, head_dim, heads, kv_heads, bias)
        self.qkv_proj.epilogue = PLAIN  # the norms below read one tensor, not partial sums
        self.q_size = self.qkv_proj.num_heads * head_dim
        self.kv_size = self.qkv_proj.num_kv_heads * head_dim
        self.q_norm = ProjectionNorm(heads * head_dim, self.q_size, config.rms_norm_eps)
        self.k_norm = ProjectionNorm(kv_heads * head_dim, self.kv_size, config.rms_norm_eps)
        self.attn = Attention(
            self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads, head_dim, rotary_emb
        )
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias)

    def forward(self, positions: Tensor, x: Tensor) -> Attended:
        """Attend; `o_proj` is left to the residual stream, which adds on the way."""
        qkv = self.qkv_proj(x)
        q, k, _ = qkv.split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        sums = torch.stack((self.q_norm.sum_of_squares(q), self.k_norm.sum_of_squares(k)))
        if self.tp.size > 1:
            sums = self.tp.all_reduce(sums)
        self.q_norm.normalise_(q, sums[0])
        self.k_norm.normalise_(k, sums[1])
        return self.attn(positions, qkv)


class Olmo2DecoderLayer(nn.Module):
    """`h += norm(attention(h))`, then `h += norm(mlp(h))`."""

    def __init__(self, config: PretrainedConfig, index: int, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = Olmo2Attention(config, index, rotary_emb)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, positions: Tensor, stream: ResidualStream) -> None:
        """Update the hidden states in `stream`."""
        attended = self.self_attn(positions, stream.values())
        stream.add(self.self_attn.o_proj, attended, post_norm=self.post_attention_layernorm)
        stream.add(
            self.mlp.down_proj,
            stream.values(),
            before=self.mlp.gate_up_proj,
            post_norm=self.post_feedforward_layernorm,
        )


class Olmo2ForCausalLM(CausalLM):
    """OLMo 2, dense."""

    layer_class = Olmo2DecoderLayer
