"""The fields of a dataclass as options of a command line, read from its source.

`Config` imports PyTorch, which takes seconds. A command that is mistyped, or asked for its help,
shall not take them. So names, types, defaults and what the comments say of them are read from the
text of the file, where they are written once; what a value may be is checked by the class itself.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import tokenize
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METAVARS = {"int": "N", "float": "X", "str": "TEXT"}
NOUNS = {"N": "an integer", "X": "a number"}
TYPE_IGNORE = re.compile(r"type: ignore\[[\w-]+\]\s*(# ?)?")


@dataclass(frozen=True, slots=True)
class DeclaredOption:
    """A field of a dataclass, as its source has it."""

    name: str
    types: tuple[str, ...]  # the alternatives of its annotation, without None
    may_be_none: bool
    choices: tuple[str, ...]  # the strings that it may be; empty: any
    default: str  # as it is written
    comment: str  # above it and beside it, as one text

    @property
    def flag(self) -> str:
        """How the option is called on the command line."""
        return "--" + self.name.replace("_", "-")

    def add_to(self, parser: argparse._ArgumentGroup) -> None:
        """Have a parser know the option. An option that is not given leaves no trace."""
        options: dict[str, Any] = {"dest": self.name, "default": argparse.SUPPRESS}
        default = "" if self.default == "None" else f" (default: {self.default})"
        options["help"] = (self.comment + default).replace("%", "%%")
        if self.types == ("bool",):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = self.read_value
            options["metavar"] = self._metavar()
        parser.add_argument(self.flag, **options)

    def read_value(self, text: str) -> Any:
        """A value from the command line, or an argparse.ArgumentTypeError if it cannot be one."""
        if self.may_be_none and text.lower() == "none":
            return None
        if self.choices or self.types == ("str",):
            return text
        if "str" in self.types and text.lstrip()[:1] not in ("[", "{"):
            return text
        try:
            if self.types == ("int",):
                return int(text)
            if self.types == ("float",):
                return float(text)
            return json.loads(text)
        except ValueError:
            wanted = NOUNS.get(self._metavar(), "JSON")
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}") from None

    def _metavar(self) -> str:
        """What stands for the value in the help."""
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return METAVARS.get(self.types[0], "JSON")


def declared_options(module: str, class_name: str) -> list[DeclaredOption]:
    """The fields of a dataclass, in their order, without importing its module."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    comments = comments_of(source)
    named_choices = {
        ast.unparse(statement.targets[0]): statement.value
        for statement in tree.body
        if isinstance(statement, ast.Assign)
    }
    (declared,) = (
        each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == class_name
    )
    options = []
    for field in declared.body:
        if not isinstance(field, ast.AnnAssign) or field.value is None:
            continue  # a method, or the one field without a default
        annotation = field.annotation
        if ast.unparse(annotation).startswith("InitVar"):
            continue
        choices: tuple[str, ...] = ()
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
            assert isinstance(annotation.slice, ast.Tuple)
            annotation, limits = annotation.slice.elts
            choices = choices_in(named_choices.get(ast.unparse(limits), limits))
        types = [part.strip() for part in ast.unparse(annotation).split("|")]
        default = ast.unparse(field.value)
        options.append(
            DeclaredOption(
                name=ast.unparse(field.target),
                types=tuple(name for name in types if name != "None"),
                may_be_none="None" in types or default == "None",
                choices=choices,
                default=default,
                comment=comment_at(comments, field),
            )
        )
    return options


def choices_in(limits: ast.expr) -> tuple[str, ...]:
    """The names in `Choice(...)`; none in any other expression."""
    if not isinstance(limits, ast.Call) or ast.unparse(limits.func) != "Choice":
        return ()
    return tuple(ast.literal_eval(argument) for argument in limits.args)


@dataclass(frozen=True, slots=True)
class Comment:
    """A comment of a source file."""

    text: str  # without the "#"
    is_alone: bool  # whether nothing stands before it in its line


def comments_of(source: str) -> dict[int, Comment]:
    """All comments, by the numbers of their lines."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = TYPE_IGNORE.sub("", token.string.removeprefix("#").strip())
            is_alone = not token.line[: token.start[1]].strip()
            comments[token.start[0]] = Comment(text.strip(), is_alone)
    return comments


def comment_at(comments: dict[int, Comment], field: ast.AnnAssign) -> str:
    """What stands in the lines right above a field, and beside it."""
    first = field.lineno
    while first - 1 in comments and comments[first - 1].is_alone:
        first -= 1
    assert field.end_lineno is not None
    lines = range(first, field.end_lineno + 1)
    return " ".join(comments[line].text for line in lines if line in comments)
