"""From safetensors files to the model's parameters."""

import json
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm.progress import Update, progress_bar

LoadTensor = Callable[[Any], None]  # copies a tensor, or a safetensors slice, to a parameter


def set_weight_loader(param: nn.Parameter, loader: Callable[..., None]) -> None:
    """Have `loader(param, loaded, shard_id)` copy what this rank holds of a checkpoint tensor.

    shard_id: which of the tensors that the parameter merges; left out if it merges none.
    """
    param.weight_loader = loader  # type: ignore[attr-defined]


def load_model(model: nn.Module, path: str) -> None:
    """Fill every parameter of `model` from the checkpoint in `path`. Raises a ValueError if there
    are no weight files, one cannot be read, or a tensor is missing, unknown or of the wrong shape.
    """
    missing = expected_tensors(model)
    is_tied = "lm_head.weight" not in missing  # it is listed by its first name only
    others: list[str] = []
    # Small checkpoints load before a bar would show; a large one keeps a person waiting.
    with progress_bar(total=len(missing), desc="Loading weights", delay=1.0, leave=False) as update:
        for file in weight_files(Path(path)):
            try:
                others += load_file(file, missing, update)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"cannot read the weights in {file}: {error}") from error
    unknown = [name for name in others if not is_redundant(name, is_tied)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {name_some(missing)}")
    if unknown:
        problems.append(f"{len(unknown)} unknown: {name_some(unknown)}")
    if problems:
        raise ValueError(
            f"the tensors in {path} do not match its config.json ({'; '.join(problems)}); the "
            "checkpoint is incomplete or of another model"
        )


def expected_tensors(model: nn.Module) -> dict[str, LoadTensor]:
    """Name every tensor that a checkpoint of this model must hold, and the function to load it.

    A module that merges several checkpoint modules has a `packed_modules_mapping`: checkpoint name
    -> shard id. Tied weights are expected once, by the name of the module that comes first.
    """
    expected: dict[str, LoadTensor] = {}
    for name, param in model.named_parameters():
        load = partial(param.weight_loader, param)  # type: ignore[attr-defined]
        module_name, _, kind = name.rpartition(".")
        packed = getattr(model.get_submodule(module_name), "packed_modules_mapping", None)
        if packed is None:
            expected[name] = load
            continue
        parent, _, _ = module_name.rpartition(".")
        for source, shard_id in packed.items():
            expected[f"{parent}.{source}.{kind}"] = partial(load, shard_id=shard_id)
    return expected


def load_file(file: Path, missing: dict[str, LoadTensor], update: Update) -> list[str]:
    """Load the tensors of a file that are in `missing`, and remove them there; name the others."""
    others = []
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dict, and has no iterator
            if name not in missing:
                others.append(name)
                continue
            load = missing.pop(name)
            try:
                load(tensors.get_slice(name))  # of a slice, the loader reads this rank's part only
            except ValueError as error:  # of check_shape
                raise ValueError(f"checkpoint tensor {name!r} {error}") from error
            update()
    return others


def is_redundant(name: str, is_tied: bool) -> bool:
    """Whether a tensor only repeats others, or follows from the configuration."""
    return name.endswith("rotary_emb.inv_freq") or (is_tied and name == "lm_head.weight")


def name_some(names: Collection[str]) -> str:
    """List the first five names, in order."""
    listed = ", ".join(sorted(names)[:5])
    return f"{listed}, ..." if len(names) > 5 else listed


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: those its index names, else all there are. Raises
    a ValueError if there are none, one that is named is absent, or the index cannot be read.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = [path / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a valid index of weight files: {error!r}") from error
    elif (path / "model.safetensors").is_file():
        files = [path / "model.safetensors"]  # and not, say, a consolidated copy beside it
    else:
        files = sorted(path.glob("*.safetensors"))
    absent = [file.name for file in files if not file.is_file()]
    if absent or not files:
        raise ValueError(
            f"{path} lacks weight files ({', '.join(absent) or '*.safetensors'}); fetch the whole "
            "checkpoint, or pass load_format='dummy' for random weights"
        )
    return files


def check_shape(loaded: Any, expected: Iterable[int]) -> None:
    """Raise a ValueError unless `loaded`, a tensor or a safetensors slice, has `expected` shape."""
    shape = list(loaded.get_shape() if hasattr(loaded, "get_shape") else loaded.shape)
    expected = list(expected)
    if shape != expected:
        raise ValueError(f"has shape {shape}, and the model's configuration asks for {expected}")


@torch.no_grad()
def fill_dummy(model: nn.Module, std: float, seed: int) -> None:
    """Fill with normal weights of deviation `std`, a trained model's; norms are 1 and biases 0."""
    for index, (name, param) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            param.fill_(1.0)
        elif name.endswith(".bias"):
            param.zero_()
        else:
            generator = torch.Generator(param.device).manual_seed(seed + index)
            param.normal_(0.0, std, generator=generator)
