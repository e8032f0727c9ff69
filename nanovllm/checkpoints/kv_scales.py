"""FP8 KV caches: who asks for one, and the scales that checkpoints bring for it.

Such a cache holds K and V divided by a scale, of which a layer has one for K and one for V, so that
what is stored makes use of the range of FP8 (e4m3, up to 448). A checkpoint that was calibrated
brings them, under names that depend on the tool that wrote it:

    self_attn.k_scale              compressed-tensors (llm-compressor), FP8 checkpoints of vLLM's
    self_attn.k_proj.k_scale       ModelOpt
    self_attn.k_proj.output_scale  Quark, earlier compressed-tensors
    self_attn.kv_scale             earlier FP8 checkpoints: one for both
"""

import math
import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from nanovllm.checkpoints.checkpoint import Stored, open_weights
from nanovllm.utils.checks import Choice

FP8 = torch.float8_e4m3fn
FP8_NAMES = ("fp8", "fp8_e4m3")  # as vLLM has it, these are one
KV_CACHE_DTYPES = Choice("auto", *FP8_NAMES, "bfloat16", "float16", "float32")
# `kv`, `k` or `v`: what a tensor is the scale of. `q` and `prob`, of queries and weights, would be
# for attention that computes in FP8, too.
SCALE = re.compile(
    r"model\.layers\.(\d+)\.self_attn\.(?:attn\.)?"
    r"(?:(?:\w+_proj\.)?(kv|k|v|q|prob)_scale|(k|v|q|prob)(?:_proj\.|_)output_scale)"
)


class KVScales(NamedTuple):
    """K and V of a layer are these times what its cache holds."""

    k: float = 1.0
    v: float = 1.0


# --- who asks for an FP8 cache --------------------------------------------------------------------


def cache_dtype(asked_for: Any, dtype: torch.dtype, hf_config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of the KV cache.

    asked_for: one of the names in KV_CACHE_DTYPES. With "auto" the checkpoint decides; if it says
        nothing, the cache has the model's dtype.

    Raises:
        ValueError: the cache would be of a kind that is not supported.
    """
    if asked_for == "auto":
        return FP8 if was_calibrated(hf_config, dtype) else dtype
    if asked_for in FP8_NAMES:
        return FP8
    if asked_for != name_of(dtype):
        raise ValueError(
            f"kv_cache_dtype {asked_for!r} is not supported for a model that runs in "
            f"{name_of(dtype)}; a KV cache has the model's dtype or is 'fp8': change one of the two"
        )
    return dtype


def was_calibrated(hf_config: PretrainedConfig, dtype: torch.dtype) -> bool:
    """Whether a checkpoint asks for an FP8 KV cache, in its `quantization_config`.

    Raises:
        ValueError: it asks for another one, that is not supported.
    """
    said = getattr(hf_config, "quantization_config", None)
    if not isinstance(said, dict):
        return False
    remedy = f"pass kv_cache_dtype={name_of(dtype)!r} or 'fp8'"
    scheme = said.get("kv_cache_scheme")  # compressed-tensors, and ModelOpt
    if scheme == "static":  # AutoFP8, which knows one only
        return True
    if scheme is not None:
        if not isinstance(scheme, dict):
            raise ValueError(
                f"the checkpoint's kv_cache_scheme {scheme!r} is not supported, only 'static' or a "
                f"dict; {remedy}"
            )
        wanted: dict[str, Any] = dict(type="float", num_bits=8, strategy="tensor", symmetric=True)
        differing = {
            name: scheme[name]
            for name, value in wanted.items()
            if scheme.get(name) not in (None, value)
        }
        if differing:
            raise ValueError(
                f"the checkpoint's kv_cache_scheme has {differing}, and only {wanted} is "
                f"supported; {remedy}"
            )
        return True
    inner = said.get("quantization")  # as in ModelOpt's own hf_quant_config.json
    algorithm = {**said, **(inner if isinstance(inner, dict) else {})}.get("kv_cache_quant_algo")
    if algorithm is not None and str(algorithm).upper() not in ("NONE", "FP8"):
        raise ValueError(
            f"the checkpoint's kv_cache_quant_algo {algorithm!r} is not supported, only 'FP8'; "
            f"{remedy}"
        )
    return algorithm is not None and str(algorithm).upper() == "FP8"


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


# --- its scales -----------------------------------------------------------------------------------


def is_no_weight(name: str) -> bool:
    """Whether a checkpoint's tensor of this name is none that a model is made of: frequencies of
    RoPE, which are computed, or a scale of attention, which counts when an engine starts only, as
    what is in its cache was stored with that.
    """
    return name.endswith("rotary_emb.inv_freq") or SCALE.fullmatch(name) is not None


def give_scales(model: nn.Module, files: dict[str, Stored]) -> None:
    """Tell each attention layer of a model the scales that the checkpoint has for it.

    files: of `find_tensors`. Without scales in it, the layers keep those they have.

    Raises:
        ValueError: as `read_scales`.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "kv_scales")]
    for layer, scales in zip(layers, read_scales(files, len(layers)), strict=False):
        layer.kv_scales = scales


def read_scales(files: dict[str, Stored], num_layers: int) -> list[KVScales]:
    """Read the scales of all layers; [] if a checkpoint has none.

    Raises:
        ValueError: some layers lack scales, or one is no scale of a layer.
    """
    by_kind: dict[str, dict[int, float]] = {"k": {}, "v": {}}
    for name, stored in files.items():
        match = SCALE.fullmatch(name)
        kind = match and (match[2] or match[3])
        if match is None or kind in ("q", "prob"):
            continue
        value = read_scale(name, stored)
        for letter in kind or "":
            known = by_kind[letter].setdefault(int(match[1]), value)
            if known != value:
                raise ValueError(
                    f"checkpoint tensor {name!r} is {value}, and the same scale under another name "
                    f"is {known}; remove one of them"
                )
    if not by_kind["k"] and not by_kind["v"]:
        return []
    for letter, scales in by_kind.items():
        missing = [index for index in range(num_layers) if index not in scales]
        if missing:
            raise ValueError(
                f"the checkpoint has scales for an FP8 KV cache, but none of {letter.upper()} in "
                f"layer {missing[0]} (model.layers.{missing[0]}.self_attn.{letter}_scale), and "
                f"{len(missing)} such layers in all; add them, or remove all such scales"
            )
    return [KVScales(by_kind["k"][index], by_kind["v"][index]) for index in range(num_layers)]


def read_scale(name: str, stored: Stored) -> float:
    """Read one scale; a ValueError if the tensor can be none."""
    file, stored_name = stored
    with open_weights(file) as tensors:
        tensor: Tensor = tensors.get_tensor(stored_name)
    if tensor.numel() != 1:
        raise ValueError(
            f"checkpoint tensor {name!r} has shape {list(tensor.shape)}, and a KV cache with "
            "anything but one scale a layer is not supported; remove it, and the layers' others"
        )
    value = float(tensor)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"checkpoint tensor {name!r} is {value}, and a scale must be above 0")
    return value
