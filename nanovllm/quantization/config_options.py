"""What the readers of a `quantization_config` share."""

from __future__ import annotations

from typing import Any

from nanovllm.quantization.scheme import EVERY_LAYER, ModuleNames

ALL_LAYERS = ModuleNames((EVERY_LAYER,))
Options = dict[str, Any]


def refusal(name: str, value: object, supported: str) -> ValueError:
    """The error of an option of the quantization_config that is not supported."""
    return ValueError(
        f"{name} {value!r} in quantization_config is not supported; supported: {supported}"
    )


def check(options: Options, name: str, *supported: object) -> Any:
    """Return an option of the quantization_config; a ValueError if it is none of `supported`, of
    which the first is the default.
    """
    value = options.get(name, supported[0])
    if value not in supported:
        raise refusal(name, value, ", ".join(repr(each) for each in supported))
    return value
