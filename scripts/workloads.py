"""What bench.py measures: ten loads, and the shapes of real models.

Prompts are random token ids, drawn in a fixed order, so that every engine and every run is asked
for the same work. Weights may be random too: they cost as much time as trained ones.
"""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TOKEN_IDS = 10_000  # prompts are drawn from token ids 0 to 10000, both included
# The small load, for a CPU, has an eighth of the sequences and a quarter of each length, unless its
# workload says otherwise.
SEQUENCES_CUT = 8
LENGTHS_CUT = 4

Range = tuple[int, int]  # lowest and highest, both included


@dataclass(frozen=True)
class Limits:
    """Options of an engine that belong to what is asked of it."""

    max_num_seqs: int = 512
    max_model_len: int = 4096


@dataclass(frozen=True)
class Workload:
    """What is asked of the engine."""

    name: str
    about: str  # what it stands for, in a few words
    sequences: int
    input_len: Range  # tokens of a prompt; drawn where lowest and highest differ
    output_len: Range  # tokens to generate
    shared_len: int = 0  # tokens that all prompts begin with, before their own input_len
    counts_input: bool = False  # throughput is that of the input tokens
    embeds: bool = False  # a vector of each prompt is wanted; it counts as one token out
    limits: Limits = Limits()  # workloads with the same ones share an engine
    lengths_cut: int = LENGTHS_CUT  # by this the small load divides each length

    def small(self) -> "Workload":
        """The load that a CPU is given, in an engine whose limits are cut alike."""
        limits = Limits(
            max_num_seqs=self.limits.max_num_seqs // SEQUENCES_CUT,
            max_model_len=self.limits.max_model_len // self.lengths_cut,
        )
        return replace(
            self,
            sequences=max(1, self.sequences // SEQUENCES_CUT),
            input_len=self._cut(self.input_len),
            output_len=self._cut(self.output_len),
            shared_len=self.shared_len // self.lengths_cut,
            limits=limits,
        )

    def _cut(self, lengths: Range) -> Range:
        lowest, highest = lengths
        return max(1, lowest // self.lengths_cut), max(1, highest // self.lengths_cut)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence there can be, prompt and completion."""
        return self.shared_len + self.input_len[1] + self.output_len[1]


_ALL = (
    Workload(
        name="mixed",
        about="many lengths in and out",
        sequences=256,
        input_len=(100, 1024),
        output_len=(100, 1024),
    ),
    Workload(
        name="single",
        about="one request, latency",
        sequences=1,
        input_len=(128, 128),
        output_len=(512, 512),
    ),
    Workload(
        name="prefill",
        about="long prompts, one token out",
        sequences=64,
        input_len=(2048, 2048),
        output_len=(1, 1),
        counts_input=True,
    ),
    Workload(
        name="embed",
        about="long prompts, a vector out",
        sequences=64,
        input_len=(2048, 2048),
        output_len=(1, 1),
        counts_input=True,
        embeds=True,
    ),
    Workload(
        name="prefix",
        about="one long prefix shared by all",
        sequences=256,
        input_len=(128, 128),
        output_len=(64, 64),
        shared_len=2048,
    ),
    Workload(
        name="queue",
        about="more short requests than run at once",
        sequences=2048,
        input_len=(16, 128),
        output_len=(64, 64),
    ),
    Workload(
        name="small",
        about="a small batch",
        sequences=16,
        input_len=(128, 128),
        output_len=(256, 256),
    ),
    Workload(
        name="medium",
        about="a batch of middling size",
        sequences=64,
        input_len=(100, 100),
        output_len=(256, 256),
    ),
    Workload(
        name="job",
        about="many lengths, and more requests than run at once",
        sequences=2048,
        input_len=(32, 1024),
        output_len=(16, 512),
        limits=Limits(max_num_seqs=256),
    ),
    Workload(
        name="long",
        about="contexts of 30,000 tokens",
        sequences=16,
        input_len=(30_000, 30_000),
        output_len=(128, 128),
        limits=Limits(max_model_len=32_768),
        lengths_cut=8,  # with a quarter of it the demo checkpoint's 4096 positions would not do
    ),
)
WORKLOADS = {workload.name: workload for workload in _ALL}


@dataclass(frozen=True)
class Load:
    """One run's requests."""

    prompts: list[list[int]]  # token ids in
    output_lens: list[int]  # number of tokens out, of each prompt
    embeds: bool = False  # whether a vector is wanted instead


def make_load(workload: Workload, repeat: int, vocab_size: int) -> Load:
    """The requests of `workload`; each repeat has the same lengths and other token ids.

    A fixed length is not drawn; ids wrap round in a smaller vocabulary.
    """
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        ids = []
        for _ in range(count):
            drawn = rng.randint(0, TOKEN_IDS)
            ids.append((drawn + repeat) % (TOKEN_IDS + 1) % vocab_size)
        return ids

    def length(bounds: Range) -> int:
        lowest, highest = bounds
        return lowest if lowest == highest else rng.randint(lowest, highest)

    prefix = tokens(workload.shared_len)
    prompts = []
    for _ in range(workload.sequences):
        prompts.append(prefix + tokens(length(workload.input_len)))
    output_lens = [length(workload.output_len) for _ in prompts]
    return Load(prompts, output_lens, workload.embeds)


# The config.json of published models, as far as it matters with random weights.
_QWEN3: dict[str, object] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "max_position_embeddings": 40960,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
}
_LLAMA3: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131072,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_LLAMA3_ROPE: dict[str, object] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, object]] = {
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-4b": {
        **_QWEN3,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "max_window_layers": 36,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "max_window_layers": 36,
    },
    "qwen3-14b": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "max_window_layers": 40,
        "num_attention_heads": 40,
    },
    "qwen3-30b-a3b": {
        **_QWEN3,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,  # of dense layers, of which it has none
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "max_window_layers": 48,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "llama-3.2-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "rope_scaling": {**_LLAMA3_ROPE, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "torch_dtype": "bfloat16",
        "vocab_size": 262144,
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_hidden_layers": 26,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "rope_scaling": None,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,  # every sixth layer has no window
        "bos_token_id": 2,
        "eos_token_id": [1, 106],
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    },
}


# What bench.py reports of a model.
SHAPE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "sliding_window",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
)


INT4_CONFIG: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
}


def write_shape(name: str, directory: str, in_int4: bool = False) -> str:
    """Write the config.json of a real model to `directory`, for load_format="dummy"; return it.

    in_int4: its linear layers are to have four bits a weight, as in most checkpoints of GPTQ.
    """
    shape = dict(SHAPES[name])
    if in_int4:
        shape["quantization_config"] = INT4_CONFIG
    Path(directory, "config.json").write_text(json.dumps(shape, indent=2))
    return directory
