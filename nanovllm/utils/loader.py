"""From safetensors files to the model's parameters."""

from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nanovllm.checkpoints.checkpoint import (
    EMBEDDING,
    HEAD,
    Stored,
    find_tensors,
    open_weights,
    settle_tied_head,
)
from nanovllm.checkpoints.kv_scales import give_scales, is_no_weight
from nanovllm.progress import Update, progress_bar

LoadTensor = Callable[[Any], None]  # copies a tensor, or a safetensors slice, to a parameter

DTYPES = ("BF16", "F16", "F32", "F64")  # of safetensors, for weights that are not quantised


def set_weight_loader(param: nn.Parameter, loader: Callable[..., None]) -> None:
    """Have `loader(param, loaded, shard_id)` copy what this rank holds of a checkpoint tensor.

    shard_id: which of the tensors that the parameter merges; left out if it merges none.
    """
    param.weight_loader = loader  # type: ignore[attr-defined]


def load_model(model: nn.Module, path: str) -> None:
    """Fill every parameter of `model` from the checkpoint in `path`. Raises a ValueError if there
    are no weight files, one cannot be read, or a tensor is missing, unknown or of the wrong shape.
    """
    files = find_tensors(Path(path))
    expected = expected_tensors(model, files)
    if HEAD in files and HEAD not in expected:  # tied, which is listed by its first name only
        dtype = model.get_parameter(EMBEDDING).dtype
        settle_tied_head(expected, files, dtype)
    unknown = {
        stored_name: file.name
        for name, (file, stored_name) in files.items()
        if name not in expected and not is_no_weight(name)
    }
    missing = expected.keys() - files.keys()
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {name_some(missing)}")
    if unknown:
        where = name_some(set(unknown.values()))
        problems.append(f"{len(unknown)} unknown: {name_some(unknown)}, in {where}")
    if problems:
        raise ValueError(
            f"the tensors in {path} do not match its config.json ({'; '.join(problems)}); the "
            "checkpoint is incomplete, of another model, or quantised otherwise than it says"
        )
    give_scales(model, files)
    # Small checkpoints load before a bar would show; a large one keeps a person waiting.
    total = len(expected)
    with progress_bar(total=total, desc="Loading weights", delay=1.0, leave=False) as update:
        for file, loads in group_by_file(expected, files).items():
            load_file(file, loads, update)


def group_by_file(
    expected: dict[str, LoadTensor], files: dict[str, Stored]
) -> dict[Path, dict[str, LoadTensor]]:
    """For each file, the functions that load its tensors, by the names that they have there."""
    grouped: dict[Path, dict[str, LoadTensor]] = {}
    for name, (file, stored_name) in files.items():
        if name in expected:
            grouped.setdefault(file, {})[stored_name] = expected[name]
    return grouped


def expected_tensors(model: nn.Module, names: Collection[str]) -> dict[str, LoadTensor]:
    """Name every tensor that a checkpoint of this model must hold, and the function to load it.

    A module that merges several checkpoint modules has a `packed_modules_mapping`: checkpoint name
    -> shard id. One that is quantised, or whose tensors may be named in several ways, has a
    `checkpoint_tensors`, which is shown all `names` that there are. Tied weights are expected once,
    by the name of the module that comes first.
    """
    expected: dict[str, LoadTensor] = {}
    for name, param in model.named_parameters():
        module_name, _, kind = name.rpartition(".")
        module = model.get_submodule(module_name)
        name_tensors = getattr(module, "checkpoint_tensors", None)
        if name_tensors is not None:
            expected.update(name_tensors(module_name, names))
            continue
        load = partial(param.weight_loader, param)  # type: ignore[attr-defined]
        packed = getattr(module, "packed_modules_mapping", None)
        if packed is None:
            expected[name] = load
            continue
        parent, _, _ = module_name.rpartition(".")
        for source, shard_id in packed.items():
            expected[f"{parent}.{source}.{kind}"] = partial(load, shard_id=shard_id)
    return expected


def load_file(file: Path, loads: dict[str, LoadTensor], update: Update) -> None:
    """Load tensors of a file, each with its function."""
    with open_weights(file) as tensors:
        for name, load in loads.items():
            loaded = tensors.get_slice(name)  # of which the loader reads this rank's part only
            try:
                dtypes = getattr(load, "dtypes", DTYPES)  # a quantised layer says which it reads
                if loaded.get_dtype() not in dtypes:
                    raise ValueError(f"is {loaded.get_dtype()} and not {', '.join(dtypes)}")
                load(loaded)
            except ValueError as error:  # of check_shape, too
                raise ValueError(f"checkpoint tensor {name!r} {error}") from error
            update()


def name_some(names: Collection[str]) -> str:
    """List the first five names, in order."""
    listed = ", ".join(sorted(names)[:5])
    return f"{listed}, ..." if len(names) > 5 else listed


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
        elif not hasattr(param, "is_quantized_weight"):  # whose format fills it
            generator = torch.Generator(param.device).manual_seed(seed + index)
            param.normal_(0.0, std, generator=generator)
