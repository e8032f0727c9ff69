"""Which layers of a model are quantised, and how: formats by the names of modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from nanovllm.checkpoints.wrappers import TEXT_PREFIXES
from nanovllm.quantization.unquantized import UNQUANTIZED
from nanovllm.quantization.weight_format import WeightFormat

EVERY_LAYER = "Linear"  # the class of linear layers in PyTorch: what most checkpoints name
REGULAR_EXPRESSION = "re:"  # what an expression begins with, in checkpoints of compressed-tensors
SPECIAL = re.compile(r"[*+?^$|()\[\]\\]")  # in an expression, and in no name


@dataclass(frozen=True)
class ModuleNames:
    """What a checkpoint says of which modules it means.

    An entry is the name of a module ("model.layers.0.mlp.gate"), some parts of one in a row, which
    is each module that has them ("mlp.gate", "lm_head", "model.layers.0"), a regular expression
    for the beginning of a name ("re:.*mlp.gate$", or as transformers has them, without "re:"), or
    "Linear", which is all.
    """

    entries: tuple[str, ...]

    @cached_property
    def _expressions(self) -> list[re.Pattern[str]]:
        found = []
        for entry in self.entries:
            is_marked = entry.startswith(REGULAR_EXPRESSION)
            if not is_marked and not SPECIAL.search(entry):
                continue
            try:
                found.append(re.compile(entry.removeprefix(REGULAR_EXPRESSION)))
            except re.error as error:
                raise ValueError(
                    f"quantization_config names the modules {entry!r}, which is no regular "
                    f"expression: {error}"
                ) from error
        return found

    @cached_property
    def _names(self) -> frozenset[str]:
        # Some end in a dot ("model.layers.1."), so that a search for parts of names finds no 11.
        return frozenset(entry.strip(".") for entry in self.entries)

    def include(self, name: str) -> bool:
        """Whether a module is meant."""
        if EVERY_LAYER in self._names:
            return True
        if any(part in self._names for part in parts_of(name)):
            return True
        return any(expression.match(name) for expression in self._expressions)


def parts_of(name: str) -> Iterator[str]:
    """The parts in a row that a name has: of "a.b.c" a, a.b, a.b.c, b, b.c, c."""
    parts = name.split(".")
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:end])


def names_in_checkpoints(name: str) -> list[str]:
    """A module's name, and those that it has where a text model is inside of another model."""
    names = [name]
    for prefix, replacement in TEXT_PREFIXES.items():
        if name.startswith(replacement):
            names.append(prefix + name.removeprefix(replacement))
    return names


@dataclass(frozen=True)
class Rule:
    """The format of some modules."""

    targets: ModuleNames
    weight_format: WeightFormat


@dataclass(frozen=True)
class Scheme:
    """Which module of a checkpoint is in which format."""

    name: str  # of the option `quantization`: the checkpoint's quant_method, or "fp8"
    rules: tuple[Rule, ...]  # the first that names a module counts
    ignored: ModuleNames = field(default_factory=lambda: ModuleNames(()))  # not quantised at all

    def format_of(self, name: str) -> WeightFormat:
        """The format of one module of the checkpoint."""
        names = names_in_checkpoints(name)
        if any(self.ignored.include(each) for each in names):
            return UNQUANTIZED
        for rule in self.rules:
            if any(rule.targets.include(each) for each in names):
                return rule.weight_format
        return UNQUANTIZED

    def choose(self, layer: str, modules: Sequence[str]) -> WeightFormat:
        """The format of a layer here, which merges some modules of the checkpoint.

        A checkpoint may also leave a layer out by the name that it has here ("qkv_proj").

        Raises:
            ValueError: the modules are of different formats, so that they are not one matrix.
        """
        if any(self.ignored.include(each) for each in names_in_checkpoints(layer)):
            return UNQUANTIZED
        formats = {module: self.format_of(module) for module in modules}
        first, *others = formats
        for other in others:
            if formats[other] != formats[first]:
                raise ValueError(
                    f"quantization_config has {first} in the format {describe(formats[first])} and "
                    f"{other} in the format {describe(formats[other])}; they are one matrix here, "
                    "so all of them must be quantised alike, or none"
                )
        return formats[first]


def describe(weight_format: WeightFormat) -> str:
    """How a format is called in messages."""
    return "16 bits" if weight_format is UNQUANTIZED else repr(weight_format)


def as_names(entries: Collection[str] | None) -> ModuleNames:
    """The names that a list of a quantization_config has; None is an empty one.

    Raises:
        ValueError: it is no list of strings.
    """
    entries = entries or ()
    if not isinstance(entries, (list, tuple)) or not all(isinstance(e, str) for e in entries):
        raise ValueError(f"quantization_config must name modules in a list, not by {entries!r}")
    return ModuleNames(tuple(entries))
