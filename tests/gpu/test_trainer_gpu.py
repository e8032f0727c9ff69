"""For trainers on a GPU: CUDA graphs outlive new weights, and sleep really frees memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Checkpoint, generate_ids, greedy, make_checkpoint, make_llm, random_prompts
from test_training import changed_names, copies, parameters

from nanovllm import LLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

VOCAB = 1000
PROMPTS = random_prompts(3, [300, 20, 5, 64], VOCAB)
SHAPE: dict[str, Any] = dict(
    std=1 / 16, vocab_size=VOCAB, hidden_size=256, head_dim=64, intermediate_size=512
)
OPTIONS: dict[str, Any] = dict(device="cuda", dtype="bfloat16", max_model_len=1024)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("old"), **SHAPE)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("new"), seed=1, **SHAPE)


def results_of(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], list[list[int]]]:
    """Parameters and tokens of a fresh engine."""
    llm = make_llm(checkpoint.path, **OPTIONS)
    try:
        return copies(llm), generate_ids(llm, PROMPTS, greedy(24))
    finally:
        llm.exit()


@pytest.fixture
def llm(old: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(old.path, **OPTIONS)
    yield llm
    llm.exit()


@pytest.mark.parametrize("source", ["cpu", "cuda", "cuda, side stream"])
def test_new_weights_under_the_same_graphs(llm: LLM, new: Checkpoint, source: str) -> None:
    expected, tokens = results_of(new)
    assert generate_ids(llm, PROMPTS, greedy(24)) != tokens
    runner = llm.model_runner
    assert runner is not None
    graphs = [*runner.decode_graphs.graphs.values(), *runner.prefill_graphs.graphs.values()]
    assert len(graphs) > 10

    def trained(device: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in new.model.state_dict().items():
            yield (
                name,
                tensor.to(device).mul(2).div(2),
            )  # it is freed when the next one is asked for

    if "side" in source:
        with torch.cuda.stream(torch.cuda.Stream()):
            llm.load_weights(trained("cuda"))
    else:
        llm.load_weights(trained(source))
    assert changed_names(llm, expected) == []
    assert generate_ids(llm, PROMPTS, greedy(24)) == tokens
    kept = [*runner.decode_graphs.graphs.values(), *runner.prefill_graphs.graphs.values()]
    assert all(graph is before for graph, before in zip(kept, graphs, strict=True))


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_frees_memory(tmp_path: Path, level: int) -> None:
    shape = dict(SHAPE, vocab_size=200_000)  # embedding and head: 205 MB
    checkpoint = make_checkpoint(tmp_path, **shape)
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    llm = make_llm(checkpoint.path, **OPTIONS, num_kvcache_blocks=32_000)
    expected = generate_ids(llm, PROMPTS, greedy(24))
    weights = copies(llm)
    runner = llm.model_runner
    assert runner is not None
    num_bytes = runner.kv_cache.nbytes + sum(param.nbytes for param in parameters(llm).values())
    assert num_bytes > 700e6
    graphs: list[Any] = []
    for _ in range(3):
        awake, _ = torch.cuda.mem_get_info()
        llm.sleep(level)
        asleep, _ = torch.cuda.mem_get_info()
        print(f"\nfree: {before:,} before, {awake:,} awake, {asleep:,} asleep")
        assert asleep - awake > 0.95 * num_bytes
        llm.wake_up(["weights"])
        llm.wake_up(["kv_cache"])
        if level == 2:
            llm.load_weights(checkpoint.path)
        assert abs(torch.cuda.mem_get_info()[0] - awake) < 0.1 * num_bytes
        assert changed_names(llm, weights) == []
        # Captured again the first time, and kept from then on.
        assert len(runner.decode_graphs.graphs) > 5
        graphs.append(list(runner.decode_graphs.graphs.values()))
        assert generate_ids(llm, PROMPTS, greedy(24)) == expected
    for graph, kept in zip(graphs[0], graphs[2], strict=True):
        assert graph is kept
    llm.exit()
    assert torch.cuda.mem_get_info()[0] > asleep


def test_it_sleeps_on_where_the_memory_is_taken(
    old: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(old.path, **OPTIONS, num_kvcache_blocks=32_000)
    assert llm.model_runner is not None
    num_bytes = llm.model_runner.kv_cache.nbytes
    expected = generate_ids(llm, PROMPTS, greedy(24))
    llm.sleep()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (64 << 20), dtype=torch.uint8, device="cuda")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        llm.wake_up()
    assert llm.is_sleeping()
    del taken
    torch.cuda.empty_cache()
    with monkeypatch.context() as patch:
        patch.setattr(llm.model_runner, "capture_graphs", lambda: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            llm.wake_up()
    assert llm.is_sleeping()
    assert abs(torch.cuda.mem_get_info()[0] - free) < 0.1 * num_bytes  # the weights are awake
    for _ in range(2):
        llm.wake_up()
        assert generate_ids(llm, PROMPTS, greedy(24)) == expected
        llm.sleep()
    llm.exit()  # asleep
    assert torch.cuda.mem_get_info()[0] >= free


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several CUDA GPUs")
def test_two_ranks(old: Checkpoint, new: Checkpoint) -> None:
    options = dict(OPTIONS, tensor_parallel_size=2)
    fresh = make_llm(new.path, **options)
    tokens = generate_ids(fresh, PROMPTS, greedy(24))
    fresh.exit()
    llm = make_llm(old.path, **options)
    llm.load_weights(new.model.state_dict())
    assert generate_ids(llm, PROMPTS, greedy(24)) == tokens
    free = [torch.cuda.mem_get_info(device)[0] for device in (0, 1)]
    llm.sleep(level=2)
    assert all(torch.cuda.mem_get_info(device)[0] > free[device] for device in (0, 1))
    llm.wake_up()
    llm.load_weights({name: tensor.cuda() for name, tensor in new.model.state_dict().items()})
    assert generate_ids(llm, PROMPTS, greedy(24)) == tokens
    llm.exit()
