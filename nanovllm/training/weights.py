"""New weights for a model that is loaded: from tensors to its parameters, at the same addresses.

Who trains a model with rollouts of this engine has new weights after every step. Their names are
those of a checkpoint. So each tensor is copied by the function that copies it at start-up, which
knows this rank's part of it, the matrices that it is merged with, and what a norm adds to it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.checkpoints.checkpoint import EMBEDDING, HEAD, find_tensors, open_weights, read_json
from nanovllm.checkpoints.kv_scales import is_no_weight
from nanovllm.checkpoints.wrappers import is_wrapper, text_name
from nanovllm.models.weight_formats import finish_loading
from nanovllm.quantization.int4 import Int4
from nanovllm.utils.loader import DTYPES as FLOATS
from nanovllm.utils.loader import LoadTensor, expected_tensors, name_some

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.models.causal_lm import CausalLM

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | str | os.PathLike[str]
# What safetensors calls the dtypes that tensors may have; loaders go by these names.
DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
}
if hasattr(torch, "float8_e8m0fnu"):  # since PyTorch 2.7
    DTYPE_NAMES[torch.float8_e8m0fnu] = "F8_E8M0"


class Fits(Exception):
    """What `Probe` raises when a loader has found its shape right."""


class Probe:
    """A tensor that has a shape and no values. A loader checks the shape, and then asks for values,
    so that showing it a probe checks a tensor and copies nothing.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = shape

    def __getitem__(self, index: Any) -> Tensor:
        raise Fits


class EveryName:
    """The names in a checkpoint that has whatever a module looks for."""

    def __contains__(self, name: object) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class TensorNames:
    """The tensors that a model is made of, by the names that they have in checkpoints."""

    def __init__(self, model: CausalLM, path: str) -> None:
        """path: of the checkpoint that the model was loaded from. It need not be there any more."""
        # A checkpoint of a mixture of experts has three tensors for each expert or, as transformers
        # names them since version 5, two for all experts of a layer.
        # Quantised layers may have optional tensors, which the second way has, too.
        self.ways = [expected_tensors(model, ()), expected_tensors(model, EveryName())]
        self.loaders: dict[str, LoadTensor] = {**self.ways[0], **self.ways[1]}
        self.is_tied = HEAD not in self.loaders  # transformers lists the shared tensor twice
        architectures = read_json(Path(path) / "config.json").get("architectures")
        self.is_wrapped = is_wrapper(architectures)

    def find(self, name: str) -> str | None:
        """The name in `loaders` of a tensor, or None if it is of no use here. Raises a ValueError
        if the model has no such tensor.
        """
        ours: str | None = name
        if self.is_wrapped and name not in self.loaders:
            ours = text_name(name)
        if ours == HEAD and self.is_tied:
            ours = EMBEDDING
        if ours is None or is_no_weight(ours):  # of an image encoder; see there
            return None
        if ours not in self.loaders:
            raise ValueError(
                f"the model has no tensor {name!r}; names must be those of its checkpoint, as in "
                f"{name_some(self.loaders)}"
            )
        return ours

    def check(self, name: str, tensor: Tensor) -> None:
        """Raise a TypeError or ValueError unless a tensor can be loaded; nothing is changed."""
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(
                f"weights must be pairs of a name and a tensor, not {name!r} and {type(tensor)}"
            )
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"tensor {name!r} is a DTensor; pass its full_tensor()")
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(
                f"tensor {name!r} must be dense and hold values, and it is of layout "
                f"{tensor.layout} on device {tensor.device}"
            )
        ours = self.find(name)
        if ours is None:
            return
        try:
            load = self.loaders[ours]
            names = getattr(load, "dtypes", FLOATS)  # of a quantised layer
            if DTYPE_NAMES.get(tensor.dtype) not in names:
                dtypes = [str(dtype) for dtype, name in DTYPE_NAMES.items() if name in names]
                raise ValueError(f"is {tensor.dtype} and not {', '.join(dtypes)}")
            load(Probe(tensor.shape))
        except Fits:
            return
        except ValueError as error:
            raise ValueError(f"tensor {name!r} {error}") from error

    def missing(self, loaded: set[str]) -> list[str]:
        """Name the tensors that `loaded`, names in `loaders`, lack to be a whole model."""
        return min(([name for name in way if name not in loaded] for way in self.ways), key=len)


