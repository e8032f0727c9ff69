"""What a request can ask for beyond temperature: how it ends, what is returned, how it is handed
over.
"""

import codecs
import dataclasses
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    Checkpoint,
    assert_idle,
    edit_json,
    generate_ids,
    greedy,
    make_checkpoint,
    make_llm,
    make_scheduler,
    random_prompts,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.engine.graphs import StepGraph, StepOutput
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import TokenLogprobs
from nanovllm.text.detokenizer import Detokenizer

TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODEL)
QUESTION = "introduce yourself"
PROMPTS = random_prompts(0, [20, 3, 33, 16, 50, 9])


@pytest.fixture(scope="module")
def demo() -> Iterator[LLM]:
    llm = make_llm(DEMO_MODEL)
    yield llm
    assert_idle(llm)
    llm.exit()


@pytest.fixture(scope="module")
def llm(checkpoint: Checkpoint) -> Iterator[LLM]:
    llm = make_llm(checkpoint.path)
    yield llm
    assert_idle(llm)
    llm.exit()


@pytest.fixture(params=[0, 1], ids=["depth-0", "depth-1"])
def deep(request: pytest.FixtureRequest, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """The shared engine, reading tokens at once or, as on a GPU, one step late."""
    monkeypatch.setattr(llm, "_max_pending", request.param)
    return llm


# --- from tokens to text --------------------------------------------------------------------------

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]


def byte_token(byte: int) -> int:
    """The token of one byte, by the table that byte-level BPE uses."""
    char = chr(byte) if byte in PRINTABLE else chr(256 + OTHERS.index(byte))
    return TOKENIZER.convert_tokens_to_ids(char)


def bytes_of(token_ids: list[int]) -> list[bytes]:
    """What each token adds, all being of the vocabulary's ordinary ones."""
    table = {byte_token(byte): bytes([byte]) for byte in range(256)}
    return [table[i] if i in table else TOKENIZER.decode([i]).encode() for i in token_ids]


def run_sequence(token_ids: list[int], params: SamplingParams) -> tuple[Sequence, list[str]]:
    """A sequence that is given these tokens until one ends it, and the pieces of text that a reader
    gets.
    """
    seq = Sequence([1], params)
    seq.detokenizer = Detokenizer(TOKENIZER, params)
    seq.max_tokens = len(token_ids)
    pieces = []
    for token_id in token_ids:
        is_last = seq.append(token_id)
        pieces.append(seq.detokenizer.take(is_last))
        if is_last:
            break
    assert seq.is_finished
    return seq, pieces


def expected_end(token_ids: list[int], params: SamplingParams) -> tuple[str, int, str | None]:
    """Text, number of tokens and stop string, by looking at all the text after every token."""
    parts = bytes_of(token_ids)
    texts = [b"".join(parts[:k]).decode(errors="ignore") for k in range(len(parts) + 1)]
    for k in range(params.min_tokens + 1, len(parts) + 1):
        matches = [
            (end, number)
            for end in range(len(texts[k - 1]) + 1, len(texts[k]) + 1)
            for number, stop in enumerate(params.stop or ())
            if texts[k][:end].endswith(stop)
        ]
        if matches:
            end, number = min(matches)
            stop = params.stop[number]  # type: ignore[index]
            return (
                texts[k][: end if params.include_stop_str_in_output else end - len(stop)],
                k,
                stop,
            )
    return texts[-1], len(parts), None


@st.composite
def texts_and_stops(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    """Text of few characters, of one to four bytes, in tokens of parts of a character to several
    characters.
    """
    text = draw(st.text("ab é€😀", min_size=1, max_size=12))
    data, token_ids = text.encode(), []
    while data:
        size = draw(st.integers(1, 5))
        piece, data = data[:size], data[size:]
        try:
            token_ids += TOKENIZER.encode(piece.decode())
        except UnicodeDecodeError:
            token_ids += [byte_token(byte) for byte in piece]
    substrings = st.builds(
        lambda i, k: text[i : i + k], st.integers(0, len(text) - 1), st.integers(1, 5)
    )
    stop = draw(st.lists(st.one_of(substrings, st.sampled_from(["aab", "é€", "b "])), max_size=3))
    min_tokens = draw(st.integers(0, min(4, len(token_ids))))
    include = draw(st.booleans())
    return token_ids, SamplingParams(
        stop=stop, min_tokens=min_tokens, include_stop_str_in_output=include
    )


@settings(max_examples=700, deadline=None, derandomize=True)
@given(texts_and_stops())
def test_stop_strings_cut_the_text_where_they_begin(case: tuple[list[int], SamplingParams]) -> None:
    token_ids, params = case
    seq, pieces = run_sequence(token_ids, params)
    text, num_tokens, stop = expected_end(token_ids, params)
    assert seq.detokenizer.text == text == "".join(pieces)  # type: ignore[union-attr]
    assert seq.completion_token_ids == token_ids[:num_tokens]
    assert (seq.finish_reason, seq.stop_reason) == ("length" if stop is None else "stop", stop)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=12), st.booleans())
def test_text_that_is_decoded_token_by_token_is_the_whole_decoded(
    token_ids: list[int], skip: bool
) -> None:
    """Special tokens and broken characters included; one that the end cuts off is left out."""
    _, pieces = run_sequence(token_ids, SamplingParams(skip_special_tokens=skip))
    shown = [i for i in token_ids if not (skip and i in TOKENIZER.all_special_ids)]
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    assert "".join(pieces) == utf8.decode(b"".join(bytes_of(shown)))


