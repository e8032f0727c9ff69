"""From conversations to prompts: the messages are brought into the form that chat templates expect,
and the tokenizer's template is applied.

Templates are programs that come with the checkpoint. Most of them take `content` for a string and
`arguments` for a dict, and say nothing about a message or an option that they do not understand. So
what a caller may well pass in OpenAI's form is converted here, and what would be lost is refused.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, TemplateError, meta
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from nanovllm.inputs import TokensPrompt
from nanovllm.vllm_compat.absent import ABSENT_IN_CHAT, without_absent

if TYPE_CHECKING:
    from nanovllm.engine.requests import InputProcessor

Message = dict[str, Any]
Conversation = list[Message]

# `generate` takes lists of token ids, whatever the caller asks the tokenizer for.
FORCED = {"tokenize": True, "return_dict": False, "return_tensors": None, "padding": False}

# A tag of transformers' own, around what the assistant says; jinja2 alone does not know it.
GENERATION_TAG = re.compile(r"{%[-+]?\s*(end)?generation\s*[-+]?%}")


# Options that say how transformers makes tokens of a text: what they do is left to it.
OF_TOKENIZING = {
    "max_length",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
    "truncation",
}


def prompts_of_chats(
    inputs: InputProcessor, messages: Any, options: dict[str, Any]
) -> list[TokensPrompt]:
    """Return what an engine's `chat` completes; raises what `chat_prompts` does.

    inputs: the engine's. messages: one conversation, or a list of them. options: of the template.
    """
    options = without_absent("LLM.chat", options, ABSENT_IN_CHAT).kept
    with inputs.lock:
        return chat_prompts(inputs.tokenizer, messages, options, inputs.config.model)


def apply_chat_template(
    tokenizer: PreTrainedTokenizerBase | None, messages: Any, options: dict[str, Any], model: str
) -> list[list[int]]:
    """Return the token ids of one conversation, or of each of a list of them: `chat_prompts`."""
    prompts = chat_prompts(tokenizer, messages, options, model)
    return [prompt["prompt_token_ids"] for prompt in prompts]


def chat_prompts(
    tokenizer: PreTrainedTokenizerBase | None, messages: Any, options: dict[str, Any], model: str
) -> list[TokensPrompt]:
    """Return the prompt of one conversation, or of each of a list of them, with its text if it is
    known.

    Raises:
        TypeError: for messages that are no conversation, and for an option that neither
            transformers nor the template knows.
        ValueError: without a template, and for messages that it refuses.
    """
    conversations = list_of_conversations(messages)
    template = find_template(tokenizer, options, model)
    assert tokenizer is not None  # `find_template` has seen to it
    check_options(tokenizer, template, options)
    if not conversations:
        return []
    continues = bool(options.get("continue_final_message"))
    options = {"add_generation_prompt": not continues, **options, **FORCED}
    chosen = []
    for index, conversation in enumerate(conversations):
        checked = check_conversation(index, conversation)
        chosen.append(choose_form(tokenizer, checked, conversation, options))
    try:
        return encode_conversations(tokenizer, chosen, options)
    except Exception as error:  # jinja's own, or whatever a template's expression raises
        raise ValueError(
            f"the chat template of {model} cannot be applied to these messages: "
            f"{type(error).__name__}: {error}"
        ) from error


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], options: dict[str, Any]
) -> list[TokensPrompt]:
    """Apply the template; raises whatever it or the tokenizer does."""
    is_usual = type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
    if not is_usual or not OF_TOKENIZING.isdisjoint(options):
        prompts: Any = tokenizer.apply_chat_template(conversations, **options)
        return [{"prompt_token_ids": token_ids} for token_ids in prompts]
    # The same in two steps, between which there is the text.
    texts: Any = tokenizer.apply_chat_template(conversations, **{**options, "tokenize": False})
    encoded = tokenizer(texts, add_special_tokens=False, padding=False)["input_ids"]
    return [
        {"prompt_token_ids": token_ids, "prompt": text}
        for token_ids, text in zip(encoded, texts, strict=True)
    ]


# --- the form that a template reads ---------------------------------------------------------------

# A checked conversation has strings as contents and dicts as arguments of tool calls, which is what
# most templates read. Some say more of what the caller passed: they test whether there is a
# content, read parts of text one by one, or concatenate arguments, which must be strings then.


def choose_form(
    tokenizer: PreTrainedTokenizerBase,
    checked: Conversation,
    original: Conversation,
    options: dict[str, Any],
) -> Conversation:
    """Return a conversation with contents and arguments each as checked or as the caller passed
    them, whichever the template says more of.
    """
    passed_contents = with_contents(checked, original)
    passed_calls = with_calls(checked, original)
    if checked == passed_contents == passed_calls:
        return checked  # nearly always: there is one form only
    render = partial(try_template, tokenizer, options)
    for strings in (checked, passed_calls):
        text = render(strings)
        passed = with_contents(strings, original)
        if is_understood(passed, strings, text, render):
            return passed
        if text is not None:
            return strings
    return passed_contents  # refused in any form; the error is to be about what was passed


def try_template(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], messages: Conversation
) -> str | None:
    """The text that the template makes of a conversation; None if it refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, **{**options, "tokenize": False}))
    except Exception:  # jinja's own, or whatever a template's expression raises
        return None


