"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (Abdin et al., Phi-3 Technical Report, 2024).

Llama's layers, some with a sliding window. But the checkpoint has one tensor for the query, key and
value projections, and one for gate and up. RoPE may rotate only a part of each head, and be
rescaled for long contexts (LongRoPE).
"""

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from nanovllm.layers.activation import GateUpLinear
from nanovllm.layers.linear import MergedColumnParallelLinear, QKVParallelLinear
from nanovllm.models.causal_lm import CausalLM, GatedMLP
from nanovllm.models.llama import LlamaDecoderLayer
from nanovllm.models.mistral import MistralAttention
from nanovllm.models.options import check_option
from nanovllm.quantization.weight_format import Shard


class StackedColumnParallelLinear(MergedColumnParallelLinear):
    """Matrices that are merged in the checkpoint, too: one tensor, named like this layer."""

    packed_modules_mapping: Any = None

    def shards(self, shard_id: None = None) -> list[Shard]:
        """This rank's rows of each matrix; of the file nothing else is read."""
        full_shape = (sum(self.output_sizes), self.input_size)
        shards = []
        first = 0  # the row of the tensor where a matrix begins
        for index, size in enumerate(self.output_sizes):
            shard = MergedColumnParallelLinear.shard(self, index)
            rows = shard.source_rows
            in_tensor = replace(
                shard,
                full_shape=full_shape,
                source_rows=slice(first + rows.start, first + rows.stop),
            )
            shards.append(in_tensor)
            first += size
        return shards


class Phi3QKVLinear(StackedColumnParallelLinear, QKVParallelLinear):
    """`qkv_proj.weight`: all query heads, then all key heads, then all value heads."""


class Phi3GateUpLinear(StackedColumnParallelLinear, GateUpLinear):
    """`gate_up_proj.weight`: the gate above the up projection."""


class Phi3Attention(MistralAttention):
    """Grouped-query attention, in a window where the model has one."""

    qkv_class = Phi3QKVLinear


class Phi3MLP(GatedMLP):
    """`down(silu(gate(x)) * up(x))`."""

    gate_up_class = Phi3GateUpLinear


class Phi3DecoderLayer(LlamaDecoderLayer):
    """Llama's, from other tensors."""

    attention_class = Phi3Attention
    mlp_class = Phi3MLP


class Phi3ForCausalLM(CausalLM):
    """Phi-3 and Phi-4, dense."""

    model_types = ("phi3",)
    layer_class = Phi3DecoderLayer

    @classmethod
    def check_config(cls, config: PretrainedConfig, tp_size: int) -> None:
        """Raise a ValueError for what this code would run wrongly, or could not be split."""
        super().check_config(config, tp_size)
        check_option(config, "attention_bias", False, None)
        check_option(config, "lm_head_bias", False, None)
