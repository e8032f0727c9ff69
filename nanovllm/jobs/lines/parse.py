"""From a line of a job's input to what the engine is to be asked."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from nanovllm.jobs.lines import json_text
from nanovllm.jobs.lines.errors import param_error
from nanovllm.jobs.lines.fields import (
    KNOWN,
    SUBJECTS,
    checked,
    present,
    refuse_unknown,
    take_params,
    take_template_options,
)
from nanovllm.jobs.lines.line import Line, LineError
from nanovllm.jobs.lines.line_options import LineOptions
from nanovllm.jobs.lines.line_request import Kind, LineRequest, Prompt
from nanovllm.jobs.lines.unreadable import raise_if_unreadable
from nanovllm.pooling.params import PoolingParams
from nanovllm.sampling_params import SamplingParams

KIND_OF_URL: dict[str, Kind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "generate",
    "/v1/embeddings": "embed",
}
KIND_OF_SUBJECT: dict[str, Kind] = {"messages": "chat", "prompt": "generate", "input": "embed"}
# max_tokens of lines in the batch form that do not say, as OpenAI and vLLM's server have it; None:
# as many as fit. Plain lines have what SamplingParams has.
BATCH_MAX_TOKENS: dict[Kind, int | None] = {"chat": None, "generate": 16}


def parse_line(line: Line, options: LineOptions) -> LineRequest:
    """Read a line, in OpenAI's batch form or the plain one.

    Raises:
        LineError: for whatever is wrong with the line, and nothing else.
    """
    fields = load_fields(line.data)
    try:
        if is_batch(fields):
            return parse_batch(line.number, fields, options)
        return parse_plain(line.number, fields, options)
    except RecursionError:
        raise LineError("the line is nested too deeply", "invalid_json") from None


def load_fields(data: bytes) -> dict[str, Any]:
    """The object that a line holds."""
    raise_if_unreadable(data)
    try:
        fields = json_text.load(data)
    except ValueError as error:
        raise LineError(f"the line is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(fields, dict):
        raise LineError(
            f"the line must be a JSON object, not {type(fields).__name__}", "not_an_object"
        )
    return fields


def is_batch(fields: dict[str, Any]) -> bool:
    """Whether a line is in OpenAI's batch form, and not a plain one with such a field of its own.

    One that names a prompt, messages or input is a plain one: a table of web pages has "url" and
    "body" too.
    """
    if any(name in fields for name in SUBJECTS):
        return False
    return "body" in fields or ("custom_id" in fields and "url" in fields)


# --- the two forms --------------------------------------------------------------------------------


def parse_batch(number: int, fields: dict[str, Any], options: LineOptions) -> LineRequest:
    """Read a line of OpenAI's batch form."""
    custom_id = required(fields, "custom_id")
    if not isinstance(custom_id, str):
        raise LineError(
            f"custom_id must be a string, not {custom_id!r:.60}", "invalid_type", "custom_id"
        )
    method = fields.get("method", "POST")
    if method != "POST":
        raise LineError(f'method must be "POST", not {method!r:.60}', "invalid_method", "method")
    url = required(fields, "url")
    kind = KIND_OF_URL.get(url) if isinstance(url, str) else None
    if kind is None:
        known = ", ".join(KIND_OF_URL)
        raise LineError(f"url must be one of {known}, not {url!r:.60}", "unknown_url", "url")
    body = present(checked("body", required(fields, "body"), dict))
    usual = {"max_tokens": BATCH_MAX_TOKENS[kind]} if kind in BATCH_MAX_TOKENS else {}
    request = RequestParser(number, kind, body, options, usual).parse()
    refuse_unknown(body)
    request.is_batch = options.form != "plain"
    request.custom_id = custom_id
    request.carried = {"custom_id": custom_id}
    return request


def parse_plain(number: int, fields: dict[str, Any], options: LineOptions) -> LineRequest:
    """Read a line of the plain form, whose other fields go on to the answer."""
    subject = next((name for name in SUBJECTS if fields.get(name) is not None), None)
    if subject is None:
        raise LineError(
            "the line has none of messages, prompt, input, and no body",
            code="missing_required_parameter",
            param="prompt",
        )
    rest = present(fields)
    kind = KIND_OF_SUBJECT[subject]
    request = RequestParser(number, kind, rest, options, usual={}).parse()
    if len(request.prompts) > 1:
        raise LineError(
            f"a plain line has one {subject}, not a list of {len(request.prompts)}",
            code="invalid_value",
            param=subject,
        )
    request.is_batch = options.form == "batch"
    request.custom_id = plain_custom_id(number, fields)
    request.carried = carried_fields(fields, rest, options)
    return request


def required(fields: dict[str, Any], name: str) -> Any:
    """The value of a field that must be there."""
    if fields.get(name) is None:
        raise LineError(f"the line has no {name}", "missing_required_parameter", name)
    return fields[name]


def plain_custom_id(number: int, fields: dict[str, Any]) -> str:
    """What a plain line is called where its answer is to be in the batch form."""
    custom_id = fields.get("custom_id", number)
    return custom_id if isinstance(custom_id, str) else str(number)


def carried_fields(
    fields: dict[str, Any], rest: dict[str, Any], options: LineOptions
) -> dict[str, Any]:
    """The fields of a plain line that its answer repeats.

    rest: those that nothing was made of, but for null ones. What is null and would be a parameter
    is left out.
    """
    kept = SUBJECTS if options.keep_prompt else ()
    return {
        name: value
        for name, value in fields.items()
        if name in rest or name in kept or (value is None and name not in KNOWN)
    }


# --- what both have -------------------------------------------------------------------------------


