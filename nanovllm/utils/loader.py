"""From safetensors files to the model's parameters."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a checkpoint tensor goes."""

    param: nn.Parameter
    shard_id: Any = None  # which of the tensors that the parameter merges; None: it merges none

    def load(self, loaded: Any) -> None:
        """Have the parameter copy what it needs of a tensor, or of a safetensors slice."""
        load: Callable[..., None] = self.param.weight_loader  # type: ignore[attr-defined]
        if self.shard_id is None:
            load(self.param, loaded)
        else:
            load(self.param, loaded, self.shard_id)


def set_weight_loader(param: nn.Parameter, loader: Callable[..., None]) -> None:
    """Have `loader(param, loaded, shard_id)` copy what this rank holds of a checkpoint tensor.

    shard_id is left out where the parameter does not merge several tensors.
    """
    param.weight_loader = loader  # type: ignore[attr-defined]


def load_model(model: nn.Module, path: str) -> None:
    """Fill every parameter of `model` from the checkpoint in `path`.

    Each parameter carries a `weight_loader`, which reads only this rank's slice of a tensor.

    Raises:
        ValueError: there are no weight files, one cannot be read, or a tensor is missing, unknown
            or of the wrong shape.
    """
    missing = expected_tensors(model)
    unknown: list[str] = []
    parameters = dict(model.named_parameters())
    is_tied = "lm_head.weight" not in parameters  # it is listed by its first name only
    # Small checkpoints load before a bar would show; a large one keeps a person waiting.
    with tqdm(total=len(missing), desc="Loading weights", delay=1.0, leave=False) as progress:
        for file in weight_files(Path(path)):
            for name, tensor in read_tensors(file):
                destination = missing.pop(name, None)
                if destination is None:
                    if not is_redundant(name, is_tied):
                        unknown.append(name)
                    continue
                try:
                    destination.load(tensor)
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"cannot read the weights in {file}: {error}") from error
                except ValueError as error:  # of check_shape
                    raise ValueError(f"checkpoint tensor {name!r} {error}") from error
                progress.update()
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


def expected_tensors(model: nn.Module) -> dict[str, Destination]:
    """Name every tensor that a checkpoint of this model must hold, and say where it goes.

    A module that merges several checkpoint modules has a `packed_modules_mapping`: checkpoint name
    -> shard id. Tied weights are expected once, by the name of the module that comes first.
    """
    expected: dict[str, Destination] = {}
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        parent, _, _ = module_name.rpartition(".")
        packed = getattr(module, "packed_modules_mapping", None)
        for kind, param in module.named_parameters(recurse=False):
            if id(param) in seen:
                continue
            seen.add(id(param))
            if packed is None:
                expected[f"{module_name}.{kind}"] = Destination(param)
                continue
            for source, shard_id in packed.items():
                expected[f"{parent}.{source}.{kind}"] = Destination(param, shard_id)
    return expected


def read_tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the name of each tensor of a safetensors file, and a slice to read it through."""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dict, and has no iterator
                yield name, tensors.get_slice(name)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read the weights in {file}: {error}") from error


def is_redundant(name: str, is_tied: bool) -> bool:
    """Whether a tensor only repeats others, or follows from the configuration."""
    return name.endswith("rotary_emb.inv_freq") or (is_tied and name == "lm_head.weight")


def name_some(names: Collection[str]) -> str:
    """List the first five names, in order."""
    listed = ", ".join(sorted(names)[:5])
    return f"{listed}, ..." if len(names) > 5 else listed


def weight_files(path: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: those its index names, else all there are.

    Raises:
        ValueError: there are none, one that is named is absent, or the index cannot be read.
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
    """Raise a ValueError unless a checkpoint tensor has the shape that the configuration asks for.

    loaded: a tensor or a safetensors slice.
    """
    shape = list(loaded.get_shape() if hasattr(loaded, "get_shape") else loaded.shape)
    if shape != list(expected):
        raise ValueError(
            f"has shape {shape}, and the model's configuration asks for {list(expected)}"
        )


@torch.no_grad()
def fill_dummy(model: nn.Module, std: float, seed: int) -> None:
    """Fill with random weights of a trained model's scale.

    They are normal with deviation `std`; norms are 1 and biases 0.
    """
    for index, (name, param) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            param.fill_(1.0)
        elif name.endswith(".bias"):
            param.zero_()
        else:
            generator = torch.Generator(param.device).manual_seed(seed + index)
            param.normal_(0.0, std, generator=generator)
