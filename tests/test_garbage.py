"""The garbage collector runs rarely while `generate` does, and as usual afterwards."""

import gc
import threading
from collections.abc import Iterator

import pytest
from conftest import Checkpoint, greedy, make_llm, random_prompts

from nanovllm.garbage import RARE_THRESHOLD, rare_collections


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(701, 11, 12)
    yield (701, 11, 12)
    assert gc.get_threshold() == (701, 11, 12)
    gc.set_threshold(*before)


def test_generate_collects_rarely_and_leaves_no_garbage(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, 1)
    thresholds = []
    launch = llm.model_runner.launch  # type: ignore[union-attr]

    def observed(step):
        thresholds.append(gc.get_threshold()[0])
        return launch(step)

    llm.model_runner.launch = observed  # type: ignore
    prompts = random_prompts(0, [5] * 30)
    try:
        llm.generate(prompts, greedy(3), use_tqdm=False)
        assert {*thresholds} == {RARE_THRESHOLD}
        with pytest.raises(TypeError):
            llm.generate([prompts], greedy(3), use_tqdm=False)  # type: ignore[list-item]
        gc.collect()
        with rare_collections():
            outputs = llm.generate(prompts, greedy(20), use_tqdm=False)
            assert gc.collect() == 0  # nothing that only the collector could have freed
        assert len(outputs) == 30
    finally:
        llm.exit()


def test_the_last_thread_restores_it(usual: tuple[int, int, int]) -> None:
    is_inside = threading.Event()
    may_end = threading.Event()

    def other() -> None:
        with rare_collections():
            is_inside.set()
            may_end.wait(10)

    thread = threading.Thread(target=other)
    with rare_collections():
        thread.start()
        assert is_inside.wait(10)
    assert gc.get_threshold() == (RARE_THRESHOLD, 11, 12)
    may_end.set()
    thread.join()
    assert gc.get_threshold() == usual


def test_a_user_who_has_turned_it_off_or_down_is_left_alone() -> None:
    for threshold in (0, RARE_THRESHOLD + 1):
        gc.set_threshold(threshold, 11, 12)
        with rare_collections():
            assert gc.get_threshold()[0] == threshold
        assert gc.get_threshold()[0] == threshold
    gc.set_threshold(701, 11, 12)