class Update:
    """One call of `load_weights`: which tensors of it have been seen."""

    def __init__(self, names: TensorNames) -> None:
        self.names = names
        self._embedding: Tensor | None = None  # the first that was given for a tied one

    def choose(self, name: str, tensor: Tensor) -> str | None:
        """The name in `loaders` by which a tensor is to be loaded; None if it is not needed. Raises
        a TypeError or ValueError if it cannot be loaded; nothing is changed.
        """
        self.names.check(name, tensor)
        ours = self.names.find(name)
        if ours == EMBEDDING and self.names.is_tied:
            if self._embedding is not None:
                check_equal(self._embedding, tensor)
                return None
            self._embedding = tensor
        return ours


def check_equal(first: Tensor, second: Tensor) -> None:
    """Raise a ValueError unless the two tensors of a tied embedding hold the same."""
    is_same_memory = first.device == second.device and first.data_ptr() == second.data_ptr()
    if not is_same_memory and not torch.equal(first, second.to(first)):
        raise ValueError(
            f"{HEAD} differs from {EMBEDDING}, and the model's config.json has "
            "tie_word_embeddings; leave one of them out"
        )


def check_reloadable(model: CausalLM) -> None:
    """Raise a ValueError if there are weights that are loaded only once."""
    for name, module in model.named_modules():
        weight_format = getattr(module, "weight_format", None)
        if isinstance(weight_format, Int4) and weight_format.has_group_index:
            raise ValueError(
                f"{name} has columns in an order of its own (desc_act or actorder), which cannot "
                "be loaded again after level 2; use level 1, which keeps the weights"
            )


def is_repeatable(weights: Weights) -> bool:
    """Whether all can be checked before any is loaded: a generator gives its tensors only once."""
    return isinstance(weights, (Collection, os.PathLike))


def pairs_of(weights: Weights) -> Iterable[tuple[str, Tensor]]:
    """The (name, tensor) pairs of what `load_weights` was given."""
    if isinstance(weights, (str, os.PathLike)):
        return read_checkpoint(Path(weights))
    if isinstance(weights, Mapping):
        return weights.items()
    if not isinstance(weights, Iterable):
        raise TypeError(
            f"weights must be a dict, pairs of names and tensors, or a directory, not {weights!r}"
        )
    return map(checked_pair, weights)


def checked_pair(pair: Any) -> tuple[str, Tensor]:
    """Return what is a pair, whatever it holds; a TypeError otherwise."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"weights must be pairs of a name and a tensor, not {pair!r:.100}")
    return pair[0], pair[1]


def read_checkpoint(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors of a checkpoint, one after the other."""
    files: dict[Path, list[tuple[str, str]]] = {}
    for name, (file, stored_name) in find_tensors(path).items():
        files.setdefault(file, []).append((name, stored_name))
    for file, names in files.items():
        with open_weights(file) as tensors:
            for name, stored_name in names:
                yield name, tensors.get_tensor(stored_name)


# --- on every rank ------------------------------------------------------------------------------


def load_on_all_ranks(runner: ModelRunner, name: str, tensor: Tensor) -> None:
    """Rank 0: copy a tensor into the parameters of every rank, of which each takes its part."""
    tensor = tensor.detach()
    if runner.channel is not None:
        runner.channel.send(receive, (name, tensor.shape, tensor.dtype))
        tensor = tensor.to(runner.device)
        broadcast(tensor.contiguous())
    load(runner, name, tensor)


def receive(runner: ModelRunner, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
    """A worker: take what rank 0 broadcasts."""
    tensor = torch.empty(shape, dtype=dtype, device=runner.device)
    broadcast(tensor)
    load(runner, name, tensor)


def broadcast(tensor: Tensor) -> None:
    """Send a contiguous tensor from rank 0 to all others."""
    dist.broadcast(tensor.view(torch.uint8), src=0)  # gloo has not all dtypes


@torch.no_grad()
def load(runner: ModelRunner, name: str, tensor: Tensor) -> None:
    """Copy this rank's part of a tensor to the parameter that it belongs to."""
    try:
        names_of(runner).loaders[name](tensor)
    except ValueError as error:  # of its values, such as scales of a quantised layer
        raise ValueError(f"tensor {name!r} {error}") from error


def finish(runner: ModelRunner) -> None:
    """Have quantised layers check what all of their tensors must agree on."""
    finish_loading(runner.model)


def names_of(runner: ModelRunner) -> TensorNames:
    """The tensors of a rank's model: found once, as a mixture of experts has many thousands."""
    model = runner.model
    if model.tensor_names is None:
        model.tensor_names = TensorNames(model, runner.config.model)
    return model.tensor_names
