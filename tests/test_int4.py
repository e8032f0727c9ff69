"""INT4 weights: a checkpoint of each layout gives the numbers, and the tokens, of `transformers`
running the dequantised weights in float32.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("compressed_tensors")  # the test extra has it from Python 3.11 on

from compressed_checkpoints import pack_quantized, pack_quantized_config
from conftest import Checkpoint, generate_ids, greedy, make_llm, random_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_checkpoints import (
    awq,
    awq_config,
    awq_tensors,
    gptq,
    gptq_config,
    gptq_tensors,
    round_to_int4,
)
from quantized import WEIGHTS, Quantize, quantize_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanovllm.config import Config
from nanovllm.kernels.int4_layout import pack_int4, packed_width, unpack_int4
from nanovllm.models import build_model
from nanovllm.quantization.awq import AWQ
from nanovllm.quantization.gptq import GPTQ
from nanovllm.quantization.int4 import Int4
from nanovllm.quantization.pack_quantized import PackQuantized
from nanovllm.quantization.weight_format import Shard
from nanovllm.utils.tensor_parallel import tensor_parallel

PROMPTS = random_prompts(3, [40, 3, 33])
# Every matrix has more than one group of 64 columns, and not always a whole number of blocks.
SIZES: dict[str, Any] = dict(hidden_size=128, intermediate_size=192, head_dim=32, std=0.15)
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": SIZES,
    "llama-tied": {
        **SIZES,
        "architecture": "LlamaForCausalLM",
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "qwen3-moe": {
        **SIZES,
        "architecture": "Qwen3MoeForCausalLM",
        "moe_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}
FORMATS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "awq-32": (awq(32), awq_config(32)),
    "awq-64": (awq(64), awq_config(64)),
    "awq-symmetric": (awq(-1, symmetric=True), awq_config(-1, zero_point=False)),
    "gptq": (gptq(64), gptq_config(64)),
    "gptq-v2": (gptq(32, less_one=False), gptq_config(32, checkpoint_format="gptq_v2")),
    "gptq-asymmetric": (gptq(-1, symmetric=False), gptq_config(-1, sym=False)),
    "gptq-v2-asymmetric": (
        gptq(64, symmetric=False, less_one=False),
        gptq_config(64, sym=False, checkpoint_format="gptq_v2"),
    ),
    "gptq-desc-act": (
        gptq(32, symmetric=False, desc_act=True),
        gptq_config(32, sym=False, desc_act=True),
    ),
    "packed": (pack_quantized(64), pack_quantized_config(64)),
    "packed-asymmetric": (pack_quantized(32, False), pack_quantized_config(32, False)),
    "packed-channel": (pack_quantized(-1, False), pack_quantized_config(-1, False)),
    "packed-actorder": (
        pack_quantized(64, act_order=True),
        pack_quantized_config(64, actorder="group"),
    ),
}


def make(path: Path, layout: str, model: str = "qwen3") -> Checkpoint:
    quantize, config = FORMATS[layout]
    return quantize_checkpoint(path, quantize, config, **MODELS[model])


def tokens_of(checkpoint: Checkpoint, num_tokens: int = 8, **options: Any) -> list[list[int]]:
    llm = make_llm(checkpoint.path, **options)
    try:
        return generate_ids(llm, PROMPTS, greedy(num_tokens))
    finally:
        llm.exit()


def load(path: str, **options: Any) -> torch.nn.Module:
    config = Config(path, device="cpu", dtype=torch.float32, max_model_len=256, **options)
    return build_model(config, torch.device("cpu"))


@pytest.mark.parametrize("layout", FORMATS)
def test_weights_are_the_dequantised_ones(layout: str, tmp_path: Path) -> None:
    """Exactly: both are a product of two float32."""
    checkpoint = make(tmp_path, layout)
    model = load(checkpoint.path)
    expected = dict(checkpoint.model.named_modules())
    for index in range(2):
        name = f"model.layers.{index}"
        for layer, parts in {
            "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
            "self_attn.o_proj": ("o_proj",),
            "mlp.gate_up_proj": ("gate_proj", "up_proj"),
            "mlp.down_proj": ("down_proj",),
        }.items():
            module = model.get_submodule(f"{name}.{layer}")
            parent = f"{name}.{layer.split('.')[0]}"
            weights = [expected[f"{parent}.{part}"].weight for part in parts]
            dequantized = module.weight_format.dequantize(module, torch.float32)
            assert torch.equal(dequantized, torch.cat(weights)), layer


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("qwen3", "awq-64"),
        ("qwen3", "gptq-desc-act"),
        ("llama-tied", "gptq-asymmetric"),
        ("llama-tied", "packed-asymmetric"),
        ("qwen3-moe", "awq-32"),
        ("qwen3-moe", "gptq"),
        ("qwen3-moe", "packed"),
    ],
)
def test_tokens_are_those_of_the_dequantised_weights(
    model: str, layout: str, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path, layout, model)
    assert tokens_of(checkpoint) == checkpoint.complete(PROMPTS, 8)


def test_two_ranks_hold_parts_of_groups(tmp_path: Path) -> None:
    """Of 384 columns in groups of 128 a rank has 192: one and a half groups, in groups of 64."""
    sizes = {**SIZES, "intermediate_size": 384}
    checkpoint = quantize_checkpoint(tmp_path, awq(128), awq_config(128), **sizes)
    assert tokens_of(checkpoint, tensor_parallel_size=2) == checkpoint.complete(PROMPTS, 8)


@pytest.mark.parametrize("layout", ["awq-64", "gptq-asymmetric", "packed-asymmetric"])
def test_ranks_hold_parts_of_the_weights(layout: str, tmp_path: Path) -> None:
    """One rank's heads and columns; a KV head has 32 rows, of which the packers put 8 in a word."""
    checkpoint = make(tmp_path, layout)
    expected = dict(checkpoint.model.named_modules())
    for rank in range(2):
        with tensor_parallel(rank, 2):
            model = load(checkpoint.path)
        name = "model.layers.1"
        down = model.get_submodule(f"{name}.mlp.down_proj")
        columns = slice(96 * rank, 96 * (rank + 1))
        whole = expected[f"{name}.mlp.down_proj"].weight[:, columns]
        assert torch.equal(down.weight_format.dequantize(down, torch.float32), whole)
        qkv = model.get_submodule(f"{name}.self_attn.qkv_proj")
        parts = [expected[f"{name}.self_attn.{part}_proj"].weight.chunk(2)[rank] for part in "qkv"]
        assert torch.equal(qkv.weight_format.dequantize(qkv, torch.float32), torch.cat(parts))


