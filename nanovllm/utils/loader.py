"""From safetensors files to the model's parameters."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm.auto import tqdm


def load_model(model: nn.Module, path: str) -> None:
    """Fill every parameter of `model` from the checkpoint in `path`, each rank reading only its own slices.

    They carry a `weight_loader`; `packed_modules_mapping` says which checkpoint tensors make up a merged one.
    No or unreadable weight files and missing, unknown or wrongly shaped tensors are a ValueError.
    """
    missing, unknown = _expected_tensors(model), []
    is_tied = model.lm_head.weight is model.model.embed_tokens.weight
    # Small checkpoints load before a bar would show; a large one keeps a person waiting.
    with tqdm(total=len(missing), desc="Loading weights", delay=1.0, leave=False) as progress:
        for file in weight_files(Path(path)):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():
                        if name in missing:
                            param, *shard = missing.pop(name)
                            param.weight_loader(param, tensors.get_slice(name), *shard)
                            progress.update()
                        # Some checkpoints carry what follows from other tensors, or from the configuration.
                        elif not (
                            name.endswith("rotary_emb.inv_freq")
                            or (is_tied and name == "lm_head.weight")
                        ):
                            unknown.append(name)
            except (SafetensorError, OSError) as error:
                raise ValueError(f"cannot read the weights in {file}: {error}") from error
            except ValueError as error:  # of check_shape
                raise ValueError(f"checkpoint tensor {name!r} {error}") from error
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (("missing", missing), ("unknown", unknown))
        if names
    ]
    if problems:
        raise ValueError(
            f"the tensors in {path} do not match its config.json ({'; '.join(problems)}); the checkpoint is "
            "incomplete or of another model"
        )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint: those its index names, else all there are."""
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
            f"{path} lacks weight files ({', '.join(absent) or '*.safetensors'}); fetch the whole checkpoint, or "
            "pass load_format='dummy' for random weights"
        )
    return files


def _expected_tensors(model: nn.Module) -> dict[str, tuple[nn.Parameter | str | int, ...]]:
    """Checkpoint tensor name -> (parameter, shard of it if it is merged), for all tensors that must be there."""
    expected, packed = {}, model.packed_modules_mapping.items()
    for name, param in model.named_parameters():  # a tied LM head appears once, as the embedding
        *prefix, module, kind = name.split(".")
        parts = [(source, part) for source, (merged, part) in packed if merged == module]
        for source, *shard in parts or [(module,)]:
            expected[".".join((*prefix, source, kind))] = (param, *shard)
    return expected


def check_shape(loaded, expected: tuple[int, ...]) -> None:
    """Raise a ValueError unless a checkpoint tensor has the shape that the model's configuration asks for."""
    shape = tuple(loaded.get_shape() if hasattr(loaded, "get_shape") else loaded.shape)
    if shape != tuple(expected):
        raise ValueError(
            f"has shape {list(shape)}, and the model's configuration asks for {list(expected)}"
        )


@torch.no_grad()
def fill_dummy(model: nn.Module, std: float, seed: int) -> None:
    """Random weights of a trained model's scale: normal with deviation `std`, norms 1, biases 0."""
    for index, (name, param) in enumerate(model.named_parameters()):
        if name.endswith("norm.weight"):
            param.fill_(1.0)
        elif name.endswith(".bias"):
            param.zero_()
        else:
            param.normal_(
                0.0, std, generator=torch.Generator(param.device).manual_seed(seed + index)
            )
