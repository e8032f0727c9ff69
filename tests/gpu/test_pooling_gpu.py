"""Embeddings and log-probabilities of prompts on a GPU: beside CUDA graphs, one step late."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    QWEN3,
    Checkpoint,
    assert_idle,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    random_prompts,
)

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.token_ranks import token_ranks, token_ranks_torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCAB = 1000
PROMPTS = random_prompts(3, [5, 1, 40, 17, 300, 64, 9, 211], VOCAB)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(
        tmp_path_factory.mktemp("pooling"),
        QWEN3,
        std=256**-0.5,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
    )


def make(checkpoint: Checkpoint, **options: Any) -> LLM:
    defaults = dict(
        device="cuda",
        dtype="float32",
        max_model_len=512,
        kvcache_block_size=16,
        num_kvcache_blocks=200,
        enforce_eager=False,
    )
    return make_llm(checkpoint.path, **{**defaults, **options})


def hidden_states(checkpoint: Checkpoint, prompt: list[int]) -> torch.Tensor:
    """`[n, hidden]` float32, of transformers on the CPU."""
    with torch.inference_mode():
        return checkpoint.model.model(torch.tensor([prompt])).last_hidden_state[0].float()


# In float32 the kernels multiply in TF32 or not, but never in less than 10 bits.
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("chunk", [16384, 100])
def test_embeddings(small: Checkpoint, dtype: str, tolerance: float, chunk: int) -> None:
    llm = make(small, dtype=dtype, max_num_batched_tokens=chunk)
    expected = [hidden_states(small, prompt)[-1] for prompt in PROMPTS]
    tokens = generate_ids(llm, PROMPTS, greedy(4))
    calls = [[*PROMPTS], *([prompt] for prompt in PROMPTS)]  # all, which may be large; then small
    for _ in range(2):  # then from the prefix cache
        outputs = [output for call in calls for output in llm.embed(call, use_tqdm=False)]
        assert_idle(llm)
        for hidden, output in zip(expected * 2, outputs, strict=True):
            ours = torch.tensor(output.outputs.embedding)
            assert ours.norm().item() == pytest.approx(1, abs=1e-5)
            assert (ours - hidden / hidden.norm()).norm() < tolerance
    assert generate_ids(llm, PROMPTS, greedy(4)) == tokens
    llm.exit()


@pytest.mark.parametrize("vocab", [5, 4096, 151_936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_ranks(vocab: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(70, vocab, generator=generator, device="cuda").mul_(3).to(dtype)
    token_ids = torch.randint(vocab, (70,), generator=generator, device="cuda")
    ours = token_ranks(logits, token_ids)
    theirs = token_ranks_torch(logits, token_ids)
    torch.testing.assert_close(ours.logsumexp, theirs.logsumexp, atol=1e-4, rtol=1e-6)
    assert torch.equal(ours.ranks, theirs.ranks)
    assert torch.equal(logits.gather(1, ours.likeliest[:, None])[:, 0], logits.amax(1))


def test_means(small: Checkpoint, tmp_path: Path) -> None:
    for file in Path(small.path).iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "modules.json").write_text(
        '[{"type": "sentence_transformers.models.Transformer", "path": ""}, '
        '{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'
    )
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    llm = make(Checkpoint(str(tmp_path), small.model), max_num_batched_tokens=100)
    for prompt, output in zip(PROMPTS, llm.embed(PROMPTS, use_tqdm=False), strict=True):
        mean = hidden_states(small, prompt).mean(dim=0)
        assert (torch.tensor(output["embedding"]) - mean).norm() < 2e-3 * mean.norm()
    llm.exit()


@pytest.mark.parametrize("chunk", [16384, 100])
def test_prompt_logprobs(small: Checkpoint, chunk: int) -> None:
    """Neighbours without them run in graphs where they are alone, and have the same tokens."""
    llm = make(small, max_num_batched_tokens=chunk)
    tokens = generate_ids(llm, PROMPTS, greedy(8))
    params = [
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=k)
        for k in (0, 1, None, 5, 2, None, 0, 20)
    ]
    for _ in range(2):
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        assert_idle(llm)
        assert [output["token_ids"] for output in outputs] == tokens
        for prompt, wanted, output in zip(PROMPTS, params, outputs, strict=True):
            if wanted.prompt_logprobs is None:
                assert "prompt_logprobs" not in output
                continue
            expected = small.logits(prompt).log_softmax(dim=-1)
            entries = output["prompt_logprobs"]
            assert len(entries) == len(prompt) and entries[0] is None
            for position in range(1, len(prompt)):
                assert len(entries[position]) >= max(wanted.prompt_logprobs, 1)
                for token_id, value in entries[position].items():
                    assert value == pytest.approx(expected[position - 1, token_id].item(), abs=2e-2)
    llm.exit()
