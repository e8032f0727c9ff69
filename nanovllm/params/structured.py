"""What the text of a completion must be: the form of `SamplingParams.structured_outputs`."""

import json
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

NAMED_PARTS = ("properties", "patternProperties", "$defs", "definitions")  # in a schema
FORMS = ("json", "regex", "choice", "grammar", "json_object")  # exactly one of them is given


@dataclass(frozen=True, slots=True)
class StructuredOutputsParams:
    """The form of a completion's text: exactly one of these. Names and meanings are vLLM's.

    Enforced token by token: only tokens are drawn with which the text can still become right. A
    completion that ends with "stop" is right; one that ends with "length" is the beginning of one.
    What is kept is a copy that cannot be changed; a schema is kept as its JSON text.
    """

    # JSON that fits a schema: the schema's text, a dict, or a pydantic model (its class). True, as
    # a schema, allows any JSON.
    json: Any = None
    # What the whole text matches, in the syntax of Rust's `regex`: there is no lookaround. Digits,
    # words and blanks (\d, \w, \s) are those of ASCII.
    regex: str | None = None
    choice: SequenceOf[str] | None = None  # one of these strings
    grammar: str | None = None  # a context-free grammar, in Lark's syntax or as GBNF (`root ::=`)
    json_object: bool | None = None  # True: any JSON object
    # Between the parts of JSON: the regular expression of what may stand there, if anything does.
    # None: a blank, or a line break and an indentation. (Without a limit, models lose themselves.)
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool = False  # whether nothing may stand there
    # Whether objects have only those properties that the schema names, where it does not say.
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(
                "structured_outputs takes exactly one of json, regex, choice, grammar and "
                f"json_object=True, not {found}"
            )
        name = given[0]
        checked = getattr(self, name)
        if name == "json":
            checked = schema_text(checked, self.disable_additional_properties)
        elif name == "choice":
            checked = checked_choices(checked)
        elif name == "json_object":
            if checked is not True:
                raise TypeError(f"json_object must be True, False or None, not {checked!r}")
        elif not isinstance(checked, str):
            raise TypeError(f"{name} must be a string, not {checked!r}")
        object.__setattr__(self, name, checked)
        pattern = self.whitespace_pattern
        if pattern is not None and not isinstance(pattern, str):
            raise TypeError(f"whitespace_pattern must be a string or None, not {pattern!r}")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")

    @property
    def kind(self) -> str:
        """The name of the form that is given."""
        return next(name for name in FORMS if getattr(self, name) not in (None, False))


def schema_text(schema: Any, is_closed: bool = False) -> str:
    """Return the JSON text of a schema, however it was passed; raise if it is none.

    is_closed: whether its objects get no properties but those that it names.
    """
    if hasattr(schema, "model_json_schema"):  # a pydantic model
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise ValueError(
                f"json of structured_outputs is not the text of a schema: {error}: {schema!r:.100}"
            ) from None
    if not isinstance(schema, (dict, bool)):
        raise TypeError(
            "json of structured_outputs must be a JSON schema: a dict, its text, or a pydantic "
            f"model class, not {schema!r:.100}"
        )
    if is_closed:
        schema = closed(schema)
    try:
        return json.dumps(schema)
    except (TypeError, ValueError) as error:  # it holds an object that JSON has no form for
        raise ValueError(f"json of structured_outputs is no JSON schema: {error}") from error


def closed(schema: Any) -> Any:
    """Copy a schema, with "additionalProperties": false where it names properties and no others."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    copy: dict[str, Any] = {}
    for key, value in schema.items():
        if key in NAMED_PARTS and isinstance(value, dict):
            # Not a schema itself: its keys are names of the user's.
            copy[key] = {name: closed(part) for name, part in value.items()}
        elif key not in ("enum", "const"):
            copy[key] = closed(value)
        else:
            copy[key] = value
    if "properties" in copy and "patternProperties" not in copy:
        copy.setdefault("additionalProperties", False)
    return copy


def checked_choices(choices: Any) -> tuple[str, ...]:
    """Turn a list of strings into a tuple; raise if it is none, or empty."""
    is_list = isinstance(choices, (list, tuple))
    if not is_list or not all(isinstance(choice, str) for choice in choices):
        raise TypeError(f"choice must be a list of strings, not {choices!r}")
    if not choices:
        raise ValueError("choice must hold at least one string")
    return tuple(choices)