SCRIPT = "One, two; naïve 😀!three"


def scripted(monkeypatch: pytest.MonkeyPatch, token_ids: list[int]) -> None:
    """Whatever the model draws, every completion consists of these tokens, over and over."""
    postprocess = Scheduler.postprocess

    def replaced(self: Scheduler, step: Any, drawn: list[int], *rest: Any) -> list[Sequence]:
        drawn = [token_ids[len(seq.completion_token_ids) % len(token_ids)] for seq in step.seqs]
        return postprocess(self, step, drawn, *rest)

    monkeypatch.setattr(Scheduler, "postprocess", replaced)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(
    "stop, text, found",
    [
        (["ne,"], "O", "ne,"),  # spans tokens
        (
            ["ïve 😀"],
            "One, two; na",
            "ïve 😀",
        ),  # begins inside a character of two tokens, ends in one of four
        (["😀!t"], "One, two; naïve ", "😀!t"),
        (["three", "two", "ve"], "One, ", "two"),
        (["vanished", "Tell"], SCRIPT, None),  # the second one is in the prompt
        ("!", "One, two; naïve 😀", "!"),
    ],
)
def test_stop_strings_through_the_engine(
    demo: LLM,
    stop: list[str],
    text: str,
    found: str | None,
    depth: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "_max_pending", depth)
    token_ids = [
        byte_token(byte) for byte in SCRIPT.encode()
    ]  # a token for each byte: everything spans tokens
    scripted(monkeypatch, token_ids)
    params = SamplingParams(stop=stop, max_tokens=len(token_ids), ignore_eos=True)
    plain = dataclasses.replace(params, stop=None)
    included = dataclasses.replace(params, include_stop_str_in_output=True)
    outputs = demo.generate(["Tell me"] * 3, [params, plain, included], use_tqdm=False)
    assert_idle(demo)
    whole = text + (found or "")
    assert [output["text"] for output in outputs] == [text, SCRIPT, whole]
    assert outputs[0]["token_ids"] == outputs[2]["token_ids"] == token_ids[: len(whole.encode())]
    assert (
        outputs[0]["finish_reason"] == ("stop" if found else "length")
        and outputs[0]["stop_reason"] == found
    )
    # A reader never sees a part of the stop string, and all the rest.
    parts = list(demo.stream(["Tell me"], params))
    assert "".join(part["text"] for part in parts) == text
    assert [token for part in parts for token in part["token_ids"]] == outputs[0]["token_ids"]
    seen = ""
    for part in parts[:-1]:
        seen += part["text"]
        assert text.startswith(seen) and part["finish_reason"] is None
    assert parts[-1]["stop_reason"] == found


# --- end of sequence, min_tokens, stop_token_ids --------------------------------------------------


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> list[list[int]]:
    return checkpoint.complete(PROMPTS, 20)


def first_new(tokens: list[int], start: int) -> int:
    """Index of the first token from `start` on that has not occurred before."""
    return next(i for i in range(start, len(tokens)) if tokens[i] not in tokens[:i])


def test_stop_token_ids(deep: LLM, plain: list[list[int]]) -> None:
    end = first_new(plain[0], 5)
    stop_id = plain[0][end]
    params = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[stop_id, 126]
    )
    output = deep.generate([PROMPTS[0]], params, use_tqdm=False)[0]
    assert output["token_ids"] == plain[0][: end + 1]
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop_id)


def test_the_token_that_ends_it_is_not_in_the_text(
    demo: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = (byte_token(ord(char)) for char in "ab")
    scripted(monkeypatch, [a, a, b, 2])
    for params, text, count, reason in [
        (SamplingParams(stop_token_ids=[b]), "aa", 3, b),
        (SamplingParams(stop_token_ids=[b], include_stop_str_in_output=True), "aab", 3, b),
        (SamplingParams(skip_special_tokens=False), "aab", 4, None),
        (
            SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True),
            "aab<|im_end|>",
            4,
            None,
        ),
        (SamplingParams(stop=["x"], stop_token_ids=[2]), "aab", 4, None),
    ]:
        output = demo.generate(["q"], params, use_tqdm=False)[0]
        assert (output["text"], len(output["token_ids"]), output["stop_reason"]) == (
            text,
            count,
            reason,
        )
        assert output["finish_reason"] == "stop"
        assert "".join(part["text"] for part in demo.stream("q", params)) == text


@pytest.mark.parametrize("depth", [0, 1])
def test_min_tokens_hold_off_every_end(
    checkpoint: Checkpoint, plain: list[list[int]], depth: int
) -> None:
    """Until then, the ids that would end it are not drawn at all; the next best ones are."""
    end = first_new(plain[0], 3)
    eos, forbidden = plain[0][end], {plain[0][end], plain[0][0]}
    tokens: list[int] = []
    while len(tokens) < 12 or tokens[-1] not in forbidden:
        logits = checkpoint.logits(PROMPTS[0] + tokens)[-1].clone()
        if len(tokens) < 12:
            logits[list(forbidden)] = -torch.inf
        tokens.append(int(logits.argmax()))
        if len(tokens) == 40:
            break
    small = dict(kvcache_block_size=4, max_model_len=100, num_kvcache_blocks=25)
    for options in ({}, small):
        llm = make_llm(checkpoint.path, depth, eos=eos, **options)
        params = SamplingParams(
            temperature=0, max_tokens=40, min_tokens=12, stop_token_ids=list(forbidden - {eos})
        )
        assert generate_ids(llm, [PROMPTS[0]], params) == [tokens]
        outputs = generate_ids(llm, PROMPTS, [params, *[greedy(20)] * 5])
        assert outputs[0] == tokens and outputs[1:] == plain[1:]
        assert (options == small) == (llm.scheduler.counters["preemptions"] > 0)
        llm.exit()


