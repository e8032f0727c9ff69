"""`LineWorker`: each line of a job gets one answer, which is what `LLM` returns for it, and all
that Python does for it is done outside of the engine's thread.
"""

import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import assert_idle, engine_options, greedy

from nanovllm import DEMO_MODEL, AsyncLLM, SamplingParams
from nanovllm.jobs.lines import line_worker
from nanovllm.jobs.lines.line import ENGINE_FAILED, Answer, Line
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_request import LineRequest
from nanovllm.jobs.lines.line_worker import LineWorker

SECONDS = 60
OPTIONS = LineOptions("the-model", defaults={"temperature": 0, "max_tokens": 12})
QUESTION = [{"role": "user", "content": "introduce yourself"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[AsyncLLM]:
    with AsyncLLM(DEMO_MODEL, **engine_options()) as llm:
        yield llm


@pytest.fixture
def worker(llm: AsyncLLM) -> Iterator[LineWorker]:
    worker = LineWorker(llm, OPTIONS)
    yield worker
    worker.close()
    assert not worker._thread.is_alive()
    with llm.llm._lock:
        assert_idle(llm.llm)


def run(worker: LineWorker, lines: list[Any]) -> list[Answer]:
    """The answers, in the order of the lines; each must come once, from the worker's thread."""
    answers: list[Answer] = []
    threads: set[str] = set()

    def done(answer: Answer) -> None:
        threads.add(threading.current_thread().name)
        answers.append(answer)

    for number, fields in enumerate(lines, start=1):
        if isinstance(fields, Line):
            line = fields
        else:
            data = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
            line = Line(number, data)
        worker.submit(line, done)
    end = time.monotonic() + SECONDS
    while len(answers) < len(lines):
        assert time.monotonic() < end
        time.sleep(0.002)
    assert sorted(answer.number for answer in answers) == list(range(1, len(lines) + 1))
    assert threads == {"nanovllm-lines"}
    return sorted(answers, key=lambda answer: answer.number)


def batch(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": {"model": "m", **body}}


def test_answers_are_what_the_engine_returns(worker: LineWorker, llm: AsyncLLM) -> None:
    prompts = ["Hello", "What is a prime number?", "x"]
    want = llm.llm.generate(prompts, greedy(12, ignore_eos=False), use_tqdm=False)
    (chat,) = llm.llm.chat(QUESTION, greedy(12, ignore_eos=False), use_tqdm=False)
    vectors = llm.llm.embed(prompts, use_tqdm=False)
    answers = run(
        worker,
        [
            *[{"prompt": prompt} for prompt in prompts],
            {"messages": QUESTION, "add_generation_prompt": True},
            {"input": prompts[1]},
            batch("/v1/completions", prompt=prompts, max_tokens=12),
            batch("/v1/embeddings", input=prompts),
            batch("/v1/chat/completions", messages=QUESTION, max_tokens=12, logprobs=True),
            {"prompt": "one", "n": 3, "temperature": 1, "seed": 4},
        ],
    )
    assert [answer.error for answer in answers] == [None] * len(answers)
    bodies = [json.loads(answer.data) for answer in answers]
    assert [body["text"] for body in bodies[:3]] == [result.text for result in want]
    assert bodies[3]["text"] == chat.text
    assert bodies[4]["embedding"] == pytest.approx(vectors[1].embedding, abs=1e-5)
    choices = bodies[5]["response"]["body"]["choices"]
    assert [choice["text"] for choice in choices] == [result.text for result in want]
    for entry, vector in zip(bodies[6]["response"]["body"]["data"], vectors, strict=True):
        assert entry["embedding"] == pytest.approx(vector.embedding, abs=1e-5)
    (choice,) = bodies[7]["response"]["body"]["choices"]
    assert choice["message"]["content"] == chat.text
    entries = choice["logprobs"]["content"]
    assert len(entries) == len(chat.token_ids) and all(entry["bytes"] for entry in entries)
    params = SamplingParams(n=3, temperature=1, seed=4, max_tokens=12)
    (sampled,) = llm.llm.generate(["one"], params, use_tqdm=False)
    texts = [completion["text"] for completion in bodies[8]["completions"]]
    assert texts == [completion.text for completion in sampled.outputs]


def test_what_is_wrong_with_a_line_is_its_answer(worker: LineWorker) -> None:
    long = "a b " * 300
    answers = run(
        worker,
        [
            b"nonsense",
            {"prompt": "Hi", "max_tokens": 0},
            {"prompt": long},
            batch("/v1/completions", prompt=["Hi", long]),
            batch("/v1/embeddings", input=["Hi", long]),
            {"messages": [{"role": "user"}]},
            {"messages": [*QUESTION], "max_token": 3},
            {"prompt": "Hi", "structured_outputs": {"json": {"type": "nonsense"}}},
            Line(9, b'{"prompt": "Hi"}', duplicate_of=4),
            {"prompt": "Hi"},
        ],
    )
    assert [answer.error for answer in answers] == [
        "invalid_json",
        "invalid_value",
        "context_length_exceeded",
        "context_length_exceeded",
        "context_length_exceeded",
        "invalid_value",
        None,  # a column of the table, of which nothing is known
        "invalid_value",
        "duplicate_custom_id",
        None,
    ]
    assert b"that of line 4" in answers[8].data


def test_python_does_all_of_it_in_a_thread_of_its_own(
    worker: LineWorker, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: dict[str, set[str]] = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            threads.setdefault(name, set()).add(threading.current_thread().name)
            return function(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(llm.llm._inputs, "_encode")
    watch(llm.llm._inputs, "make_sequences")
    for name in ("parse_line", "answer", "error_answer"):
        watch(line_worker, name)
    watch(llm.llm.model_runner, "launch")
    run(worker, [{"prompt": "Hi"}, {"messages": QUESTION}, {"input": "x"}, {}])
    assert threads.pop("launch") == {"nanovllm-engine"}
    assert len(threads) == 5
    assert all(names == {"nanovllm-lines"} for names in threads.values())


def test_a_callback_that_fails_ends_nothing(worker: LineWorker) -> None:
    def fail(answer: Answer) -> None:
        raise ValueError("of the callback")

    for data in (b'{"prompt": "Hi"}', b"nonsense"):
        worker.submit(Line(1, data), fail)
    assert run(worker, [{"prompt": "Hi"}])[0].error is None


def test_a_failed_step_is_not_the_fault_of_a_line(
    worker: LineWorker, llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"prompt": "Hi"}, {"input": "Hi"}, {}, batch("/v1/completions", prompt=["a", "b"])]
    monkeypatch.setattr(llm.llm.model_runner, "launch", lambda step: 1 / 0)
    answers = run(worker, lines)
    codes = [ENGINE_FAILED, ENGINE_FAILED, "missing_required_parameter", ENGINE_FAILED]
    assert [answer.error for answer in answers] == codes
    assert b"ZeroDivisionError" in answers[0].data and llm.failure is None
    monkeypatch.undo()
    assert [answer.error is None for answer in run(worker, lines)] == [True, True, False, True]


class Panic(BaseException):
    """What the bindings of a library in Rust raise when it panics is no Exception."""


def test_a_panic_is_an_error_of_its_line(
    worker: LineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = worker._submit

    def panic(request: LineRequest) -> list[Any]:
        if request.number == 2:
            raise Panic("index out of bounds")
        return submit(request)

    monkeypatch.setattr(worker, "_submit", panic)
    answers = run(worker, [{"prompt": "a"}] * 3)
    assert [answer.error for answer in answers] == [None, "server_error", None]
    assert b"index out of bounds" in answers[1].data


def test_an_engine_survives_a_panic_in_a_step(
    llm: AsyncLLM, worker: LineWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic() -> None:
        raise Panic("index out of bounds")

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm.scheduler, "schedule", panic)
        (failed,) = run(worker, [{"prompt": "a"}])
    assert failed.error == ENGINE_FAILED and b"index out of bounds" in failed.data
    (answer,) = run(worker, [{"prompt": "a"}])
    assert answer.error is None and llm.failure is None


def test_an_engine_that_ends_leaves_no_line_without_answer() -> None:
    llm = AsyncLLM(DEMO_MODEL, **engine_options())
    worker = LineWorker(llm, OPTIONS)
    answers: list[Answer] = []
    slow = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True}
    for number in range(1, 21):
        worker.submit(Line(number, json.dumps(slow).encode()), answers.append)
        if number == 10:
            while not llm.llm.scheduler.running:
                time.sleep(0.001)
            llm.llm.exit()
    worker.submit(Line(21, b"nonsense"), answers.append)
    llm.close()
    worker.close()
    by_number = {answer.number: answer.error for answer in answers}
    assert len(answers) == len(by_number) == 21 and by_number.pop(21) == "invalid_json"
    assert set(by_number.values()) == {ENGINE_FAILED}


@pytest.mark.parametrize("seed", range(2))
def test_many_lines_in_any_order(worker: LineWorker, llm: AsyncLLM, seed: int) -> None:
    r = random.Random(seed)
    words = [f"{r.choice('abcdef')} {r.randrange(99)}" for _ in range(12)]
    lines = [
        {"prompt": r.choice(words), "max_tokens": r.randint(1, 9), "ignore_eos": True}
        if r.random() < 0.8
        else {"prompt": ""}
        for _ in range(60)
    ]
    answers = run(worker, lines)
    good = [line for line in lines if line["prompt"]]
    params = [greedy(int(str(line["max_tokens"]))) for line in good]
    prompts = [str(line["prompt"]) for line in good]
    texts = [result.text for result in llm.llm.generate(prompts, params, use_tqdm=False)]
    for line, answer in zip(lines, answers, strict=True):
        body = json.loads(answer.data)
        if line["prompt"]:
            assert body["text"] == texts.pop(0)
            assert answer.completion_tokens == line["max_tokens"]
        else:
            assert answer.error == "invalid_value" and body["line"] == answer.number
