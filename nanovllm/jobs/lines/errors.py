"""From the exceptions of the engine to what an answer says is wrong."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from nanovllm.inputs import PromptTooLong
from nanovllm.jobs.lines.fields import GUIDED, KNOWN, SUBJECTS
from nanovllm.jobs.lines.line import LineError

# Names that a sampling parameter may have in a line, beside its own.
ALIASES: dict[str, Collection[str]] = {
    "max_tokens": ("max_completion_tokens",),
    "logprobs": ("top_logprobs",),
    "structured_outputs": ("response_format", *GUIDED),
}
PLURAL = {"message": "messages", "conversation": "messages"}  # what messages say -> its field
MAX_MESSAGE = 2000  # characters; some messages repeat a value, which may be as long as the line
# What the engine's messages call the prompt, of which a line has one.
NUMBERED = re.compile(r"\b(prompt|conversation) 0\b")


def param_error(error: Exception, names: Collection[str] = ()) -> LineError:
    """What is wrong with a line of which the engine says so with a TypeError or ValueError.

    names: of the line's fields, in which the wrong one may have another name than the engine's.
    """
    code = "invalid_type" if isinstance(error, TypeError) else "invalid_value"
    return LineError(own_words(error), code, param_in(str(error), names))


def param_in(message: str, names: Collection[str]) -> str | None:
    """The field that a message of the engine's is about: the first one that it names."""
    for word in re.findall(r"\w+", message)[:6]:
        word = PLURAL.get(word, word)
        if word not in KNOWN:
            continue
        for name in (word, *ALIASES.get(word, ())):
            if name in names:
                return name
        return word
    return None


def own_words(error: BaseException) -> str:
    """The message of an error, without the number of the only prompt there is."""
    message = NUMBERED.sub(r"the \1", str(error), count=1)
    return message[:MAX_MESSAGE] or type(error).__name__


def line_error(error: BaseException, fields: Mapping[str, Any]) -> LineError:
    """What an answer says of any exception: a wrong line is 400, all else is 500.

    fields: of the line.
    """
    if isinstance(error, LineError):
        return error
    body = fields.get("body")
    names = list(body if isinstance(body, dict) else fields)
    if isinstance(error, PromptTooLong):
        subject = next((name for name in SUBJECTS if name in names), None)
        return LineError(own_words(error), "context_length_exceeded", subject)
    if isinstance(error, (TypeError, ValueError)):
        return param_error(error, names)
    return LineError(own_words(error), "server_error", status=500)
