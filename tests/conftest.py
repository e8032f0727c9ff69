"""Shared by all tests: small random checkpoints, their `transformers` results, and checks of an
engine.
"""

import json
import multiprocessing.shared_memory
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before the first import of triton: its interpreter then runs the kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it: no test may fetch anything

import pytest
import transformers
from transformers import PreTrainedModel

from nanovllm import LLM, SamplingParams
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sharing.copy_on_write import SharedTails

# What a shell runs in the background ignores Ctrl-C, and hands that down to all that it starts.
# Some tests press it.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Processes that test side by side (pytest -n) tell their shared memory apart by its name.
SHARED_MEMORY_PREFIX = "psm_" + os.environ.get("PYTEST_XDIST_WORKER", "")
multiprocessing.shared_memory._SHM_NAME_PREFIX = "/" + SHARED_MEMORY_PREFIX

VOCAB = 127  # odd, and divisible by no number of ranks
MAX_LEN = 1024
VISION = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    head_dim=8,
    image_size=28,
    patch_size=14,
)
QWEN3, QWEN2 = "Qwen3ForCausalLM", "Qwen2ForCausalLM"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """These models are so small that a second thread costs more than it brings, far more on busy
    cores.
    """
    torch.set_num_threads(1)


# --- checkpoints and their reference --------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A directory in Hugging Face format and the `transformers` model that was saved to it, in
    float32.
    """

    path: str
    model: PreTrainedModel

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """`[len(token_ids), vocab]` float32: what a plain forward pass says after each token."""
        return self.model(torch.tensor([token_ids], device=self.model.device)).logits[0].float()

    def complete(
        self,
        prompts: list[list[int]],
        num_tokens: int,
        min_margin: float = 1e-4,
        eos: int | None = None,
    ) -> list[list[int]]:
        """Greedy completions by `transformers.generate`.

        Raises:
            AssertionError: when they prove nothing: a choice is so close that rounding could turn
                it, or the completions are all alike. Another seed for the weights or prompts then
                helps.
        """
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor(
            [[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device
        )
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        completions = [
            tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
            for tokens in out.sequences[:, width:].tolist()
        ]
        best, second = torch.stack(out.logits, dim=1).float().topk(2).values.unbind(-1)
        for row, completion in enumerate(completions):
            margin = (best - second)[row, : len(completion)].min().item()
            assert margin > min_margin, (
                f"prompt {row} of the reference has a choice with margin {margin}"
            )
        if num_tokens > 4:
            assert len({tuple(c) for c in completions}) > len({tuple(p) for p in prompts}) / 2
            distinct = sum(len(set(c)) for c in completions) / sum(map(len, completions))
            assert distinct > 0.3, f"only {distinct:.0%} of the reference's tokens are distinct"
        return completions


def make_checkpoint(
    path: Path,
    architecture: str = QWEN3,
    seed: int = 0,
    std: float = 0.3,
    save: bool = True,
    around: dict[str, Any] | None = None,
    **overrides: Any,
) -> Checkpoint:
    """A small model with large random weights, so that its greedy completions vary.

    architecture: any causal language model of `transformers`, or one with a small image encoder
        around it.
    around: overrides of the configuration around the text model's, which holds the latter.
    overrides: of its configuration.
    All weights can be written in bfloat16, so that a checkpoint means the same in every dtype.
    """
    options: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    if architecture == QWEN3:
        options["head_dim"] = 16
    if architecture.startswith("Gemma2"):
        # Some versions of transformers take SDPA, which leaves out the soft-cap of the scores.
        options["attn_implementation"] = "eager"
    options.update(overrides)
    model_class = getattr(transformers, architecture)
    if architecture.endswith("ForConditionalGeneration"):
        tied = options["tie_word_embeddings"]
        options = dict(text_config=options, vision_config=VISION, tie_word_embeddings=tied)
        options.update(around or {})
    config = model_class.config_class(**options)
    if getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"  # transformers 4 would leave out the cap
    model: PreTrainedModel = model_class(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            param.copy_(
                (1 + 0.2 * noise if name.endswith("norm.weight") else std * noise).bfloat16()
            )
    model = model.eval().requires_grad_(False)
    if save:
        model.save_pretrained(path)
    return Checkpoint(str(path), model)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The one that tests take when any will do: Qwen3, 2 query heads a KV head, untied."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def random_prompts(seed: int, lengths: list[int], vocab: int = VOCAB) -> list[list[int]]:
    r = random.Random(seed)
    return [[r.randrange(vocab) for _ in range(length)] for length in lengths]


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    contents = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {
        key: value for key, value in contents.items() if value is not None or key not in changes
    }
    file.write_text(json.dumps(kept), encoding="utf-8")


# --- engines --------------------------------------------------------------------------------------


def engine_options(**options: Any) -> dict[str, Any]:
    """Options of an engine on the CPU; its cache is 8 x 256 tokens in blocks of 16, if `options`
    say nothing else.
    """
    defaults: dict[str, Any] = dict(
        device="cpu", max_model_len=256, kvcache_block_size=16, max_num_seqs=64
    )
    options = {**defaults, **options}
    blocks_per_seq = -(-options["max_model_len"] // options["kvcache_block_size"])
    options.setdefault("num_kvcache_blocks", 8 * blocks_per_seq)
    return options


def make_llm(path: str, depth: int | None = None, **options: Any) -> LLM:
    """An engine with these `engine_options`.

    `depth` is how many steps are launched before the tokens of the oldest are read; None leaves
    the device's own.
    """
    llm = LLM(path, **engine_options(**options))
    if depth is not None:
        llm._max_pending = depth
    return llm


def greedy(max_tokens: int, ignore_eos: bool = True) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos)


def generate_ids(
    llm: LLM, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
) -> list[list[int]]:
    """Completions as token ids; the engine must be idle, its cache free, before and after."""
    assert_idle(llm)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [output["token_ids"] for output in outputs]


def assert_idle(engine: LLM | Scheduler) -> None:
    """Nothing queued or under way, and every block and row free."""
    scheduler = engine if isinstance(engine, Scheduler) else engine.scheduler
    if engine is not scheduler:
        assert engine.is_finished() and not engine._pending
    assert scheduler.is_finished() and not scheduler.waiting and not scheduler.running
    assert scheduler.num_pending == 0
    assert sorted(scheduler.free_rows) == list(range(scheduler.max_num_seqs))
    manager = scheduler.block_manager
    assert sorted(manager.free_block_ids) == list(range(len(manager.blocks)))
    assert all(block.ref_count == 0 for block in manager.blocks)


def check_step_loop(
    llm: LLM, prompts: list[list[int]], expected: list[list[int]], max_tokens: list[int]
) -> None:
    """Drive an idle engine with add_request and step: right tokens, and num_tokens with the right
    signs.

    All prompts fit one prefill step; `max_tokens` ascends.
    """
    assert llm.is_finished() and llm.step() == ([], 0)
    ids = [
        llm.add_request(prompt, greedy(n)) for prompt, n in zip(prompts, max_tokens, strict=True)
    ]
    assert len(set(ids)) == len(ids) and not llm.is_finished()
    results: dict[int, dict[str, Any]] = {}
    counts: list[int] = []
    while not llm.is_finished():
        outputs, num_tokens = llm.step()
        results.update(outputs)
        counts.append(num_tokens)
    assert [results[i]["token_ids"] for i in ids] == [
        t[:n] for t, n in zip(expected, max_tokens, strict=True)
    ]
    # One prefill step, then a decode step for each token after the first of those that still run:
    # ends by max_tokens are foreseen, so steps launched ahead make no difference.
    decode = [-sum(n > step for n in max_tokens) for step in range(1, max_tokens[-1])]
    assert counts == [sum(map(len, prompts[: len(max_tokens)]))] + decode
    assert llm.step() == ([], 0)
    assert_idle(llm)


@pytest.fixture
def record_hits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[int]]]:
    """A function that returns, and forgets, the cached tokens of each admission, in order."""
    hits: list[int] = []
    allocate = BlockManager.allocate
    fork = SharedTails.fork

    def recording(self: BlockManager, seq: Sequence) -> None:
        allocate(self, seq)
        hits.append(seq.num_cached_tokens)

    def recording_fork(self: SharedTails, parent: Sequence, child: Sequence) -> None:
        fork(self, parent, child)
        hits.append(child.num_cached_tokens)

    def take() -> list[int]:
        taken, hits[:] = list(hits), []
        return taken

    monkeypatch.setattr(BlockManager, "allocate", recording)
    monkeypatch.setattr(SharedTails, "fork", recording_fork)
    yield take


# --- scheduling without a model -------------------------------------------------------------------


def make_scheduler(num_blocks: int, block_size: int, **options: Any) -> Scheduler:
    """A Scheduler of these options; what is not given does not limit it."""
    defaults = dict(
        max_num_seqs=1000, max_num_batched_tokens=10**6, eos=-1, enable_prefix_caching=True
    )
    config = {
        **defaults,
        **options,
        "num_kvcache_blocks": num_blocks,
        "kvcache_block_size": block_size,
    }
    return Scheduler(SimpleNamespace(**config))  # type: ignore[arg-type]


def make_sequence(token_ids: list[int], max_tokens: int = 8, ignore_eos: bool = True) -> Sequence:
    return Sequence(token_ids, greedy(max_tokens, ignore_eos))