def test_the_token_after_min_tokens_may_end_it(deep: LLM, plain: list[list[int]]) -> None:
    end = first_new(plain[0], 5)
    for min_tokens in (end - 1, end, end + 1):
        stops = [plain[0][end]]
        params = SamplingParams(
            temperature=0, max_tokens=20, min_tokens=min_tokens, stop_token_ids=stops
        )
        (tokens,) = generate_ids(deep, PROMPTS[:1], params)
        assert (tokens == plain[0][: end + 1]) == (min_tokens <= end) and len(tokens) > min_tokens


def test_min_tokens_and_stop_strings(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = (byte_token(ord(char)) for char in "ab")
    scripted(monkeypatch, [a, b, a, a, b])
    for min_tokens, count in [(0, 2), (1, 2), (2, 5), (4, 5), (5, 7)]:
        params = SamplingParams(stop="ab", min_tokens=min_tokens, max_tokens=9)
        output = demo.generate("q", params, use_tqdm=False)[0]
        assert len(output["token_ids"]) == count and output["stop_reason"] == "ab"
        assert output["text"] == TOKENIZER.decode(output["token_ids"][:-2])


def with_files(checkpoint: str, path: Path, **generation_config: Any) -> str:
    """A copy of a checkpoint, with this generation_config.json."""
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    (path / "generation_config.json").write_text(json.dumps(generation_config))
    return str(path)


def test_every_end_of_sequence_counts(
    checkpoint: Checkpoint, plain: list[list[int]], tmp_path: Path
) -> None:
    a, b, c = (plain[i][first_new(plain[i], 4)] for i in (0, 1, 2))
    path = with_files(checkpoint.path, tmp_path, eos_token_id=[a, b])
    edit_json(tmp_path / "config.json", eos_token_id=c)
    llm = make_llm(path)
    assert llm.config.eos == tuple(dict.fromkeys((a, b, c)))
    outputs = llm.generate(PROMPTS, greedy(20, ignore_eos=False), use_tqdm=False)
    for output, tokens in zip(outputs, plain, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in (a, b, c)]
        assert output["token_ids"] == (tokens[: ends[0] + 1] if ends else tokens)
        assert (
            output["finish_reason"] == ("stop" if ends else "length")
            and output["stop_reason"] is None
        )
    llm.exit()
    llm = make_llm(path, eos=(a, c))
    assert llm.scheduler.eos == (a, c)
    llm.exit()
    demo = make_llm(DEMO_MODEL)
    assert demo.config.eos == (2, 0)
    demo.exit()


def test_the_models_own_sampling_is_the_default(
    checkpoint: Checkpoint, plain: list[list[int]], tmp_path: Path
) -> None:
    recommended = dict(temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, min_p=None)
    options = dict(do_sample=True, bos_token_id=3, pad_token_id=0, max_new_tokens=7, **recommended)
    llm = make_llm(with_files(checkpoint.path, tmp_path, **options))
    expected = SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, repetition_penalty=1.05, max_tokens=7
    )
    assert llm.get_default_sampling_params() == expected
    seeded = [dataclasses.replace(expected, seed=i) for i in range(6)]
    numbers = iter(range(6))
    llm._inputs.seeds.getrandbits = lambda bits: next(numbers)  # type: ignore[method-assign]
    assert generate_ids(llm, PROMPTS, None) == generate_ids(llm, PROMPTS, seeded)
    llm.exit()
    llm = make_llm(
        with_files(checkpoint.path, tmp_path, do_sample=False, temperature=0.7, max_new_tokens=20)
    )
    assert generate_ids(llm, PROMPTS, None) == plain  # type: ignore[arg-type]
    llm.exit()
    llm = make_llm(with_files(checkpoint.path, tmp_path, top_p=0))
    with pytest.raises(
        ValueError, match=r"generation_config.json: top_p must be above 0 and at most 1, not 0"
    ):
        llm.generate(PROMPTS, use_tqdm=False)
    llm.exit()
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="generation_config.json"):
        make_llm(str(tmp_path))


# --- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_logprobs_are_those_of_the_model(
    checkpoint: Checkpoint, deep: LLM, temperature: float
) -> None:
    """Of the model's own distribution, whatever temperature, filters and penalties make of it."""
    asked = [3, None, 0, 20, None, 1]
    params = [
        SamplingParams(
            temperature=temperature,
            max_tokens=12,
            logprobs=k,
            seed=1,
            top_k=5,
            repetition_penalty=1.3,
        )
        for k in asked
    ]
    outputs = deep.generate(PROMPTS, params, use_tqdm=False)
    for prompt, k, output in zip(PROMPTS, asked, outputs, strict=True):
        if k is None:
            assert output["logprobs"] is None
            continue
        tokens = output["token_ids"]
        reference = checkpoint.logits(prompt + tokens)[len(prompt) - 1 : -1].log_softmax(1)
        assert len(output["logprobs"]) == len(tokens)
        for entry, token, row in zip(output["logprobs"], tokens, reference, strict=True):
            assert next(iter(entry)) == token and k <= len(entry) <= k + 1
            assert set(entry) == {token, *row.topk(k).indices.tolist()}
            expected = row[list(entry)]
            torch.testing.assert_close(
                torch.tensor(list(entry.values())), expected, rtol=1e-4, atol=1e-4
            )


