"""The option `hf_overrides`: entries of a model's configuration that the user sets otherwise."""

import difflib
from typing import Any

from transformers import PretrainedConfig

# Any configuration may be given these: transformers 4 has the first two, 5 the last.
ROPE_OPTIONS = ("rope_theta", "rope_scaling", "rope_parameters")


def override_config(config: PretrainedConfig, overrides: dict[str, Any]) -> None:
    """Lay `hf_overrides` over the configuration of a language model, in place.

    Raises:
        TypeError: it is no dict, or a value is of another type than the configuration's own.
        ValueError: the configuration has no such option.
    """
    if not isinstance(overrides, dict):
        raise TypeError(f"hf_overrides must be a dict or None, not {overrides!r}")
    names = [*config.to_dict(), *ROPE_OPTIONS]
    for name, value in overrides.items():
        if name not in names:
            nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
            raise ValueError(
                f"hf_overrides has {name!r}, and the configuration of {config.model_type} has no "
                f"such option; did you mean {nearest!r}?"
            )
        own = getattr(config, name, None)
        if own is None and name in ("rope_scaling", "rope_parameters"):
            own = {}
        may_be_any = own is None or value is None or name.endswith("_token_id")  # or a list of ids
        if not may_be_any and not is_alike(value, own):
            raise TypeError(f"hf_overrides[{name!r}] must be of the type of {own!r}, not {value!r}")
        if name in ROPE_OPTIONS:
            override_rope(config, name, value)
            continue
        try:
            setattr(config, name, value)
        except Exception as error:  # transformers 5 has checks of its own
            raise TypeError(f"hf_overrides[{name!r}] cannot be {value!r}: {error}") from error


def is_alike(value: object, own: object) -> bool:
    """Whether a value is of the type of `own`, among those that JSON has."""
    if isinstance(value, bool) != isinstance(own, bool):  # Python counts a bool as an int
        return False
    for types in ((int, float), str, (list, tuple), dict):
        if isinstance(own, types):
            return isinstance(value, types)
    return True


def override_rope(config: PretrainedConfig, name: str, value: Any) -> None:
    """Replace the options of RoPE, but keep the theta and the share of a head if none is given."""
    own = getattr(config, "rope_parameters", None)
    if not own:  # transformers 4, which has the theta elsewhere
        setattr(config, name, value)
        return
    is_by_type = has_dicts(own)
    if name == "rope_theta":
        if is_by_type:
            raise ValueError(
                f"hf_overrides has rope_theta, but types of layers have their own: {own}; pass all "
                "of them as rope_parameters"
            )
        config.rope_parameters = {**own, "rope_theta": value}
        return
    new = value or {}
    if not is_by_type:
        config.rope_parameters = {**kept_options(own), **new}
        return
    if not has_dicts(new):
        new = {**own, "full_attention": new}  # families that differ by type scale only this one
    by_type = {}
    for layer_type, options in new.items():
        kept = kept_options(own.get(layer_type))
        by_type[layer_type] = {**kept, **(options or {})}
    config.rope_parameters = by_type


def has_dicts(rope_parameters: dict[str, Any]) -> bool:
    """Whether options of RoPE are given for each type of layers, as a dict of its own."""
    return any(isinstance(options, dict) for options in rope_parameters.values())


def kept_options(rope_parameters: dict[str, Any] | None) -> dict[str, Any]:
    """What stays of the options of RoPE when the others are replaced."""
    kept = ("rope_theta", "partial_rotary_factor")
    return {name: value for name, value in (rope_parameters or {}).items() if name in kept}