@dataclass(slots=True)
class RequestParser:
    """Makes a request of the body of a batch line, or of a whole plain one."""

    number: int  # of the line
    kind: Kind
    fields: dict[str, Any]  # none is null; what is understood is taken out
    options: LineOptions
    usual: dict[str, Any]  # sampling parameters that this form has unless somebody says otherwise

    def parse(self) -> LineRequest:
        """The request, but for what the two forms have in different places."""
        if self.kind == "embed":
            return self.embedding()
        names = list(self.fields)
        if self.kind == "chat":
            messages = checked_messages(required(self.fields, "messages"))
            del self.fields["messages"]
            given = take_template_options(self.fields)
            template_options = {**self.options.chat_template_kwargs, **given}
            prompts: list[Prompt] = []
        else:
            messages = []
            template_options = {}
            prompts = checked_prompts("prompt", required(self.fields, "prompt"))
            del self.fields["prompt"]
        self.check_special_tokens()
        echo = self.kind == "generate" and self.flag("echo")
        shows_ids = self.flag("return_token_ids")
        params = self.sampling_params(names, max(len(prompts), 1))
        if echo:
            check_echo(prompts, params[0])
        return LineRequest(
            number=self.number,
            kind=self.kind,
            params=params,
            prompts=prompts,
            messages=messages,
            template_options=template_options,
            echo=echo,
            shows_ids=shows_ids or not params[0].detokenize,
            model=self.options.model,
        )

    def embedding(self) -> LineRequest:
        """The request of a line that asks for vectors."""
        names = list(self.fields)
        prompts = checked_prompts("input", required(self.fields, "input"))
        del self.fields["input"]
        self.check_special_tokens()
        encoding = self.fields.pop("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise LineError(
                f'encoding_format must be "float" or "base64", not {encoding!r:.60}',
                code="invalid_value",
                param="encoding_format",
            )
        usual = self.options.defaults.get("truncate_prompt_tokens")
        truncation = self.fields.pop("truncate_prompt_tokens", usual)
        given = {}
        for name in ("dimensions", "normalize"):
            if name in self.fields:
                given[name] = self.fields.pop(name)
        try:
            # The engine takes the truncation as a sampling parameter, and checks it as one.
            SamplingParams(truncate_prompt_tokens=truncation)
            params = PoolingParams(**given)
        except (TypeError, ValueError) as error:
            raise param_error(error, names) from None
        return LineRequest(
            number=self.number,
            kind="embed",
            params=[params] * len(prompts),
            prompts=prompts,
            truncate_prompt_tokens=truncation,
            base64=encoding == "base64",
            model=self.options.model,
        )

    def check_special_tokens(self) -> None:
        """Take out whether the tokenizer adds special tokens, which is decided: to texts it does,
        and a chat has those of its template.
        """
        decided = self.kind != "chat"
        if self.fields.pop("add_special_tokens", decided) != decided:
            raise LineError(
                f"add_special_tokens cannot be {not decided} here; pass token ids instead",
                code="unsupported_value",
                param="add_special_tokens",
            )

    def flag(self, name: str) -> bool:
        """Take out a field that is true or false; False where it is not there."""
        return checked(name, self.fields.pop(name, False), bool)

    def sampling_params(self, names: list[str], number: int) -> list[SamplingParams]:
        """Take out the sampling parameters, and make them for so many prompts.

        names: of all fields that the line had, to say which one is wrong.
        """
        given = take_params(self.fields)
        merged = {**self.usual, **self.options.recommended, **self.options.defaults, **given}
        has_seed = merged.get("seed") is not None or self.options.seed is None
        try:
            if has_seed:
                return [SamplingParams(**merged)] * number
            # Equal prompts of one line are to get different completions.
            return [SamplingParams(**{**merged, "seed": self.seed(i)}) for i in range(number)]
        except (TypeError, ValueError) as error:
            raise param_error(error, names) from None

    def seed(self, index: int) -> int:
        """The seed of prompt number `index`, the same whenever and wherever the line is run."""
        key = f"{self.options.seed} {self.number} {index}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1  # below 2**63


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages of one conversation, without fields that are null, as tables have them."""
    is_list = isinstance(messages, list)
    if not is_list or not all(isinstance(message, dict) for message in messages):
        raise LineError(
            f"messages must be a list of objects, not {messages!r:.60}", "invalid_type", "messages"
        )
    if not messages:
        raise LineError("messages must hold at least one message", "invalid_value", "messages")
    return [
        {key: value for key, value in message.items() if value is not None or key == "content"}
        for message in messages
    ]


def checked_prompts(name: str, value: Any) -> list[Prompt]:
    """The prompts of a line: it has a text, token ids, or a list of either."""
    if isinstance(value, str) or is_token_ids(value):
        return [value]
    if isinstance(value, list) and all(isinstance(v, str) or is_token_ids(v) for v in value):
        if not value:
            raise LineError(f"{name} must not be empty", "invalid_value", name)
        return value
    raise LineError(
        f"{name} must be a string, a list of token ids, or a list of either, not {value!r:.60}",
        code="invalid_type",
        param=name,
    )


def is_token_ids(value: Any) -> bool:
    """Whether it is a list of integers, one at least."""
    return isinstance(value, list) and set(map(type, value)) == {int}


def check_echo(prompts: list[Prompt], params: SamplingParams) -> None:
    """Raise unless the text of an answer can begin with the prompt."""
    if not all(isinstance(prompt, str) for prompt in prompts):
        raise LineError(
            "echo needs a prompt that is a text, not token ids", "unsupported_value", "echo"
        )
    if params.logprobs is not None:
        raise LineError(
            "echo cannot be combined with logprobs here; prompt_logprobs has the prompt's",
            code="unsupported_value",
            param="echo",
        )