def is_understood(
    passed: Conversation,
    strings: Conversation,
    text: str | None,
    render: Callable[[Conversation], str | None],
) -> bool:
    """Whether a template makes sense of contents that are absent, None, or lists of parts.

    passed: a conversation with such contents. strings: the same with strings as all contents.
    text: what the template makes of `strings`; None if it refuses them.
    """
    passed_text = render(passed)
    if passed_text is None:
        return False
    if passed_text.count("None") > (text or "").count("None"):
        return False  # it has written out that there is no content
    lists = [message["content"] for message in passed if has_parts(message)]
    if not lists:
        return True
    # A template that takes every content for a string writes a list as Python does. It is found out
    # by lists of one part: one that reads parts writes them like strings.
    single_parts = list(strings)
    for index, message in enumerate(passed):
        if has_parts(message):
            part = text_part(strings[index]["content"])
            single_parts[index] = {**strings[index], "content": [part]}
    if text is None or render(single_parts) != text:
        return False
    return all(part["text"].strip() in passed_text for parts in lists for part in parts)


def has_parts(message: Message) -> bool:
    """Whether the content of a message is a list of parts."""
    return isinstance(message.get("content"), list)


def with_calls(checked: Conversation, original: Conversation) -> Conversation:
    """Return checked messages with their tool calls, if any, as the caller passed them."""
    messages = []
    for message, passed in zip(checked, original, strict=True):
        if "tool_calls" in message:
            message = {**message, "tool_calls": passed["tool_calls"]}
        messages.append(message)
    return messages


def with_contents(checked: Conversation, original: Conversation) -> Conversation:
    """Return checked messages with no content, or its parts of text, where that was passed."""
    return [with_content(*pair) for pair in zip(checked, original, strict=True)]


def with_content(message: Message, passed: Message) -> Message:
    """`with_contents` for one message."""
    if "content" not in passed:
        return {key: value for key, value in message.items() if key != "content"}
    content = passed["content"]
    if content is None:
        return {**message, "content": None}
    if isinstance(content, str) or len(content) < 2:  # one part is the string
        return message
    return {**message, "content": [text_part(part_text("", part)) for part in content]}


def text_part(text: str) -> dict[str, str]:
    """A part of a content in OpenAI's form."""
    return {"type": "text", "text": text}


# --- checks ---------------------------------------------------------------------------------------


def find_template(
    tokenizer: PreTrainedTokenizerBase | None, options: dict[str, Any], model: str
) -> str:
    """The template that will be used: the one passed (or its name), or the tokenizer's."""
    chosen = options.get("chat_template")
    if tokenizer is None or not (chosen or getattr(tokenizer, "chat_template", None)):
        raise ValueError(f"{model} has no chat template; pass chat_template=..., or use generate")
    if chosen is not None and not isinstance(chosen, str):
        raise TypeError(f"chat_template must be a string, not {chosen!r}")
    return tokenizer.get_chat_template(chosen, options.get("tools"))


