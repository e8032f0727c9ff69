"""Tokenizers and chat templates of the families: the ids that transformers gives, the texts that
they stand for, the tokens that end them.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_checkpoint, make_llm
from family_tokenizers import FAMILIES, LLAMA3_TEMPLATE, llama3
from real_prompts import PROMPTS
from transformers import PreTrainedTokenizerFast

from nanovllm import SamplingParams
from nanovllm.checkpoints.checkpoint import load_tokenizer
from nanovllm.text.chat import apply_chat_template
from nanovllm.text.decoder import TextDecoder, decoder_of
from nanovllm.text.detokenizer import Detokenizer
from nanovllm.text.encoder import encode, find_bos

families = pytest.mark.parametrize("family", FAMILIES)
with_template = pytest.mark.parametrize("family", ["llama3", "gemma", "mistral"])

USER = {"role": "user", "content": "  What is the weather in Oslo?\n"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": "weather", "arguments": {"city": "Oslo"}},
        }
    ],
}
CALL_WITHOUT_CONTENT = {key: value for key, value in CALL.items() if key != "content"}
RESULT = {
    "role": "tool",
    "tool_call_id": "abcdefghi",
    "name": "weather",
    "content": '{"degrees": 7}',
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SYSTEM = {"role": "system", "content": " Be brief. "}
ANSWER = {"role": "assistant", "content": " Cold; bring a coat 🧥 "}
PARTS = {
    "role": "user",
    "content": [{"type": "text", "text": " one "}, {"type": "text", "text": "two"}],
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [USER],
    "system": [SYSTEM, USER],
    "turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "Warum? 为什么?"}],
    "begun": [USER, ANSWER],
}


def by_transformers(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def by_us(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    (ids,) = apply_chat_template(tokenizer, messages, options, "this model")
    return ids


# --- from text to tokens ----------------------------------------------------------------------


@families
def test_a_prompt_gets_bos_once(family: str) -> None:
    tokenizer = FAMILIES[family]
    bos_ids = find_bos(tokenizer)
    assert bos_ids == [tokenizer.bos_token_id]
    for prompt in PROMPTS:
        ids = encode(tokenizer, prompt, bos_ids)
        assert ids == tokenizer.encode(prompt)
        assert ids[0] == tokenizer.bos_token_id and ids[1:2] != ids[:1]
        templated = str(tokenizer.bos_token) + prompt
        expected = tokenizer.encode(templated, add_special_tokens=False)
        assert encode(tokenizer, templated, bos_ids) == expected


@with_template
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_templated_text_is_the_prompt_that_chat_makes(family: str, name: str) -> None:
    tokenizer = FAMILIES[family]
    messages = CONVERSATIONS[name]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert encode(tokenizer, text, find_bos(tokenizer)) == by_us(tokenizer, messages)


# --- from conversations to tokens ---------------------------------------------------------------


@with_template
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_chat_gives_the_ids_of_transformers(family: str, name: str) -> None:
    tokenizer = FAMILIES[family]
    messages = CONVERSATIONS[name]
    ids = by_us(tokenizer, messages)
    assert ids == by_transformers(tokenizer, messages, add_generation_prompt=True)
    assert ids.count(tokenizer.bos_token_id) == 1
    # Of the templates only Mistral's has nothing that invites an answer.
    without = by_us(tokenizer, messages, add_generation_prompt=False)
    assert without == by_transformers(tokenizer, messages, add_generation_prompt=False)
    assert (without == ids) is (family == "mistral")


@with_template
def test_chat_continues_a_message(family: str) -> None:
    tokenizer = FAMILIES[family]
    for content in ("Cold", " Cold; bring a", "Cold.\n"):
        messages = [USER, {"role": "assistant", "content": content}]
        ids = by_us(tokenizer, messages, continue_final_message=True)
        assert ids == by_transformers(tokenizer, messages, continue_final_message=True)
        # No end of a turn behind it.
        assert tokenizer.decode(ids).rstrip().endswith(content.strip())


TOOL_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [USER, CALL, RESULT],
    [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
    [USER, CALL_WITHOUT_CONTENT, RESULT],
]


@with_template
def test_parts_of_text(family: str) -> None:
    """Gemma's template reads them one by one, the others take strings, which they are joined to."""
    tokenizer = FAMILIES[family]
    joined = {"role": "user", "content": " one \ntwo"}
    ids = by_us(tokenizer, [PARTS, ANSWER, PARTS])
    expected = [PARTS, ANSWER, PARTS] if family == "gemma" else [joined, ANSWER, joined]
    assert ids == by_transformers(tokenizer, expected, add_generation_prompt=True)
    # Of a system message Gemma's template reads the first part only.
    parts = {**PARTS, "role": "system"}
    ids = by_us(tokenizer, [parts, USER])
    expected = [{**joined, "role": "system"}, USER]
    assert ids == by_transformers(tokenizer, expected, add_generation_prompt=True)


