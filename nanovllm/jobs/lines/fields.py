"""From the fields of a request to sampling parameters, and to what its answer is to show.

Fields are those of OpenAI's API and of vLLM's servers. Each function takes what it understands out
of a dict; what is left at the end is unknown (batch form) or the user's own (plain form). A field
that is null counts as absent everywhere: tables write null where a row has no value.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from nanovllm.jobs.lines.line import LineError
from nanovllm.sampling_params import SamplingParams
from nanovllm.vllm_compat.absent import ABSENT_PARAMS

# The field that is answered: of a chat, a completion, an embedding. Plain lines are searched for
# them in this order.
SUBJECTS = ("messages", "prompt", "input")
# Sampling parameters that have the same name and form in a line. Those of vLLM's that have no
# counterpart are passed on too: SamplingParams says what to do instead.
SAME_NAME = {each.name for each in dataclasses.fields(SamplingParams)} | ABSENT_PARAMS.keys()
SAME_NAME -= {"logprobs", "logit_bias", "structured_outputs"}

# Fields that change no result, whatever they say. "model" is one: there is one model in a job.
HARMLESS = {
    "cache_salt",
    "guided_decoding_backend",
    "metadata",
    "model",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
}
# Fields that are not served, the one value that asks for nothing, and what else there is to do.
UNSERVED: dict[str, tuple[Any, str]] = {
    "stream": (False, "a job writes whole answers; leave it out"),
    "echo": (False, "a chat has no text that could be repeated"),
    "suffix": ("", "put the text that is to follow into the prompt"),
    "audio": (None, "nothing but text is made"),
    "modalities": (["text"], "nothing but text is made"),
    "function_call": ("none", "use tools, or response_format"),
    "functions": ([], "use tools"),
    "return_tokens_as_token_ids": (False, "set return_token_ids"),
    "include_reasoning": (True, "what a model writes as its reasoning stays in its text"),
}
GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
TEMPLATE_OPTIONS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "documents",
    "reasoning_effort",
)
# All fields that mean something here: what is null of them is nothing of the user's.
KNOWN = {
    *SAME_NAME,
    *("logprobs", "logit_bias", "structured_outputs", "top_logprobs", "max_completion_tokens"),
    *("response_format", "guided_whitespace_pattern", *GUIDED),
    *("tools", "tool_choice", "chat_template_kwargs", *TEMPLATE_OPTIONS),
    *(*SUBJECTS, "echo", "return_token_ids"),
    *("add_special_tokens", "dimensions", "encoding_format", "normalize"),
}


NOUNS: dict[type, str] = {int: "an integer", bool: "true or false", dict: "an object"}


def present(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}


def take_params(fields: dict[str, Any]) -> dict[str, Any]:
    """Take the fields out that are sampling parameters; returns keyword arguments."""
    params = {name: whole(fields.pop(name)) for name in SAME_NAME & fields.keys()}
    if "max_completion_tokens" in fields:  # OpenAI's newer name goes before the older one
        params["max_tokens"] = whole(fields.pop("max_completion_tokens"))
    if "logit_bias" in fields:
        params["logit_bias"] = token_biases(fields.pop("logit_bias"))
    structure = take_structure(fields)
    if structure is not None:
        params["structured_outputs"] = structure
    logprobs = take_logprobs(fields)
    if logprobs is not None:
        params["logprobs"] = logprobs
    return params


def whole(value: Any) -> Any:
    """An integer in the place of a float that is one.

    A column of integers in a table of pandas becomes one of floats when a row has none.
    """
    return int(value) if type(value) is float and value.is_integer() else value


def take_logprobs(fields: dict[str, Any]) -> int | None:
    """Take out how many likeliest tokens are asked for at each position; None: no
    log-probabilities.

    A chat says `"logprobs": true` and has the number in `top_logprobs`; a completion, and a plain
    line, may have the number itself.
    """
    logprobs = fields.pop("logprobs", None)
    top_logprobs = fields.pop("top_logprobs", None)
    if logprobs is None or logprobs is False:
        if top_logprobs:
            raise LineError("top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        return None
    if logprobs is not True:
        return checked("logprobs", whole(logprobs), int)
    return checked("top_logprobs", whole(top_logprobs or 0), int)


def checked(name: str, value: Any, kind: type) -> Any:
    """The value, if it is of this type, which NOUNS has a word for."""
    if type(value) is not kind:
        message = f"{name} must be {NOUNS[kind]}, not {value!r:.60}"
        raise LineError(message, "invalid_type", name)
    return value


def token_biases(biases: Any) -> dict[int, Any]:
    """The biases with integers as keys: in JSON all keys are strings."""
    converted = {}
    for key, bias in checked("logit_bias", biases, dict).items():
        try:
            converted[int(key)] = bias
        except ValueError:
            raise LineError(
                f"logit_bias must have token ids as its keys, not {key!r:.60}",
                code="invalid_value",
                param="logit_bias",
            ) from None
    return converted


# --- structured output ----------------------------------------------------------------------------


def take_structure(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Take out what the text must be; returns keyword arguments of StructuredOutputsParams."""
    found: dict[str, dict[str, Any]] = {}  # name of the field -> what it asks for
    if "response_format" in fields:
        structure = response_structure(fields.pop("response_format"))
        if structure is not None:
            found["response_format"] = structure
    if "structured_outputs" in fields:
        structure = checked("structured_outputs", fields.pop("structured_outputs"), dict)
        found["structured_outputs"] = present(structure)
    for name, form in GUIDED.items():
        if name in fields:
            found[name] = {form: fields.pop(name)}
    whitespace = fields.pop("guided_whitespace_pattern", None)
    if len(found) > 1:
        names = " and ".join(found)
        raise LineError(f"only one of {names} can be given", "invalid_value", list(found)[1])
    if not found:
        return None
    (structure,) = found.values()
    if whitespace is not None:
        structure["whitespace_pattern"] = whitespace
    return structure