# --- what is refused ------------------------------------------------------------------------------


def refused(checkpoint: Checkpoint, match: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        make_llm(checkpoint.path, **options).exit()


def rewrite(checkpoint: Checkpoint, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint."""
    file = Path(checkpoint.path) / WEIGHTS
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def configure(checkpoint: Checkpoint, **changes: Any) -> None:
    """Change the quantization_config of a checkpoint."""
    file = Path(checkpoint.path) / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"].update(changes)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("layout", "changes", "match"),
    [
        ("awq-32", {"bits": 8}, "bits 8 .*supported: 4"),
        ("awq-32", {"version": "gemv"}, "version 'gemv' .*'gemm'"),
        ("awq-32", {"group_size": 48}, "group_size 48 .*multiple of 32"),
        ("awq-32", {"group_size": "32"}, "group_size '32' .*multiple of 32"),
        ("awq-32", {"zero_point": 1.5}, "zero_point 1.5"),
        ("gptq", {"bits": 3}, "bits 3 .*supported: 4"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"lm_head": True}, "lm_head True"),
        ("gptq", {"dynamic": {".*down.*": {"bits": 8}}}, r"dynamic '\.\*down\.\*'"),
        ("gptq", {"sym": "yes"}, "sym 'yes'"),
        ("gptq", {"modules_in_block_to_quantize": ["mlp.up_proj"]}, "in a list, not by 'mlp.up_"),
        ("packed", pack_quantized_config(64, strategy="tensor"), "strategy 'tensor'"),
        ("packed", pack_quantized_config(64, num_bits=8), "pack-quantized of 8-bit int"),
        ("packed", pack_quantized_config(64, actorder="odd"), "actorder 'odd'"),
        # What the configuration says is not what the tensors are.
        ("awq-32", {"group_size": 64}, r"qzeros' has shape \[6, 16\], .* asks for"),
        ("awq-32", {"zero_point": False}, r"qzeros' holds the zero points .*symmetric"),
        ("gptq", {"checkpoint_format": "gptq_v2"}, r"qzeros' holds the zero points \[7\]"),
        ("gptq-v2", {"checkpoint_format": "gptq"}, r"qzeros' holds the zero points \[9\]"),
        ("gptq-desc-act", {"desc_act": False}, "g_idx' has the groups out of order"),
        ("packed", pack_quantized_config(64, symmetric=False), "missing.*weight_zero_point"),
    ],
)
def test_configurations_are_refused_by_name(
    layout: str, changes: dict[str, Any], match: str, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path, layout)
    configure(checkpoint, **changes)
    refused(checkpoint, match)


Q_PROJ = "model.layers.0.self_attn.q_proj"


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{name}")


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.{name}"] = change(tensors[f"{Q_PROJ}.{name}"]).contiguous()

    return apply


@pytest.mark.parametrize(
    ("layout", "change", "match"),
    [
        ("awq-32", drop("scales"), "1 missing: .*q_proj.scales"),
        ("awq-32", drop("qzeros"), "1 missing: .*q_proj.qzeros"),
        ("awq-32", replace("qweight", lambda t: t[:, :-1]), r"qweight' has shape \[128, 15\]"),
        ("awq-32", replace("scales", lambda t: t * float("nan")), "scales' holds a scale that is"),
        ("awq-32", replace("scales", lambda t: t * 0), "scales' holds scales from 0 to 0"),
        ("awq-32", replace("qweight", lambda t: t.float()), "qweight' is F32 and not I32"),
        ("gptq", replace("g_idx", lambda t: t * 0), "g_idx' does not give each group of 64"),
        ("gptq-desc-act", drop("g_idx"), "1 missing: .*q_proj.g_idx"),
        ("gptq-desc-act", replace("g_idx", lambda t: t.flip(0)), "qkv_proj: .*different groups"),
        ("packed", replace("weight_shape", lambda t: t + 1), r"weight_shape' is \(129, 129\)"),
        ("packed", replace("weight_scale", lambda t: t[:, :1]), r"weight_scale' has shape"),
    ],
)
def test_tensors_are_refused_by_name(
    layout: str, change: Callable[[dict[str, Tensor]], None], match: str, tmp_path: Path
) -> None:
    checkpoint = make(tmp_path, layout)
    rewrite(checkpoint, change)
    refused(checkpoint, match)


def test_biases_of_zeros_are_let_through(tmp_path: Path) -> None:
    """Checkpoints of AutoGPTQ's first year have them for every layer."""
    checkpoint = make(tmp_path, "gptq")
    expected = load(checkpoint.path).state_dict()
    rewrite(checkpoint, lambda tensors: tensors.update({f"{Q_PROJ}.bias": torch.zeros(128)}))
    for name, param in load(checkpoint.path).state_dict().items():
        assert torch.equal(param, expected[name])
    rewrite(checkpoint, replace("bias", lambda bias: bias + 1))
    refused(checkpoint, "q_proj.bias' is a bias, and .* has none")


def test_columns_out_of_order_are_loaded_once(tmp_path: Path) -> None:
    """What could not be loaded again is not dropped, so the engine goes on."""
    checkpoint = make(tmp_path, "gptq-desc-act")
    llm = make_llm(checkpoint.path)
    before = generate_ids(llm, PROMPTS, greedy(2))
    with pytest.raises(ValueError, match="cannot be loaded again"):
        llm.load_weights(checkpoint.path)
    with pytest.raises(ValueError, match="cannot be loaded again after level 2; use level 1"):
        llm.sleep(2)
    llm.sleep(1)
    llm.wake_up()
    assert generate_ids(llm, PROMPTS, greedy(2)) == before
    llm.exit()


def test_negative_scales(tmp_path: Path) -> None:
    """AutoRound makes a scale negative where the largest weight of a group is positive."""
    checkpoint = make(tmp_path, "gptq")
    layer = "model.layers.0.self_attn.qkv_proj"
    positive = load(checkpoint.path).get_submodule(layer)
    rewrite(checkpoint, replace("scales", lambda scales: -scales))
    negative = load(checkpoint.path).get_submodule(layer)
    before, after = (m.weight_format.dequantize(m, torch.float32) for m in (positive, negative))
    assert torch.equal(after[:128], -before[:128]) and torch.equal(after[128:], before[128:])


def test_a_rank_must_have_whole_groups(tmp_path: Path) -> None:
    """48 of 96 columns are no groups of 32; and groups out of order are on several ranks."""
    sizes = {**SIZES, "intermediate_size": 96}
    cut = quantize_checkpoint(tmp_path / "a", awq(32), awq_config(32), **sizes)
    unordered = make(tmp_path / "b", "gptq-desc-act")
    with tensor_parallel(0, 2):
        with pytest.raises(ValueError, match="groups of 32 columns.*other tensor_parallel_size"):
            load(cut.path)
        with pytest.raises(ValueError, match="g_idx' has the groups out of order.*_size 1"):
            load(unordered.path)


# --- our layout -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_what_is_packed_is_unpacked(rows: int, columns: int, seed: int) -> None:
    numbers = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_int4(numbers)
    assert packed.shape == (rows, packed_width(columns)) and packed.dtype == torch.int16
    assert torch.equal(unpack_int4(packed, columns), numbers.to(torch.uint8))


def test_where_numbers_lie() -> None:
    """As the table in int4_layout.py says."""
    for column in (0, 1, 31, 32, 64, 127, 128, 129, 255):
        numbers = torch.zeros(1, 256, dtype=torch.int64)
        numbers[0, column] = 15
        block, place = divmod(column, 128)
        expected = torch.zeros(1, 64, dtype=torch.int32)
        expected[0, block * 32 + place % 32] = 15 << place // 32 * 4
        assert torch.equal(pack_int4(numbers), expected.to(torch.int16)), column


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([32, 64, 96, 128, -1]),
    st.integers(1, 3),
    st.sampled_from([16, 24, 40]),
    st.booleans(),
    st.sampled_from(["awq", "gptq", "gptq_v2", "packed"]),
    st.integers(0, 2**31),
)
def test_each_layout_is_read(
    group_size: int, num_groups: int, rows: int, symmetric: bool, layout: str, seed: int
) -> None:
    """A matrix of any size, one half of its rows on this rank."""
    columns = num_groups * 64 if group_size == -1 else num_groups * group_size
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rounded = round_to_int4(weight, group_size, symmetric)
    weight_format: Int4
    if layout == "awq":
        weight_format, tensors = AWQ(group_size, symmetric), awq_tensors(rounded)
    elif layout == "packed":
        weight_format = PackQuantized(group_size, symmetric)
        tensors = pack_quantized(group_size, symmetric)("", weight).tensors
    else:
        less_one = layout == "gptq"
        weight_format = GPTQ(group_size, symmetric, zeros_are_less_one=less_one)
        tensors = gptq_tensors(rounded, less_one)
    half = slice(rows // 2, rows)
    shard = Shard((rows, columns), half, slice(0, columns), slice(0, rows - rows // 2))
    layer = torch.nn.Module()
    weight_format.create(layer, rows - rows // 2, columns, [shard])
    for kind, tensor in tensors.items():
        weight_format.load(layer, kind, tensor, shard)
    weight_format.finish(layer)
    expected = rounded.dequantized()[half]
    assert torch.equal(weight_format.dequantize(layer, torch.float32), expected)


@pytest.mark.parametrize("layout", ["awq-64", "gptq-desc-act", "packed", "packed-channel"])
def test_random_weights(layout: str, tmp_path: Path) -> None:
    """`load_format="dummy"` rounds normal weights: to 7 or 15 steps a group, so within one step."""
    checkpoint = make(tmp_path, layout)
    layer = load(checkpoint.path, load_format="dummy").get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer.weight_format, Int4)
    weight = layer.weight_format.dequantize(layer, torch.float32)
    assert 0.015 < weight.std() < 0.025 and len(weight.unique()) > 1000


def test_random_weights_of_a_rank_that_holds_half_a_group(tmp_path: Path) -> None:
    """96 of 192 columns, in groups of 64."""
    checkpoint = make(tmp_path, "packed")
    with tensor_parallel(1, 2):
        model = load(checkpoint.path, load_format="dummy")
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(layer.weight_format, Int4) and layer.group_size == 32
    assert 0.015 < layer.weight_format.dequantize(layer, torch.float32).std() < 0.025