@pytest.mark.parametrize("family", ["llama3", "mistral"])
@pytest.mark.parametrize("messages", TOOL_CONVERSATIONS)
def test_tools(family: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = FAMILIES[family]
    ids = by_us(tokenizer, messages, tools=[TOOL])
    assert ids == by_transformers(tokenizer, messages, tools=[TOOL], add_generation_prompt=True)
    assert "The weather in a city." in tokenizer.decode(ids)
    # In OpenAI's form the arguments are a string.
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    calls = [{**CALL["tool_calls"][0], "function": function}]  # type: ignore[index]
    as_openai = [{**m, "tool_calls": calls} if "tool_calls" in m else m for m in messages]
    assert by_us(tokenizer, as_openai, tools=[TOOL]) == ids


def test_options_of_a_template() -> None:
    tokenizer = FAMILIES["llama3"]
    for options in (
        {"date_string": "2 Feb 2026"},
        {"tools": [TOOL], "tools_in_user_message": False},
        {"custom_tools": [TOOL]},
    ):
        ids = by_us(tokenizer, [SYSTEM, USER], **options)
        assert ids == by_transformers(
            tokenizer, [SYSTEM, USER], add_generation_prompt=True, **options
        )
        assert ids != by_us(tokenizer, [SYSTEM, USER])
    with pytest.raises(TypeError, match="did you mean 'date_string'"):
        by_us(tokenizer, [USER], date_strin="2 Feb 2026")
    with pytest.raises(TypeError, match="'tools'"):  # Gemma's template would ignore them
        by_us(FAMILIES["gemma"], [USER], tools=[TOOL])


@pytest.mark.parametrize(
    "family, messages, reason",
    [
        ("gemma", [USER, USER], "take turns"),
        ("gemma", [ANSWER], "take turns"),
        ("mistral", [USER, {**CALL, "content": "Let me see."}, RESULT], "not both"),
        ("mistral", [USER, CALL, {**RESULT, "tool_call_id": "1"}], "9 characters"),
        ("llama3", [USER, {**CALL, "tool_calls": 2 * CALL["tool_calls"]}], "one tool call"),  # type: ignore[operator]
    ],
)
def test_what_a_template_refuses(family: str, messages: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        by_us(FAMILIES[family], messages)


# --- from tokens to text ------------------------------------------------------------------------


def stream(tokenizer: Any, prompt_ids: list[int], token_ids: list[int], **options: Any) -> str:
    """What a reader of a stream gets in all."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**options), prompt_ids)
    pieces = []
    for number, token_id in enumerate(token_ids, start=1):
        detokenizer.append(token_id, is_last=number == len(token_ids), may_stop=True)
        pieces.append(detokenizer.take(is_finished=number == len(token_ids)))
    return "".join(pieces)


@families
@pytest.mark.parametrize("num_unknown", [0, 3])
def test_a_text_cut_anywhere_is_whole(family: str, num_unknown: int) -> None:
    """Wherever a text is cut into prompt and completion, the two texts are the whole. Ids beyond
    the tokenizer's vocabulary, which models have that pad theirs, stand for nothing.
    """
    tokenizer = FAMILIES[family]
    decoder = decoder_of(tokenizer)
    unknown = [len(tokenizer) + number for number in range(num_unknown)]
    for text in [*PROMPTS[:60:4], "   spaces", "é", "\n \n", "a\tb"]:
        ids = tokenizer.encode(text)
        for end in range(1, len(ids)):
            before = tokenizer.decode(ids[:end], skip_special_tokens=True)
            if before.endswith("\ufffd") or (end > 1 and not before):
                continue  # within a character, or behind a first space, which is not shown
            completion = ids[end:] + unknown
            completion[1:1] = unknown
            whole = decoder.completion_text(completion, True, decoder.context_of(ids[:end]))
            assert stream(tokenizer, ids[:end], completion) == whole
            assert before + whole == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", ["llama2", "gemma"])
def test_newlines_as_bytes(family: str) -> None:
    tokenizer = FAMILIES[family]
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")
    prompt = tokenizer.encode("The")
    (letter,) = tokenizer.convert_tokens_to_ids(["a"])
    completion = [newline, newline, letter, newline]
    assert stream(tokenizer, prompt, completion) == "\n\na\n"
    assert stream(tokenizer, prompt, completion, stop="\n\n") == ""


@pytest.fixture
def num_decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that gets the number of tokens of each call of a tokenizer's decoder."""
    numbers = []
    decode = TextDecoder.decode

    def counting(self: TextDecoder, token_ids: list[int], skips_special: bool) -> str:
        numbers.append(len(token_ids))
        return decode(self, token_ids, skips_special)

    monkeypatch.setattr(TextDecoder, "decode", counting)
    return numbers


@families
@pytest.mark.parametrize("skips", [False, True])
def test_a_long_run_of_special_tokens_costs_no_more_for_each(
    family: str, skips: bool, num_decoded: list[int]
) -> None:
    """Models write such runs when they are to go on behind their end, for a benchmark say."""
    tokenizer = FAMILIES[family]
    run = [tokenizer.eos_token_id] * 400
    letter = tokenizer.convert_tokens_to_ids("a")
    text = stream(tokenizer, [letter], [letter, *run, letter], skip_special_tokens=skips)
    assert text == ("aa" if skips else "a" + 400 * str(tokenizer.eos_token) + "a")
    assert sum(num_decoded) < 20 * len(run)


@pytest.mark.parametrize("family", ["llama2", "mistral", "gemma"])
@pytest.mark.parametrize("end", [b"", b"\xe1", b"\xff", b"\xff\xe1", b"\xe1\xff\xe1\x83"])
def test_a_long_run_of_bytes_costs_no_more_for_each(
    family: str, end: bytes, num_decoded: list[int]
) -> None:
    """Scripts that a vocabulary lacks, some of which have no spaces, are such runs."""
    tokenizer = FAMILIES[family]
    contents = ("ᐃᓄᒃᑎᑐᑦ" * 20).encode() + end
    run = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in contents])
    letter = tokenizer.convert_tokens_to_ids("a")
    for prompt, completion in (
        ([letter], [letter, *run]),
        ([letter], [*run, letter]),
        ([], run),
        (run[:30], run),
    ):
        del num_decoded[:]
        text = stream(tokenizer, prompt, completion, stop="no such text")
        assert sum(num_decoded) < 5 * len(run)
        context = decoder_of(tokenizer).context_of(prompt)
        assert text == decoder_of(tokenizer).completion_text(completion, True, context)


