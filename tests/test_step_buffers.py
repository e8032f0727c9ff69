"""The buffers of the steps that CUDA graphs run, and the arrays that prefills are arranged in."""

from typing import Any

import numpy as np
import torch
from conftest import Checkpoint, make_llm
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.prefill_batch import PrefillBatch
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_buffers import SEQUENCE, TOKEN, InputArray, StepBuffers
from nanovllm.kernels.attention_backend import FLASH_ATTN, PrefillPlan

ARRAYS = {
    "ids": InputArray(TOKEN, np.int64),
    "rows": InputArray(SEQUENCE, np.int64, padding=9),
    "slots": InputArray(TOKEN, np.int32, padding=-1),
    "pairs": InputArray(TOKEN, np.int32, columns=2),
    "temperatures": InputArray(SEQUENCE, np.float32),
}


def make_buffers(blocks_per_seq: int = 6) -> StepBuffers:
    return StepBuffers(ARRAYS, {TOKEN: 12, SEQUENCE: 5}, blocks_per_seq, torch.device("cpu"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 10), st.integers(1, 4), st.integers(1, 6)), min_size=1))
def test_what_is_uploaded_is_there_with_padding(steps: list[tuple[int, int, int]]) -> None:
    """Whatever larger steps have left behind it."""
    buffers = make_buffers()
    for index, (num_tokens, num_seqs, columns) in enumerate(steps):
        inputs: dict[str, Any] = {
            "ids": np.arange(num_tokens) + index,
            "rows": np.arange(num_seqs),
            "slots": np.arange(num_tokens) + 2 * index,
            "pairs": np.arange(2 * num_tokens).reshape(-1, 2),
            "temperatures": np.full(num_seqs, 0.5),
        }
        tables = np.arange(columns * num_seqs).reshape(columns, num_seqs) + index
        num_rows = {TOKEN: num_tokens + 2, SEQUENCE: num_seqs + 1}
        buffers.upload(inputs, tables, num_rows)
        arrays = buffers.on_device(num_rows)
        for name, values in inputs.items():
            array = ARRAYS[name]
            assert len(arrays[name]) == num_rows[array.row]
            assert np.array_equal(arrays[name][: len(values)], values)
            assert (arrays[name][len(values) :] == array.padding).all()
        assert arrays["block_tables"].shape == (num_seqs + 1, 6)
        assert np.array_equal(arrays["block_tables"][:num_seqs, :columns], tables.T)
        assert not arrays["block_tables"][num_seqs:, :columns].any()


def test_what_is_not_yet_uploaded_is_padding() -> None:
    arrays = make_buffers().on_device({TOKEN: 12, SEQUENCE: 5})
    for name, array in ARRAYS.items():
        assert (arrays[name] == array.padding).all()


def test_the_columns_in_use_lie_in_one_piece() -> None:
    """An upload ends with them, so that it takes no longer where longer sequences are allowed."""
    ends = []
    for blocks_per_seq in (6, 5000):
        buffers = make_buffers(blocks_per_seq)
        tables = np.full((3, 4), 77)
        buffers.upload({}, tables, {TOKEN: 2, SEQUENCE: 4})
        memory = buffers._device_memory.view(torch.int32)
        ends.append(int(memory.nonzero().max()))
        assert int((memory == 77).sum()) == tables.size
    assert ends[0] == ends[1]


def test_the_example_of_step_inputs() -> None:
    """The one in the docstring of `StepInputs`."""
    a = Sequence([10, 11, 12, 13, 14], SamplingParams(temperature=0.5), seed=2**63 - 1)
    b = Sequence([20, 21], SamplingParams(temperature=0), seed=3)
    for row, (seq, blocks, earlier) in enumerate([(a, [7, 1], 2), (b, [5], 0)]):
        seq.row = row + 4
        seq.block_table = blocks
        seq.num_computed_tokens = earlier
        assert seq.schedule(len(seq.token_ids) - earlier)
    batch = PrefillBatch.of([a, b], block_size=4)
    expected: dict[str, list[Any]] = {
        "table_rows": [4, 5],
        "num_new": [3, 2],
        "num_total": [5, 2],
        "temperatures": [0.5, 0.0],
        "seeds": [2**63 - 1, 3],
        "block_tables": [[7, 5], [1, -1]],
        "input_ids": [12, 13, 14, 20, 21],
        "positions": [2, 3, 4, 0, 1],
        "slots": [30, 31, 4, 20, 21],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected


def test_block_tables_of_one_column_have_the_usual_strides(checkpoint: Checkpoint) -> None:
    """One column is contiguous to PyTorch and NumPy, whatever its strides; not to flash_attn."""
    buffers = make_buffers(blocks_per_seq=1)
    arrays = buffers.on_device({TOKEN: 2, SEQUENCE: 5})
    plan = FLASH_ATTN.plan_decode(arrays["rows"], arrays["block_tables"])
    assert plan.block_tables.shape == (5, 1)
    assert plan.block_tables.stride(1) == 1

    seqs = []
    for row in range(3):  # each computes the second half of a prompt that fits a block
        seq = Sequence([1, 2, 3, 4], SamplingParams(), seed=row)
        seq.row = row
        seq.block_table = [row]
        seq.num_computed_tokens = 2
        seq.schedule(2)
        seqs.append(seq)
    llm = make_llm(checkpoint.path)
    try:
        attention = llm.model_runner.prepare_prefill(seqs).attention  # type: ignore[union-attr]
        assert isinstance(attention, PrefillPlan) and attention.block_tables is not None
        assert attention.block_tables.tolist() == [[0], [1], [2]]
        assert attention.block_tables.stride(1) == 1
    finally:
        llm.exit()