def check_options(
    tokenizer: PreTrainedTokenizerBase, template: str, options: dict[str, Any]
) -> None:
    """Raise unless every option is one of transformers or a variable of the template, which would
    ignore any other.
    """
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters
    known = parameters.keys() - {"conversation", "kwargs"}
    passed_on = {name for name in ("tools", "documents") if options.get(name)}
    others = (options.keys() - known) | passed_on
    if not others:
        return
    try:
        variables = meta.find_undeclared_variables(
            Environment(extensions=[loopcontrols]).parse(GENERATION_TAG.sub("", template))
        )
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be read: {error}") from error
    for name in sorted(others - variables):
        names = {*variables, *known, "sampling_params", "use_tqdm"} - {name}
        nearest = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise TypeError(f"neither chat nor the chat template has an option {name!r}{hint}")


def list_of_conversations(messages: Any) -> list[Conversation]:
    """One conversation or a list of them, as a list; TypeError if it is neither."""
    is_list = isinstance(messages, (list, tuple))
    if is_list and messages and is_conversation(messages):
        return [messages]
    if is_list and all(is_conversation(item) for item in messages):
        return list(messages)
    raise TypeError(
        f"messages must be a conversation (a list of dicts) or a list of them, not {messages!r}"
    )


def is_conversation(value: Any) -> bool:
    """Whether it is a list or tuple of dicts."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, dict) for item in value)


def check_conversation(index: int, conversation: Conversation) -> Conversation:
    """Check the messages of conversation number `index`, and return them as templates expect."""
    if not conversation:
        raise ValueError(f"conversation {index} is empty; it must have at least one message")
    return [
        check_message(f"message {number} of conversation {index}", message)
        for number, message in enumerate(conversation)
    ]


def check_message(name: str, message: Message) -> Message:
    """Return a copy of a message, with a string as its content and its arguments as dicts."""
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f'{name} must have a "role", such as "user": {message!r:.100}')
    calls = message.get("tool_calls")
    if "content" not in message and not calls:
        raise ValueError(f'{name} has no "content": {message!r:.100}')
    checked = {**message, "content": content_text(name, message.get("content"))}
    if calls:
        if not isinstance(calls, (list, tuple)):
            raise TypeError(f"tool_calls of {name} must be a list, not {calls!r:.100}")
        checked["tool_calls"] = [check_tool_call(name, call) for call in calls]
    elif "tool_calls" in message:
        del checked["tool_calls"]  # None or empty: some templates ask only whether it is there
    return checked


def content_text(name: str, content: Any) -> str:
    """The content of a message as one string: of text parts, joined with newlines, or of None."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise TypeError(
            f"content of {name} must be a string or a list of text parts, not {content!r:.100}"
        )
    return "\n".join(part_text(name, part) for part in content)


def part_text(name: str, part: Any) -> str:
    """The text of one part of the content of a message."""
    text = part
    if isinstance(part, dict):
        text = part.get("text")
        if part.get("type", "text") not in ("text", "input_text", "output_text"):
            text = None
    if not isinstance(text, str):
        raise ValueError(
            f"content of {name} has a part that is no text: {part!r:.100}; only parts like "
            '{"type": "text", "text": "..."} can be used'
        )
    return text


def check_tool_call(name: str, call: Any) -> Any:
    """Return a tool call whose arguments, if they are a JSON string, are what that stands for."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise TypeError(f"a tool call of {name} must be a dict of a function, not {call!r:.100}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except ValueError as error:
        raise ValueError(
            f"the arguments of a tool call of {name} are not valid JSON: {arguments!r:.100}"
        ) from error
    function = {**function, "arguments": parsed}
    return {**call, "function": function} if "function" in call else function
