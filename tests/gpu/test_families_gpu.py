"""Every family on a GPU, with CUDA graphs and without: `transformers`' tokens in float32, and in
bfloat16 tokens that it finds likely.

The families and their options are those of test_families.py; how tokens are judged is told in
test_engine_gpu.py.
"""

from typing import Any

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, make_llm, random_prompts
from test_engine_gpu import check_choices
from test_families import FAMILIES, LENGTHS, need

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

DEVICE = "cuda"
NUM_TOKENS = 24
# Heads as wide as those of real models, for which the kernels have other tiles.
WIDE = dict(hidden_size=256, intermediate_size=512)
# In bfloat16 a close choice of experts may fall either way and change all that follows, so mixtures
# of experts have a test of their own, in test_moe_gpu.py.
DENSE = {name: options for name, options in FAMILIES.items() if "num_experts" not in options}
CASES: dict[str, dict[str, Any]] = {
    **DENSE,
    "granite-bias-tied": dict(FAMILIES["granite-bias-tied"], seed=2),  # the first has close choices
    "llama-128": dict(WIDE, architecture="LlamaForCausalLM", head_dim=128),
    "gemma3-256": dict(
        WIDE,
        architecture="Gemma3ForCausalLM",
        head_dim=256,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=40,
        tie_word_embeddings=True,
        std=0.02,
    ),
    "gemma2-256": dict(WIDE, architecture="Gemma2ForCausalLM", head_dim=256, sliding_window=40),
}
Case = tuple[Checkpoint, list[list[int]], list[list[int]]]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A checkpoint, its `transformers` model on the GPU in float32; prompts; their greedy
    completions.
    """
    name = request.param
    need(CASES[name])
    options: dict[str, Any] = {"seed": 1, **CASES[name]}
    # The spread of a trained model's results, as in test_engine_gpu.py. A tied model with so small
    # weights would repeat its last token: its embedding outweighs the layers.
    std = options.get("hidden_size", 48) ** -0.5
    options.setdefault("std", 0.25 if options.get("tie_word_embeddings") else std)
    saved = make_checkpoint(tmp_path_factory.mktemp(name), **options)
    checkpoint = Checkpoint(saved.path, saved.model.to(DEVICE))
    prompts = random_prompts(0, LENGTHS)
    prompts += [prompts[8][:40] + tail for tail in random_prompts(1, [3, 20])]
    return checkpoint, prompts, checkpoint.complete(prompts, NUM_TOKENS, min_margin=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_tokens_of_transformers(case: Case, eager: bool, dtype: str) -> None:
    checkpoint, prompts, expected = case
    llm = make_llm(
        checkpoint.path,
        device=DEVICE,
        dtype=dtype,
        enforce_eager=eager,
        max_num_seqs=16,
        max_num_batched_tokens=50 if eager else 1024,  # one of the two in chunks
    )
    try:
        for _ in range(2):  # the second time with prefix hits
            completions = generate_ids(llm, prompts, greedy(NUM_TOKENS))
            if dtype == "float32":
                assert completions == expected
            else:
                assert [len(tokens) for tokens in completions] == [NUM_TOKENS] * len(prompts)
                check_choices(checkpoint, prompts, completions)
    finally:
        llm.exit()
