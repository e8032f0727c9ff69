"""What only a GPU can show of a trace: the times that its CUDA events give, and that they change
nothing.
"""

from pathlib import Path

import pytest
import torch
from conftest import generate_ids, greedy, make_checkpoint, make_llm, random_prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_device_times_are_parts_of_the_wall_time(tmp_path: Path, enforce_eager: bool) -> None:
    checkpoint = make_checkpoint(tmp_path, num_attention_heads=4, head_dim=64)
    llm = make_llm(checkpoint.path, device="cuda", enforce_eager=enforce_eager)
    prompts = random_prompts(0, [5, 100, 33, 64])
    untraced = generate_ids(llm, prompts, greedy(40))
    with llm.trace() as trace:
        assert generate_ids(llm, prompts, greedy(40)) == untraced
    assert [step.kind for step in trace.steps] == ["prefill"] + 39 * ["decode"]
    assert all(step.device_time > 0 for step in trace.steps)
    # One step begins on the device where the one before it ends, and all of them within these calls
    # of `step`.
    total = trace.steps[-1].end - trace.steps[0].start
    assert sum(step.device_time for step in trace.steps) <= 1.01 * total
    llm.exit()