def response_structure(response_format: Any) -> dict[str, Any] | None:
    """What OpenAI's `response_format` asks for; None: any text."""
    response_format = checked("response_format", response_format, dict)
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise LineError(
            f"type of response_format must be text, json_object or json_schema, not {kind!r:.60}",
            code="invalid_value",
            param="response_format",
        )
    wrapper = response_format.get("json_schema")
    # OpenAI's chat has the schema in an object with its name; its other API has it right here.
    if wrapper is None:
        wrapper = response_format
    schema = checked("response_format.json_schema", wrapper, dict).get("schema")
    if schema is None:
        raise LineError(
            "response_format has no schema: json_schema must be an object with a schema in it",
            code="missing_required_parameter",
            param="response_format",
        )
    return {"json": schema}


# --- chat -----------------------------------------------------------------------------------------


def take_template_options(fields: dict[str, Any]) -> dict[str, Any]:
    """Take out what the chat template gets beside the messages.

    Tools are shown to the model. What it answers is text: calls in it are not parsed.
    """
    options = {name: fields.pop(name) for name in TEMPLATE_OPTIONS if name in fields}
    tools = fields.pop("tools", None)
    choice = fields.pop("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise LineError(
            f'tool_choice can be "auto" or "none", not {choice!r:.60}: no call is forced here; '
            "a response_format of the tool's schema is",
            code="unsupported_value",
            param="tool_choice",
        )
    if tools and choice == "auto":
        options["tools"] = tools
    more = fields.pop("chat_template_kwargs", None)
    if more is not None:
        options.update(checked("chat_template_kwargs", more, dict))
    return options


# --- what is left ---------------------------------------------------------------------------------


def refuse_unserved(fields: dict[str, Any]) -> None:
    """Raise for fields that are known, ask for something, and are not served; take them out."""
    for name, (harmless, remedy) in UNSERVED.items():
        value = fields.pop(name, harmless)
        if value != harmless:
            raise LineError(
                f"{name} cannot be {value!r:.60} in a job: {remedy}",
                code="unsupported_parameter",
                param=name,
            )


def refuse_unknown(fields: dict[str, Any]) -> None:
    """Raise for the first field that may change results in a way that nobody here knows."""
    refuse_unserved(fields)
    for name in fields:
        if name not in HARMLESS:
            raise LineError(
                f"{name!r:.60} is no field that is known here; leave it out",
                code="unknown_parameter",
                param=name,
            )