# --- files --------------------------------------------------------------------------------------


def test_the_template_may_be_in_a_file_of_its_own(tmp_path: Path) -> None:
    tokenizer = llama3()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded is not None and loaded.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        by_us(loaded, [USER])
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": LLAMA3_TEMPLATE}))
    assert by_us(load_tokenizer(str(tmp_path)), [USER]) == by_us(FAMILIES["llama3"], [USER])


def test_a_tokenizer_that_takes_another_library(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match="pip install sentencepiece protobuf"):
        load_tokenizer(str(tmp_path))


# --- through the engine ---------------------------------------------------------------------------

ENDS = {
    "gemma": ["<eos>", "<end_of_turn>"],
    "llama3": ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
}


@pytest.mark.parametrize("family", ENDS)
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_each_end_ends(family: str, file: str, tmp_path: Path) -> None:
    """The vocabulary of the model is larger than the tokenizer's."""
    tokenizer: PreTrainedTokenizerFast = FAMILIES[family]
    end_ids = tokenizer.convert_tokens_to_ids(ENDS[family])
    make_checkpoint(tmp_path, vocab_size=len(tokenizer) + 63)
    tokenizer.save_pretrained(tmp_path)
    contents = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps({**contents, "eos_token_id": end_ids}))
    llm = make_llm(str(tmp_path))
    letter = tokenizer.convert_tokens_to_ids("a")
    unknown = len(tokenizer) + 5
    for end_id in end_ids:
        # Six tokens at least, of which only these two can be drawn; then the end is likelier.
        params = SamplingParams(
            logit_bias={end_id: 100, letter: 50, unknown: 50}, min_tokens=6, max_tokens=9, seed=1
        )
        (output,) = llm.chat([USER], params, use_tqdm=False)
        assert output["prompt_token_ids"] == by_us(tokenizer, [USER])
        assert output["finish_reason"] == "stop"
        *before, last = output["token_ids"]
        assert last == end_id
        assert len(before) == 6 and set(before) <= {letter, unknown}
        assert output["text"] == before.count(letter) * "a"
        streamed = "".join(
            part["text"] for part in llm.stream([output["prompt_token_ids"]], params)
        )
        assert streamed == output["text"]
    llm.exit()
