"""The examples, on a smaller scale than their readers run them."""

import asyncio
import csv
import json
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import numpy as np
import pytest
from pyarrow import parquet

from examples import embed_to_parquet, grpo_countdown, label_csv, qa_pairs
from examples.grpo_countdown import END, reward_of
from examples.label_csv import Labels
from nanovllm import DEMO_MODEL, LLM

EXAMPLES = Path(label_csv.__file__).parent


def test_grpo_learns_and_its_two_models_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rollouts' log-probabilities are the trainer's, after each update of the weights."""
    picture = tmp_path / "reward.png"
    arguments = ["--steps", "25", "--answers", "16", "--plot", str(picture)]
    history = grpo_countdown.main(arguments)
    assert len(history["reward"]) == len(history["difference"]) == 25
    assert max(history["difference"]) < 1e-4
    assert mean(history["reward"][-5:]) > 3 * mean(history["reward"][:5])
    assert "step  24: reward 0." in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_reward_of_grpo() -> None:
    question = [11, 3]
    assert reward_of(question, [2, 1, 0, END]) == 1
    assert reward_of(question, [2, 1, 1, END]) == reward_of(question, [2, 1]) == 0.5
    assert reward_of(question, [1, 0, END]) == reward_of(question, [END]) == 0


# --- jobs -----------------------------------------------------------------------------------------


def test_labels_fit_the_schema_and_a_bad_row_says_so(tmp_path: Path) -> None:
    source = tmp_path / "messages.csv"
    target = tmp_path / "labels.csv"
    texts = {str(number): f"Please hurry: lamp {number} leaks." for number in range(1, 5)}
    texts["5"] = "very " * 5000
    bad = ["6,one,more", "7"]  # too many fields, too few
    source.write_text("\n".join(["id,text", *map(",".join, texts.items()), *bad]))
    asyncio.run(label_csv.main(str(source), str(target), DEMO_MODEL))
    with target.open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert list(rows["1"]) == ["id", "text", *Labels.model_fields, "error"]
    assert sorted(rows) == ["1", "2", "3", "4", "5", "6", "7"]
    for row_id, text in texts.items():
        assert rows[row_id]["text"] == text
    for row_id in "1234":
        Labels.model_validate({name: rows[row_id][name] for name in Labels.model_fields})
        assert not rows[row_id]["error"]
    assert "max_model_len" in rows["5"]["error"] and not rows["5"]["topic"]
    assert "more" in rows["6"]["error"]


def test_the_messages_to_label_are_a_csv_file() -> None:
    with (EXAMPLES / "data" / "messages.csv").open(newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert len(rows) == 12 and all(list(row) == ["id", "text"] and row["text"] for row in rows)


def test_pairs_are_made_of_passages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "passages.txt"
    target = tmp_path / "pairs.jsonl"
    passages = ["What is a KV cache?", "What is paged attention?"]
    source.write_text("\n\n".join([*passages, "", "too long " * 2000]))
    qa_pairs.main(str(source), str(target), DEMO_MODEL)
    pairs = [json.loads(line) for line in target.read_text().splitlines()]
    shown = capsys.readouterr()
    assert "left out, since it is too long: 'too long too long" in shown.err
    assert shown.out.startswith("2 passages, ") and shown.out.endswith(f", {len(pairs)} answers\n")
    assert {pair["passage"] for pair in pairs} == set(passages)
    for pair in pairs:
        assert [message["role"] for message in pair["messages"]] == ["user", "assistant"]
        assert all(message["content"] for message in pair["messages"])
    questions = [(pair["passage"], pair["messages"][0]["content"]) for pair in pairs]
    assert len(questions) == len(set(questions)) >= 2


def test_thoughts_and_answers_that_were_cut_off_are_left_out() -> None:
    """Of the answers to a prompt; and what remains twice is there once."""
    texts = ["<think>Hm.</think>\n\nYes.", "Yes.", "No"]
    reasons = ["stop", "stop", "length"]
    answers = [
        SimpleNamespace(text=text, finish_reason=reason)
        for text, reason in zip(texts, reasons, strict=True)
    ]
    outputs = [SimpleNamespace(outputs=answers)] * 2
    llm = SimpleNamespace(chat=lambda chats, params: outputs)
    assert qa_pairs.ask(llm, ["one", "two"], qa_pairs.QUESTIONS) == [["Yes."], ["Yes."]]


def test_embeddings_are_written_as_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In row groups, each row with the vector of its text or with an error."""
    monkeypatch.setattr(embed_to_parquet, "ROWS", 4)
    texts = ["What is a KV cache?", "Hello", "list all prime numbers within 100"] * 3
    source = tmp_path / "texts.jsonl"
    target = tmp_path / "vectors.parquet"
    bad = ['{"text": null}', "{", "[]", json.dumps({"text": "long " * 5000})]
    source.write_text("\n".join([*(json.dumps({"text": text}) for text in texts), *bad]))
    embed_to_parquet.main(str(source), str(target), DEMO_MODEL)
    file = parquet.ParquetFile(target)
    assert file.num_row_groups == 4
    rows = {row["line"]: row for row in file.read().to_pylist()}
    assert sorted(rows) == list(range(1, len(texts) + len(bad) + 1))
    llm = LLM(DEMO_MODEL)
    expected = llm.embed(texts, use_tqdm=False)
    llm.exit()
    for number, (text, output) in enumerate(zip(texts, expected, strict=True), start=1):
        row = rows[number]
        assert row["text"] == text and row["error"] is None
        assert np.allclose(row["embedding"], output["embedding"], atol=1e-5)
    for number in range(len(texts) + 1, len(rows) + 1):
        assert rows[number]["embedding"] is None and rows[number]["error"], rows[number]
    assert rows[len(rows)]["error"] == "context_length_exceeded"
