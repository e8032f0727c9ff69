"""scripts/quality.py finds what quantisation costs the demo checkpoint; scripts/int4_checkpoint.py
makes what compressed-tensors reads.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import DEMO_MODEL, LLM, SamplingParams

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import quality  # noqa: E402
from int4_checkpoint import quantization_config, round_to_int4, write_int4  # noqa: E402

WINDOW = 64
SMALL = ["--device", "cpu", "--window", str(WINDOW), "--tokens", str(6 * WINDOW)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the demo model was trained on, so that its predictions are worth something."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    conversations = json.loads((ROOT / "scripts" / "demo_text.json").read_text())
    file.write_text(json.dumps(conversations, ensure_ascii=False))
    return str(file)


@pytest.fixture(scope="module")
def qualities(text: str) -> dict[str, quality.Quality]:
    return {each.name: each for each in quality.main([*SMALL, "--text", text])}


def test_fewer_bits_cost_more(qualities: dict[str, quality.Quality]) -> None:
    losses = [each.divergences.mean().item() for each in qualities.values()]
    in_16_bits, fp8_cache, fp8, both, int4_32, int4_64, int4_128 = losses
    assert in_16_bits == 0 and min(losses[1:]) > 0
    assert max(fp8_cache, fp8) < both < int4_32 < int4_64 < int4_128
    agreements = [each.agreement for each in qualities.values()]
    assert agreements[0] == 1 and agreements[2] > agreements[6]
    for each in qualities.values():
        assert len(each.divergences) == 6 * (WINDOW - 1)
        assert each.divergences.min() > -1e-5


def test_bytes_are_those_of_a_gpu(qualities: dict[str, quality.Quality]) -> None:
    """Of the demo model: a scale in float32 for each row of FP8, in float16 for each group."""
    rows_of = {"qkv": 1024, "o": 256, "gate_up": 1024, "down": 256}
    columns_of = {"qkv": 256, "o": 512, "gate_up": 256, "down": 512}
    weights = 4 * sum(rows_of[name] * columns_of[name] for name in rows_of)
    rows = 4 * sum(rows_of.values())
    sizes = [each.sizes for each in qualities.values()]
    per_weight = [each.bytes_per_weight for each in sizes]
    in_fp8 = 1 + 4 * rows / weights
    in_int4 = [0.5 + 2 / group_size for group_size in (32, 64, 128)]
    assert per_weight == pytest.approx([2, 2, in_fp8, in_fp8, *in_int4])
    others = sizes[0].model_bytes - 2 * weights  # norms and the embedding
    for each in sizes:
        assert each.model_bytes == pytest.approx(others + each.bytes_per_weight * weights)
    in_cache = [each.kv_bytes_per_token for each in sizes]
    assert in_cache == [4096, 2048, 4096, 2048, 4096, 4096, 4096]


def test_what_it_listens_to_is_what_the_engine_returns() -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [300, 20, 1]]
    llm = LLM(DEMO_MODEL, device="cpu", max_model_len=64)
    ours = list(quality.predictions(llm, prompts))
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    results = llm.generate(prompts, params, use_tqdm=False)
    llm.exit()
    for prompt, rows, result in zip(prompts, ours, results, strict=True):
        assert rows.shape == (len(prompt) - 1, 1024)
        entries = zip(result.prompt_logprobs[1:], prompt[1:], strict=True)
        stated = [entry[token].logprob for entry, token in entries]
        taken = rows[range(len(prompt) - 1), prompt[1:]]
        torch.testing.assert_close(taken, torch.tensor(stated), atol=1e-4, rtol=0)


def test_a_text_must_fill_a_window(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Hello.")
    with pytest.raises(
        ValueError, match=r"the text has \d+ tokens, and a window is 64; pass a long"
    ):
        quality.main([*SMALL, "--text", str(file)])


# --- INT4 by rounding -----------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [128, 192])  # the last group may be smaller
def test_compressed_tensors_reads_the_rounded_weights(columns: int) -> None:
    pytest.importorskip("compressed_tensors")  # not for Python 3.10
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weight = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
    weight[3, :64] = 0
    tensors = round_to_int4(weight, 128)
    numbers = unpack_from_int32(tensors["weight_packed"], 4, torch.Size(weight.shape))
    scales = tensors["weight_scale"].float().repeat_interleave(128, 1)[:, :columns]
    assert tensors["weight_scale"].shape == (24, -(-columns // 128))
    assert ((numbers * scales - weight).abs() <= 0.502 * scales).all()


def test_the_engine_reads_the_checkpoint(tmp_path: Path) -> None:
    path = write_int4(DEMO_MODEL, tmp_path / "int4", 64)
    assert json.loads((path / "config.json").read_text())["quantization_config"] == (
        quantization_config(64)
    )
    original = load_file(Path(DEMO_MODEL) / "model.safetensors")
    weight = original["model.layers.1.mlp.down_proj.weight"].float()
    llm = LLM(str(path), device="cpu", max_model_len=64)
    layer = llm.model_runner.model.model.layers[1].mlp.down_proj
    restored = layer.weight_format.dequantize(layer, torch.float32)
    llm.exit()
    groups = weight.unflatten(1, (-1, 64))
    steps = groups.abs().amax(2, keepdim=True) / 7
    assert ((restored.view_as(groups) - groups).abs() <= 0.502 * steps).all()
    with pytest.raises(ValueError, match="is quantised already"):
        write_int4(str(path), tmp_path / "again", 64)
