"""Lines of 10 MB, and a model whose weights are NaN: each line gets its answer or its error."""

import json
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from conftest import engine_options

from nanovllm import DEMO_MODEL, AsyncLLM
from nanovllm.jobs.lines.line import Answer
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_worker import LineWorker
from nanovllm.jobs.sources.readers import open_input

SECONDS = 60
LONG = 10 * 2**20  # bytes


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    with AsyncLLM(DEMO_MODEL, **engine_options()) as llm:
        yield llm


def run(llm: AsyncLLM, path: Path) -> list[Answer]:
    """The answers to the lines of a file, in their order."""
    worker = LineWorker(llm, LineOptions("the-model", defaults={"temperature": 0, "max_tokens": 3}))
    answers: SimpleQueue[Answer] = SimpleQueue()
    lines = list(open_input(str(path)))
    for line in lines:
        worker.submit(line, answers.put)
    found = [answers.get(timeout=SECONDS) for _ in lines]
    worker.close()
    return sorted(found, key=lambda answer: answer.number)


def test_lines_of_10_mb_are_answered_or_errors(llm: AsyncLLM, tmp_path: Path) -> None:
    note = {"prompt": "Hi", "note": "x" * LONG}
    too_long = {"prompt": [1] * (LONG // 3)}  # "1, " each
    lines = [json.dumps(fields) for fields in (note, too_long, {"prompt": "Hi"})]
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join([*lines, '{"prompt": "' + "y" * LONG, lines[-1]]))
    answers = run(llm, path)
    codes = [answer.error for answer in answers]
    assert codes == [None, "context_length_exceeded", None, "invalid_json", None]
    carried, _, alone, broken, again = (json.loads(answer.data) for answer in answers)
    assert carried["note"] == note["note"] and carried["text"] == alone["text"] == again["text"]
    assert len(broken["error"]["message"]) < 1000


def test_all_lines_of_a_model_of_nan_are_errors(llm: AsyncLLM, tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    batch = {"custom_id": "a", "url": "/v1/completions", "body": {"prompt": ["Hi", "Ho"]}}
    path.write_text("\n".join(map(json.dumps, ({"prompt": "Hi"}, chat, batch))))
    assert [answer.error for answer in run(llm, path)] == [None, None, None]
    name = "model.norm.weight"
    hidden_size = llm.config.hf_config.hidden_size
    llm.llm.load_weights({name: torch.full((hidden_size,), torch.nan)})
    answers = run(llm, path)
    assert [answer.error for answer in answers] == ["model_error"] * 3
    assert all(b"NaN" in answer.data for answer in answers)
    assert json.loads(answers[2].data)["response"]["status_code"] == 500
    llm.llm.load_weights({name: torch.ones(hidden_size)})
    assert [answer.error for answer in run(llm, path)] == [None, None, None]
