"""Random JSON schemas, for tests of structured outputs."""

import random
from typing import Any

WORDS = ["a", "name", "x y", "é", "zip_code", "Größe", "tags", "0", 'with "quotes"', "id"]


def random_schema(r: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema whose values are short. It nests up to `depth` levels of arrays and objects."""
    makers = [string, integer, number, choices, one_word, literal]
    if depth > 0:
        makers += [array, record, record, either]
    return r.choice(makers)(r, depth)


def string(r: random.Random, depth: int) -> dict[str, Any]:
    if r.random() < 0.3:
        patterns = ["^[0-9]{5}$", "^[a-c]+-[xyz]{2}$", "^(on|off)$", "^[A-Z][a-z]{1,6}$"]
        return {"type": "string", "pattern": r.choice(patterns)}
    if r.random() < 0.2:
        return {"type": "string", "format": r.choice(["date", "uuid", "ipv4"])}
    shortest = r.randint(0, 3)
    return {"type": "string", "minLength": shortest, "maxLength": shortest + r.randint(0, 9)}


def integer(r: random.Random, depth: int) -> dict[str, Any]:
    least = r.randint(-1_000, 1_000)
    return {"type": "integer", "minimum": least, "maximum": least + r.randint(0, 500)}


def number(r: random.Random, depth: int) -> dict[str, Any]:
    least = r.randint(-10, 10)
    return {"type": "number", "minimum": least, "maximum": least + r.randint(1, 100)}


def choices(r: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": r.sample([*WORDS, 1, 2.5, True, None, "on", "off"], r.randint(1, 5))}


def one_word(r: random.Random, depth: int) -> dict[str, Any]:
    return {"type": r.choice(["boolean", "null"])}


def literal(r: random.Random, depth: int) -> dict[str, Any]:
    return {"const": r.choice([*WORDS, 7, False, {"k": [1, 2]}])}


def array(r: random.Random, depth: int) -> dict[str, Any]:
    least = r.randint(0, 2)
    schema = {"type": "array", "minItems": least, "maxItems": least + r.randint(0, 2)}
    return schema | {"items": random_schema(r, depth - 1)}


def record(r: random.Random, depth: int) -> dict[str, Any]:
    names = r.sample(WORDS, r.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(r, depth - 1) for name in names},
        "required": r.sample(names, r.randint(0, len(names))),
        "additionalProperties": False,
    }


def either(r: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(r, depth - 1) for _ in range(r.randint(2, 3))]}


def schema_with_definition(r: random.Random) -> dict[str, Any]:
    """One with a definition that two properties refer to."""
    reference = {"$ref": "#/$defs/part"}
    return {
        "type": "object",
        "properties": {"first": reference, "second": reference},
        "required": ["first"],
        "additionalProperties": False,
        "$defs": {"part": random_schema(r, 1)},
    }
