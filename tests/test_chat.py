"""Conversations: the forms of messages, options of templates, their errors, one BOS."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import greedy
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from nanovllm import DEMO_MODEL, LLM, SamplingParams
from nanovllm.text.chat import apply_chat_template

ONE = SamplingParams(max_tokens=1)
SHOW = (
    "{% for m in messages %}[{{ m.role }}|{{ m.content }}"
    "{% if m.tool_calls is defined %}"
    "{% for call in m.tool_calls %}|{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}"
    "{% endfor %}{% endif %}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(DEMO_MODEL, device="cpu")


def prompt_of(llm: LLM, messages: Any, **options: Any) -> str:
    """The text of the prompt that a conversation becomes."""
    options = {"chat_template": SHOW, **options}
    (output,) = llm.chat(messages, ONE, use_tqdm=False, **options)
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    return str(tokenizer.decode(output["prompt_token_ids"]))


def text_part(text: str, kind: str = "text") -> dict[str, str]:
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    "content, text",
    [
        ("Hi", "Hi"),
        ([text_part("Hi")], "Hi"),
        ([text_part("Hi"), text_part("you", "input_text"), "there"], "Hi\nyou\nthere"),
        (({"text": "Hi"},), "Hi"),
        ([], ""),
        ("", ""),
        (None, ""),
    ],
)
def test_forms_of_content(llm: LLM, content: Any, text: str) -> None:
    messages = [{"role": "user", "content": content}]
    before = copy.deepcopy(messages)
    assert prompt_of(llm, messages) == f"[user|{text}]>"
    assert messages == before  # they are the caller's


def call_of(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize(
    "arguments, text", [('{"a": 1, "b": "x"}', " a=1 b=x"), ({"a": 1}, " a=1"), ("", "")]
)
def test_tool_calls(llm: LLM, content: dict[str, Any], arguments: Any, text: str) -> None:
    messages = [{"role": "assistant", **content, "tool_calls": [call_of(arguments)]}]
    before = copy.deepcopy(messages)
    assert prompt_of(llm, messages) == f"[assistant||add{text}]>"
    assert messages == before


def test_no_tool_calls(llm: LLM) -> None:
    for none in (None, []):
        messages = [{"role": "assistant", "content": "x", "tool_calls": none}]
        assert prompt_of(llm, messages) == "[assistant|x]>"


@pytest.mark.parametrize(
    "messages, error, match",
    [
        ([{"role": "user", "content": 5}], TypeError, "content of message 0 of conversation 0"),
        ([{"role": "user", "content": {"text": "x"}}], TypeError, "string or a list of text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], ValueError, "image_url"),
        ([{"role": "user", "content": [text_part("x"), 5]}], ValueError, "is no text: 5"),
        ([{"role": "user", "contents": "x"}], ValueError, 'no "content"'),
        ([{"content": "x"}], ValueError, '"role"'),
        ([HELLO, [{"role": None, "content": "x"}]], ValueError, "message 0 of conversation 1"),
        ([[]], ValueError, "conversation 0 is empty"),
        ([HELLO, []], ValueError, "conversation 1 is empty"),
        ("text", TypeError, "messages must be"),
        ([HELLO, "text"], TypeError, "messages must be"),
        (None, TypeError, "messages must be"),
        ([{"role": "assistant", "tool_calls": [call_of("{a")]}], ValueError, "not valid JSON"),
        ([{"role": "assistant", "tool_calls": ["add"]}], TypeError, "tool call"),
        ([{"role": "assistant", "tool_calls": "add"}], TypeError, "tool_calls of message 0"),
    ],
)
def test_messages_that_would_be_lost_are_refused(
    llm: LLM, messages: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        llm.chat(messages, ONE, use_tqdm=False, chat_template=SHOW)
    assert llm.is_finished()


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[0].name.first }}",
        "{% if %}",
        "{{ messages | no_such_filter }}",
    ],
)
@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_errors_of_a_template_are_value_errors(
    llm: LLM, template: str, options: dict[str, Any]
) -> None:
    if options:
        template = "{{ enable_thinking }}" + template
    with pytest.raises(ValueError, match="chat template"):
        llm.chat(HELLO, ONE, use_tqdm=False, chat_template=template, **options)


def test_no_conversation_gives_no_result(llm: LLM) -> None:
    assert llm.chat([]) == llm.generate([]) == []


def test_an_option_that_nobody_knows_is_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match="'sampling_parms'; did you mean 'sampling_params'"):
        llm.chat(HELLO, sampling_parms=ONE)
    with pytest.raises(TypeError, match="'add_generation_promt'"):
        llm.chat(HELLO, ONE, add_generation_promt=False)
    template = (
        "{% set thinks = enable_thinking | default(true) %}{% for m in messages %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
        "{% if thinks %}!{% endif %}"
    )
    for options in (
        {"enable_thinking": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ):
        assert prompt_of(llm, HELLO, chat_template=template, **options) == "Hello"
    with pytest.raises(TypeError, match="did you mean 'enable_thinking'"):
        llm.chat(HELLO, ONE, chat_template=template, enable_thinkin=False)
    with pytest.raises(TypeError, match="enable_thinking"):
        llm.chat(HELLO, ONE, chat_template_kwargs={"enable_thinking": False}, chat_template=SHOW)


def test_options_of_transformers(llm: LLM) -> None:
    assert prompt_of(llm, HELLO, add_generation_prompt=False) == "[user|Hello]"
    begun = [*HELLO, {"role": "assistant", "content": [text_part("I")]}]
    assert prompt_of(llm, begun, continue_final_message=True) == "[user|Hello][assistant|I"
    for options in (
        {"tokenize": False},
        {"return_dict": True},
        {"return_tensors": "pt"},
        {"padding": True},
    ):
        outputs = llm.chat(
            [HELLO, [*HELLO, *HELLO]], ONE, use_tqdm=False, chat_template=SHOW, **options
        )
        tokenizer = llm.get_tokenizer()
        assert tokenizer is not None
        texts = [tokenizer.decode(output["prompt_token_ids"]) for output in outputs]
        assert texts == ["[user|Hello]>", "[user|Hello][user|Hello]>"]


@pytest.mark.parametrize("added", [["<|im_start|>"], ["<|endoftext|>", "<|im_start|>"], []])
def test_a_templated_text_gets_no_second_bos(tmp_path: Path, added: list[str]) -> None:
    path = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = tokenizer.convert_tokens_to_ids(added)
    first = "".join(added)
    if added:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=" ".join([*added, "$A", "<|im_end|>"]),
            special_tokens=[(token, tokenizer.vocab[token]) for token in [*added, "<|im_end|>"]],
        )
    tokenizer.chat_template = first + "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    llm = LLM(str(path), device="cpu")
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    end = [2] if added else []
    for text, expected in (
        ("Hello", ids + plain + end),
        (first + "Hello", ids + plain + end),
        (2 * first + "Hello", 2 * ids + plain + end),  # the caller wants two
        (first, ids + end),
    ):
        if expected:
            (output,) = llm.generate(text, greedy(1), use_tqdm=False)
            assert output["prompt_token_ids"] == expected
    for tokenize in (True, False):
        (output,) = llm.chat(HELLO, ONE, use_tqdm=False, tokenize=tokenize)
        assert output["prompt_token_ids"] == ids + plain


CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
}


def test_a_template_that_concatenates_the_arguments_of_a_tool_call() -> None:
    """It wants the string that they are in OpenAI's form."""
    tokenizer: Any = AutoTokenizer.from_pretrained(DEMO_MODEL)
    template = (
        "{% for m in messages %}{{ m['content'] }}{% for c in m['tool_calls'] or [] %}"
        "{{ ':' + c['function']['arguments'] }}{% endfor %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}, CALL]
    (ids,) = apply_chat_template(tokenizer, messages, {"chat_template": template}, "demo")
    assert tokenizer.decode(ids) == 'hi:{"a": 1}'
    with pytest.raises(TypeError, match="'tools'"):  # which the template would ignore
        options = {"chat_template": template, "tools": [{"type": "function"}]}
        apply_chat_template(tokenizer, messages, options, "demo")