def test_prompt_and_cached_tokens_are_reported(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path)
    prompts = [PROMPTS[4], PROMPTS[4], PROMPTS[1]]
    outputs = llm.generate(prompts, greedy(3), use_tqdm=False)
    assert [output["prompt_token_ids"] for output in outputs] == prompts
    # The second takes all that the first computes, the last, partial block too.
    assert [output["num_cached_tokens"] for output in outputs] == [0, 50, 0]
    llm.exit()
    # After a preemption, the sequence finds its own blocks: those are no hits of its prompt.
    llm = make_llm(checkpoint.path, kvcache_block_size=4, max_model_len=72, num_kvcache_blocks=18)
    outputs = llm.generate(PROMPTS, greedy(20), use_tqdm=False)
    assert llm.scheduler.counters["preemptions"] > 0
    assert [output["num_cached_tokens"] for output in outputs] == [0] * 6
    llm.exit()


def test_max_tokens_none_goes_to_the_end(llm: LLM) -> None:
    output = llm.generate(
        [PROMPTS[0]], SamplingParams(max_tokens=None, ignore_eos=True), use_tqdm=False
    )[0]
    assert len(output["token_ids"]) == 256 - len(PROMPTS[0]) and output["finish_reason"] == "length"


# --- n --------------------------------------------------------------------------------------------


def test_n_completions_of_a_prompt(
    checkpoint: Checkpoint, record_hits: Callable[[], list[int]]
) -> None:
    llm = make_llm(checkpoint.path)
    params = SamplingParams(
        temperature=0.9, seed=5, max_tokens=10, ignore_eos=True, n=4, logprobs=0
    )
    one, two = llm.generate([PROMPTS[4], PROMPTS[1]], params, use_tqdm=False)
    assert_idle(llm)
    # Each prompt is computed once: all of it, of 50 tokens and of 3, in blocks of 16.
    assert record_hits() == [0, 50, 50, 50, 0, 3, 3, 3]
    for output, prompt in ((one, PROMPTS[4]), (two, PROMPTS[1])):
        completions = output["completions"]
        assert (
            len({tuple(completion["token_ids"]) for completion in completions})
            == len(completions)
            == 4
        )
        assert completions[0] == {key: output[key] for key in completions[0]}
        assert all(len(completion["logprobs"]) == 10 for completion in completions)
        assert output["prompt_token_ids"] == prompt
    # The first is what n=1 gives; more do not change those before; the engine's seed serves as
    # well.
    fewer, single = (dataclasses.replace(params, n=n) for n in (3, 1))
    again = llm.generate([PROMPTS[4], PROMPTS[4]], [fewer, single], use_tqdm=False)
    assert summary(again[0]) == summary(one)[:3]
    assert again[1]["token_ids"] == one["token_ids"] and "completions" not in again[1]
    neighbour = dataclasses.replace(params, n=1, seed=6)
    (other,) = llm.generate([PROMPTS[4]], neighbour, use_tqdm=False)
    assert summary(other)[0] not in summary(one)
    unseeded = dataclasses.replace(params, seed=None)
    first, second = llm.generate([PROMPTS[1]] * 2, unseeded, use_tqdm=False)
    assert (
        len({tuple(c["token_ids"]) for output in (first, second) for c in output["completions"]})
        == 8
    )
    llm.exit()


def test_n_with_fewer_seats_than_completions(checkpoint: Checkpoint) -> None:
    """They are ordinary sequences: they wait, are preempted, end one by one, and are reported once
    all have.
    """
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=20, ignore_eos=True, n=5)
    wide = make_llm(checkpoint.path)
    expected = wide.generate(PROMPTS[:3], params, use_tqdm=False)
    wide.exit()
    llm = make_llm(
        checkpoint.path,
        1,
        kvcache_block_size=4,
        max_model_len=72,
        num_kvcache_blocks=18,
        max_num_seqs=3,
    )
    ids = [llm.add_request(prompt, params) for prompt in PROMPTS[:3]]
    results: dict[int, Any] = {}
    while not llm.is_finished():
        for request_id, result in llm.step()[0]:
            assert request_id not in results
            results[request_id] = result
    assert [summary(results[i]) for i in ids] == [summary(output) for output in expected]
    assert_idle(llm)
    llm.exit()


def test_greedy_completions_would_all_be_the_same() -> None:
    with pytest.raises(ValueError, match="n must be 1 when temperature is 0"):
        SamplingParams(temperature=0, n=2)


# --- chat -----------------------------------------------------------------------------------------


def test_chat(demo: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = [{"role": "user", "content": QUESTION}]
    text = TOKENIZER.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    expected = demo.generate(text, SamplingParams(temperature=0), use_tqdm=False)
    assert demo.chat(conversation, SamplingParams(temperature=0), use_tqdm=False)[0][
        "text"
    ].startswith("Hello!")
    answers = demo.chat(
        [conversation, conversation], use_tqdm=False
    )  # the demo recommends temperature 0
    assert [answer["text"] for answer in answers] == [expected[0]["text"]] * 2
    assert answers[0]["prompt_token_ids"] == expected[0]["prompt_token_ids"]
    template = "{{ messages[0]['content'] }}{{ '!' if enable_thinking else '?' }}"
    for options in (
        dict(enable_thinking=True),
        dict(chat_template_kwargs={"enable_thinking": True}),
    ):
        (answer,) = demo.chat(conversation, use_tqdm=False, chat_template=template, **options)
        assert TOKENIZER.decode(answer["prompt_token_ids"]) == QUESTION + "!"
    assert demo.chat([]) == []
    for messages in ("text", 0, None):
        with pytest.raises(TypeError, match="messages must be"):
            demo.chat(messages)  # type: ignore[arg-type]


def test_chat_without_a_template(llm: LLM) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        llm.chat([{"role": "user", "content": "x"}])


# --- stream and abort -----------------------------------------------------------------------------


def join(
    parts: list[dict[str, Any]],
) -> dict[tuple[int, int], tuple[str, list[int], Any, list[Any]]]:
    """(prompt, completion) -> all the text and tokens that a stream yielded for it, and how it
    ended.
    """
    joined: dict[tuple[int, int], tuple[str, list[int], Any, list[Any]]] = {}
    for part in parts:
        key = part["index"], part["completion"]
        text, tokens, reason, logprobs = joined.get(key, ("", [], None, []))
        assert reason is None and part["token_ids"]
        logprobs = logprobs + (part["logprobs"] or [])
        joined[key] = (
            text + part["text"],
            tokens + part["token_ids"],
            part["finish_reason"],
            logprobs,
        )
    return joined


@pytest.mark.parametrize("depth", [0, 1])
def test_a_stream_yields_what_generate_returns(
    demo: LLM, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_max_pending", depth)
    prompts = [
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        "The number",
        "1, 2",
    ]
    params = [
        SamplingParams(temperature=0),
        SamplingParams(seed=3, n=3, top_k=30, max_tokens=30, logprobs=2),
        SamplingParams(temperature=0, max_tokens=9, skip_special_tokens=False),
    ]
    expected = demo.generate(prompts, params, use_tqdm=False)
    parts = list(demo.stream(prompts, params))
    assert_idle(demo)
    assert join(parts) == {
        (index, number): (c["text"], c["token_ids"], c["finish_reason"], c["logprobs"] or [])
        for index, output in enumerate(expected)
        for number, c in enumerate(output.get("completions", [output]))
    }
    assert len(parts) == sum(
        len(tokens) for _, tokens, _, _ in join(parts).values()
    )  # as they come


def test_a_stream_says_at_once_what_is_wrong(deep: LLM) -> None:
    with pytest.raises(ValueError, match="prompt 1 has the token id 127"):
        deep.stream([[1], [127]])
    deep.stream(PROMPTS)  # never begun: nothing is queued
    assert_idle(deep)


@pytest.mark.parametrize("how", ["break", "raise", "close"])
def test_leaving_a_stream_frees_its_requests(deep: LLM, how: str, plain: list[list[int]]) -> None:
    def leave() -> None:
        stream = deep.stream(PROMPTS, [greedy(n) for n in (3, 20, 20, 20, 20, 20)])
        for number, _ in enumerate(stream):
            if number == 40:
                if how == "raise":
                    raise OSError("the reader has gone")
                if how == "close":
                    stream.close()  # type: ignore[attr-defined]
                break

    if how == "raise":
        with pytest.raises(OSError):
            leave()
    else:
        leave()
    assert_idle(deep)
    assert deep.scheduler.block_manager.cached_blocks  # what was computed can still be shared
    assert generate_ids(deep, PROMPTS, greedy(20)) == plain


def test_streams_and_requests_side_by_side(deep: LLM, plain: list[list[int]]) -> None:
    """Each gets its own; results of add_request wait for the next step of whoever asks."""
    request = deep.add_request(PROMPTS[0], greedy(5))
    first, second = deep.stream(PROMPTS[1:3], greedy(20)), deep.stream(PROMPTS[3:5], greedy(8))
    one, two = [next(first)], [next(second)]
    with pytest.raises(RuntimeError, match="stream"):
        deep.generate(PROMPTS[:1])
    two += second
    one += first
    assert [tokens for _, tokens, _, _ in join(one).values()] == plain[1:3]
    assert [tokens for _, tokens, _, _ in join(two).values()] == [
        tokens[:8] for tokens in plain[3:5]
    ]
    assert not deep.is_finished()
    results, num_tokens = deep.step()
    assert [(i, result["token_ids"]) for i, result in results] == [
        (request, plain[0][:5])
    ] and num_tokens == 0
    assert_idle(deep)


def test_a_stream_after_reset_ends(deep: LLM) -> None:
    stream = deep.stream(PROMPTS, greedy(20))
    next(stream)
    deep.reset()
    assert len(list(stream)) == len(PROMPTS) - 1  # of the step that was done
    assert_idle(deep)


def test_an_interrupted_stream_leaves_the_engine_empty(
    deep: LLM, plain: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = deep.stream(PROMPTS, greedy(20))
    for _ in range(20):
        next(stream)

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "postprocess", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert_idle(deep)
    assert generate_ids(deep, PROMPTS, greedy(20)) == plain


@pytest.mark.parametrize("budget", [16384, 9])
def test_abort(checkpoint: Checkpoint, plain: list[list[int]], budget: int) -> None:
    """Running, waiting, half prefilled, under way: whenever it comes, the others do not notice."""
    options = dict(max_num_seqs=4, max_num_batched_tokens=budget, enable_prefix_caching=False)
    for depth in (0, 1):
        llm = make_llm(checkpoint.path, depth, **options)
        for num_steps in range(0, 12, 2):
            ids = [llm.add_request(prompt, greedy(20)) for prompt in PROMPTS]
            results: dict[int, Any] = {}
            for _ in range(num_steps):
                results.update(llm.step()[0])
            for victim in (ids[0], ids[2], ids[5], 10**9):
                llm.abort(victim)
                llm.abort(victim)
            assert not llm.is_finished()
            results.update(llm.step()[0])
            while not llm.is_finished():
                finished = llm.step()[0]
                assert not {ids[0], ids[2], ids[5]} & {request for request, _ in finished}
                results.update(finished)
            for number, request_id in enumerate(ids):
                tokens, reason = (
                    results[request_id]["token_ids"],
                    results[request_id]["finish_reason"],
                )
                if number in (0, 2, 5):
                    assert (
                        reason == "abort"
                        and tokens == plain[number][: len(tokens)]
                        and len(tokens) < 20
                    )
                else:
                    assert reason == "length" and tokens == plain[number]
            assert_idle(llm)
        llm.exit()


def test_abort_of_one_that_has_several_completions(deep: LLM) -> None:
    sampled = SamplingParams(n=3, seed=1, max_tokens=30, ignore_eos=True)
    request = deep.add_request(PROMPTS[0], sampled)
    for _ in range(5):
        deep.step()
    deep.abort(request)
    ((request_id, result),) = deep.step()[0]
    assert request_id == request and len(result["completions"]) == 3
    assert {c["finish_reason"] for c in result["completions"]} == {"abort"}
    assert all(0 < len(c["token_ids"]) < 30 for c in result["completions"])
    while not deep.is_finished():
        assert deep.step()[0] == []
    assert_idle(deep)


# --- all at once ----------------------------------------------------------------------------------


def everything(seed: int, **changes: Any) -> SamplingParams:
    """All that changes which tokens are drawn."""
    options: dict[str, Any] = dict(
        temperature=0.9,
        top_k=40,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={3: 2.5, 50: -100.0, 7: 1},
        min_tokens=9,
        stop_token_ids=[3, 9, 20],
        logprobs=2,
        seed=seed,
        max_tokens=20,
    )
    return SamplingParams(**{**options, **changes})


MANY = [
    everything(1),
    greedy(20),
    everything(2, temperature=0, top_k=0),
    everything(3, logit_bias=None, min_tokens=0, n=2),
    SamplingParams(seed=4, max_tokens=20, ignore_eos=True),
    everything(
        5, repetition_penalty=0.8, presence_penalty=0, frequency_penalty=-0.5, logprobs=None
    ),
]


def summaries(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    assert_idle(llm)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert_idle(llm)
    return [summary(output) for output in outputs]


def summary(output: dict[str, Any]) -> list[Any]:
    """A result without what may differ: cached tokens, and the last bits of log-probabilities."""
    return [
        (
            c["token_ids"],
            c["finish_reason"],
            c["stop_reason"],
            c["logprobs"] and [*map(sorted, c["logprobs"])],
        )
        for c in output.get("completions", [output])
    ]


def test_a_seeded_request_is_the_same_however_it_is_served(tmp_path: Path) -> None:
    """Alone, among others, in chunks, preempted, read late, on two ranks; with everything on."""
    checkpoint = make_checkpoint(tmp_path, num_key_value_heads=1, seed=1)
    llm = make_llm(checkpoint.path)
    alone = [
        summaries(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, MANY, strict=True)
    ]
    assert summaries(llm, PROMPTS, MANY) == alone
    llm.exit()
    small: dict[str, Any] = dict(kvcache_block_size=4, max_model_len=72, num_kvcache_blocks=18)
    for depth, options in (
        (0, dict(max_num_batched_tokens=7)),
        (1, dict(max_num_seqs=2, enable_prefix_caching=False)),
        (0, small),
        (1, dict(small, max_num_batched_tokens=30)),
        (1, dict(small, tensor_parallel_size=2)),
    ):
        llm = make_llm(checkpoint.path, depth, seed=99, **options)
        assert summaries(llm, PROMPTS, MANY) == alone, options
        for number, _ in enumerate(llm.stream(PROMPTS, MANY)):
            if number == 30:
                break
        assert summaries(llm, PROMPTS[::-1], MANY[::-1]) == alone[::-1], options
        assert ("num_kvcache_blocks" in options) == (llm.scheduler.counters["preemptions"] > 0)
        llm.exit()
    # Each option does make a difference.
    llm = make_llm(checkpoint.path)
    for name, off in [
        ("temperature", 0.2),
        ("top_k", 1),
        ("top_p", 0.01),
        ("min_p", 1),
        ("repetition_penalty", 2.0),
        ("presence_penalty", 2),
        ("frequency_penalty", 2),
        ("logit_bias", {3: 100}),
        ("seed", 77),
    ]:
        base = everything(1, stop_token_ids=[], min_tokens=0)
        changed = dataclasses.replace(base, **{name: off})
        assert generate_ids(llm, PROMPTS[:1], changed) != generate_ids(llm, PROMPTS[:1], base), name
    llm.exit()


def test_options_travel_to_other_ranks_with_the_prefill_only() -> None:
    seq = Sequence(list(range(5000)), everything(1))
    assert everything(1).has_penalties and not everything(1).is_plain
    scheduler = make_scheduler(num_blocks=1, block_size=8192)
    scheduler.add(seq)
    step = scheduler.schedule()
    assert step is not None and step.is_prefill
    copy = pickle.loads(pickle.dumps(seq))
    assert copy.sampling_options == seq.sampling_options
    assert copy.sampling_options.params == everything(1)
    assert copy.sampling_options.penalized_prompt_ids == seq.token_ids
    scheduler.postprocess(step, [1], [TokenLogprobs(list(range(9)), [-1.0] * 9)])
    step = scheduler.schedule()
    assert step is not None and not step.is_prefill
    assert len(pickle.dumps(seq)) < 200
    # What changes nothing costs nothing: no options are sent, and the graph's own samples are
    # taken.
    for params in (
        SamplingParams(temperature=0, top_k=5, top_p=0.5),
        SamplingParams(top_k=-1, n=3, stop="x"),
    ):
        assert params.is_plain


class Replay:
    """What a CUDA graph does, on the CPU: a decode step of a fixed size that leaves its results in
    fixed places.
    """

    def __init__(self, llm: LLM, size: int) -> None:
        self.decode, self.size = llm.model_runner._decode, size  # type: ignore[union-attr]
        self.tokens, self.logits = torch.zeros(size, dtype=torch.int64), torch.zeros(size, 127)

    def replay(self) -> None:
        output = self.decode(self.size)
        self.tokens.copy_(output.token_ids)
        self.logits.copy_(output.logits)


def test_options_with_graphs(checkpoint: Checkpoint) -> None:
    llm = make_llm(checkpoint.path, 1)
    expected = summaries(llm, PROMPTS, MANY)
    runner = llm.model_runner
    replays = {size: Replay(llm, size) for size in (1, 2, 4, 8)}
    runner.decode_graphs.sizes = list(replays)  # type: ignore[union-attr]
    for size, replay in replays.items():
        output = StepOutput(replay.tokens, replay.logits, hidden=torch.empty(size, 0))
        runner.decode_graphs.graphs[size] = StepGraph(replay, output)
    assert summaries(llm, PROMPTS, MANY) == expected
    assert [
        summaries(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, MANY, strict=True)
    ] == expected
    llm.exit()


@st.composite
def random_params(draw: st.DrawFn) -> SamplingParams:
    def maybe(values: st.SearchStrategy[Any], default: Any) -> Any:
        return draw(st.one_of(st.just(default), values))

    temperature = draw(st.sampled_from([0, 0.5, 1.0, 3.0, 1e6]))
    max_tokens = draw(st.one_of(st.integers(1, 25), st.none()))
    token_ids = st.integers(0, 1023)
    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        min_tokens=maybe(st.integers(0, max_tokens or 25), 0),
        n=1 if temperature == 0 else maybe(st.integers(1, 4), 1),
        seed=maybe(st.integers(0, 2**63 - 1), None),
        ignore_eos=draw(st.booleans()),
        top_k=maybe(st.integers(-1, 2000), 0),
        top_p=maybe(st.floats(0.001, 1), 1.0),
        min_p=maybe(st.floats(0, 1), 0.0),
        repetition_penalty=maybe(st.floats(0.1, 3), 1.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        logit_bias=maybe(st.dictionaries(token_ids, st.floats(-100, 100), max_size=4), None),
        stop=maybe(st.lists(st.text("aeiou thn.", min_size=1, max_size=3), max_size=3), None),
        stop_token_ids=maybe(st.lists(token_ids, max_size=3), None),
        include_stop_str_in_output=draw(st.booleans()),
        logprobs=maybe(st.integers(0, 20), None),
        skip_special_tokens=draw(st.booleans()),
    )


REQUESTS = st.tuples(st.lists(st.integers(3, 1023), min_size=1, max_size=30), random_params())


@pytest.fixture(scope="module")
def tiny_demo() -> Iterator[list[LLM]]:
    """With a cache for little more than one sequence; reading tokens at once, and a step late."""
    options: dict[str, Any] = dict(
        kvcache_block_size=4, max_model_len=56, num_kvcache_blocks=20, max_num_seqs=6
    )
    engines = [
        make_llm(DEMO_MODEL, depth, max_num_batched_tokens=40, **options) for depth in (0, 1)
    ]
    yield engines
    for engine in engines:
        engine.exit()


@settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    depth=st.integers(0, 1),
    leave_after=st.one_of(st.none(), st.integers(0, 40)),
)
def test_random_requests_keep_every_invariant(
    tiny_demo: list[LLM],
    requests: list[tuple[list[int], SamplingParams]],
    depth: int,
    leave_after: int | None,
) -> None:
    llm = tiny_demo[depth]
    prompts, params = [prompt for prompt, _ in requests], [param for _, param in requests]
    if leave_after is not None:
        for number, _ in enumerate(llm.stream(prompts, params)):
            if number == leave_after:
                break
        assert_idle(llm)
    for output, (prompt, param) in zip(
        llm.generate(prompts, params, use_tqdm=False), requests, strict=True
    ):
        assert output["prompt_token_ids"] == prompt
        completions = output.get("completions", [output])
        assert len(completions) == param.n
        for c in completions:
            tokens = c["token_ids"]
            room = 56 - len(prompt)
            assert 1 <= len(tokens) <= min(param.max_tokens or room, room)
            ends = {*param.stop_token_ids, *(() if param.ignore_eos else llm.config.eos)}
            early = tokens[: max(param.min_tokens, len(tokens) - 1)]
            assert not ends & set(early[: param.min_tokens]) and not ends & set(
                tokens[param.min_tokens : -1]
            )
            if c["finish_reason"] == "length":
                assert (
                    len(tokens) == min(param.max_tokens or room, room) and c["stop_reason"] is None
                )
            else:
                assert c["finish_reason"] == "stop" and len(tokens) > param.min_tokens
                assert c["stop_reason"] in (None, *param.stop, *param.stop_token_ids)
            if param.logprobs is None:
                assert c["logprobs"] is None
            else:
                assert [next(iter(entry)) for entry in c["logprobs"]] == tokens
                assert all(
                    param.logprobs <= len(entry) <= param.logprobs + 1 for entry in c["logprobs"]
                )
                assert all(value <= 1e-4 for entry in c["logprobs"] for value in entry.values())
            if not param.stop and c["finish_reason"] == "length":
                decoded = TOKENIZER.decode(tokens, skip_special_tokens=param.skip_special_tokens)
                # A character that lacks bytes is left out of the end, where the tokenizer shows it.
                without_last = decoded.removesuffix("\ufffd")
                assert c["text"] in (decoded, without_last)
    assert_idle(llm)


# --- moving here ----------------------------------------------------------------------------------


def test_a_script_for_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    """But for the import and the results, which are dicts here."""
    sampling_params = SamplingParams(
        n=2,
        temperature=0.8,
        top_p=0.95,
        top_k=-1,
        min_p=0.0,
        repetition_penalty=1.0,
        seed=0,
        max_tokens=16,
        min_tokens=1,
        stop=["\n"],
        stop_token_ids=None,
        ignore_eos=False,
        logprobs=1,
        skip_special_tokens=True,
    )
    llm = LLM(model=DEMO_MODEL, tensor_parallel_size=1, max_model_len=128, device="cpu")
    for output in llm.generate(["Hello, my name is", "The future of AI is"], sampling_params):
        print(f"Generated text: {output['text']!r}, {output['finish_reason']}")
    conversation = [
        {"role": "system", "content": "You are a helpful assistant"},
        {"role": "user", "content": "Hello"},
    ]
    for output in llm.chat(conversation, sampling_params=sampling_params, use_tqdm=False):
        print(f"Generated text: {output['text']!r}")
    assert capsys.readouterr().out.count("Generated text") == 3
    llm.exit()


# --- found by review ------------------------------------------------------------------------------


def test_a_stream_misses_nothing_when_others_step_the_engine(deep: LLM) -> None:
    prompts, params = random_prompts(5, [9, 14]), greedy(8)
    expected = generate_ids(deep, prompts, params)
    streams = [deep.stream([prompt], params) for prompt in prompts]
    parts = [[next(stream)] for stream in streams]
    while not deep.is_finished():
        deep.step()
    for stream, part in zip(streams, parts, strict=True):
        part += stream
    assert [
        [token for part in parts_ for token in part["token_ids"]] for parts_ in parts
    ] == expected
    assert [parts_[-1]["finish_reason"] for parts_ in parts] == ["length", "length"]
    assert_idle(deep)


@pytest.mark.parametrize("named", [99_999, -1, "2", 2.0, True, [[2]], [5, 99_999, None]], ids=str)
def test_end_ids_that_are_none_are_left_out(
    checkpoint: Checkpoint, tmp_path: Path, named: Any
) -> None:
    path = tmp_path / "model"
    shutil.copytree(checkpoint.path, path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    llm = make_llm(str(path))
    assert llm.config.eos == ((5,) if isinstance(named, list) and 5 in named else ())
    params = SamplingParams(temperature=0, min_tokens=2, max_tokens=4)
    together = llm.generate(random_prompts(6, [5, 6]), [params, greedy(4)], use_tqdm=False)
    assert (
        together[1]["token_ids"] == generate_ids(llm, random_prompts(6, [5, 6])[1:], greedy(4))[0]
    )
    llm.exit()


def test_engines_of_two_threads_do_not_meet(checkpoint: Checkpoint) -> None:
    prompts = random_prompts(7, [5, 30, 17, 9])
    expected = checkpoint.complete(prompts, 16)
    results: dict[int, list[list[int]]] = {}

    def work(index: int) -> None:
        engine = make_llm(checkpoint.path)
        for _ in range(3):
            results[index] = generate_ids(engine, prompts, greedy(16))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: expected, 1: expected}


@pytest.mark.parametrize(
    "messages", [["hi"], "hi", [[{"role": "user", "content": "a"}], "b"], None], ids=str
)
def test_what_is_no_conversation_is_a_type_error(demo: LLM, messages: Any) -> None:
    with pytest.raises(TypeError, match="messages must be a conversation"):
        demo.chat(messages, greedy(1), use_tqdm=False)


def test_the_smallest_top_p_keeps_the_likeliest_token(llm: LLM) -> None:
    prompts = random_prompts(8, [6])
    params = SamplingParams(top_p=1.2e-38, seed=1, max_tokens=6, ignore_eos=True)
    assert generate_ids(llm, prompts, params) == generate_ids(llm, prompts, greedy(6))
    with pytest.raises(ValueError, match="top_p must be above 0"):
        SamplingParams(top_p=1e-50)
