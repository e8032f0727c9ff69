"""Every option of the engine, validated in one place."""

import difflib
import json
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import AutoConfig, PretrainedConfig

from nanovllm.models import MODELS
from nanovllm.utils.checks import ABOVE_0, check_fields, check_value


@dataclass(slots=True)
class Config:
    """Options of an engine; what is not right is a TypeError or ValueError that names the value and the remedy.

    After construction nothing is "auto": every field holds what the engine uses.
    """

    model: str  # a directory in Hugging Face format, or a hub id (the local cache is tried first)
    max_num_batched_tokens: Annotated[int, 1] = (
        16384  # tokens of a prefill step; a longer prompt is cut in chunks
    )
    max_num_seqs: Annotated[int, 1] = 512  # most sequences that run at once
    max_model_len: Annotated[int, 1] = (
        4096  # of prompt and completion; at most max_position_embeddings
    )
    gpu_memory_utilization: Annotated[float, ABOVE_0, 1] = 0.9  # share of the GPU's memory to use
    tensor_parallel_size: Annotated[int, 1, 8] = 1  # number of ranks the model is split over
    enforce_eager: bool = False  # run decode without CUDA graphs
    kvcache_block_size: Annotated[int, 1] = 256  # token slots of a KV-cache block
    num_kvcache_blocks: Annotated[
        int, -1
    ] = -1  # blocks in the cache; -1 works it out from the memory that is left
    hf_config: PretrainedConfig | None = (
        None  # the model's configuration, when it is not to be read from `model`
    )
    eos: (
        tuple[int, ...] | int
    ) = -1  # ids that end a sequence; -1: generation_config.json's, tokenizer's and model's
    device: Annotated[str, "auto", "cuda", "cpu"] = (
        "auto"  # "auto": CUDA if there is any, else the CPU
    )
    dtype: Annotated[str | torch.dtype, "auto", "bfloat16", "float16", "float32"] = (
        "auto"  # as stored; CPU: float32
    )
    attention_backend: Annotated[
        str, "auto", "triton", "flash_attn", "flash_attn+triton", "torch"
    ] = "auto"
    load_format: Annotated[str, "auto", "dummy"] = (
        "auto"  # "dummy": random weights; no weight files are read
    )
    enable_prefix_caching: bool = True  # share the cache blocks of equal prompt beginnings
    seed: Annotated[int, 0, 2**63 - 1] = 0  # of the requests that bring none, and of dummy weights

    @classmethod
    def from_options(cls, model: str, options: dict[str, Any]) -> "Config":
        """Build a Config; an unknown option is a TypeError that names the nearest field."""
        names = [field.name for field in fields(cls) if field.name != "model"]
        if unknown := [name for name in options if name not in names]:
            near = difflib.get_close_matches(unknown[0], names, n=1, cutoff=0)[0]
            raise TypeError(
                f"unknown option {unknown[0]!r}; did you mean {near!r}? (options: {', '.join(names)})"
            )
        return cls(model, **options)

    def __post_init__(self) -> None:
        if isinstance(self.dtype, torch.dtype):
            self.dtype = str(self.dtype).removeprefix("torch.")
        check_fields(self)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if (
            self.device == "cuda"
            and (num_gpus := torch.cuda.device_count()) < self.tensor_parallel_size
        ):
            needed = f"tensor_parallel_size {self.tensor_parallel_size} with device 'cuda' needs as many GPUs"
            raise ValueError(f"{needed}, and {num_gpus} can be seen; lower it or pass device='cpu'")
        if self.hf_config is None or self.load_format != "dummy":
            self.model = resolve_model(self.model, needs_weights=self.load_format != "dummy")
        if self.hf_config is None:
            self.hf_config = read_hf_config(Path(self.model))
        elif not isinstance(self.hf_config, PretrainedConfig):
            raise TypeError(
                f"hf_config must be a transformers configuration, not {self.hf_config!r}"
            )
        check_architecture(self.hf_config.architectures, "hf_config")
        self.eos = tuple(self.eos) if isinstance(self.eos, list) else self.eos
        for eos in (
            (self.eos if isinstance(self.eos, tuple) else (self.eos,)) if self.eos != -1 else ()
        ):
            check_value("an eos id", eos, int, 0, self.hf_config.vocab_size - 1)
        self.max_model_len = min(self.max_model_len, self.hf_config.max_position_embeddings)
        if (
            self.dtype == "auto"
        ):  # transformers 5 calls it dtype, 4 torch_dtype; either may hold a string
            stored = getattr(self.hf_config, "dtype", None) or getattr(
                self.hf_config, "torch_dtype", None
            )
            self.dtype = (
                "float32"
                if self.device == "cpu"
                else str(stored or "bfloat16").removeprefix("torch.")
            )
        self.dtype = getattr(torch, self.dtype)
        if self.num_kvcache_blocks != -1:
            self.check_kvcache(self.num_kvcache_blocks)

    def check_kvcache(self, num_blocks: int) -> None:
        """Raise a ValueError unless so many blocks hold a sequence of max_model_len: any request can then finish."""
        needed = -(-self.max_model_len // self.kvcache_block_size)
        if num_blocks < needed:
            raise ValueError(
                f"a KV cache of {max(num_blocks, 0)} blocks of {self.kvcache_block_size} tokens cannot hold one "
                f"sequence of max_model_len {self.max_model_len}, which takes {needed} blocks; lower max_model_len, "
                "or raise num_kvcache_blocks or gpu_memory_utilization"
            )


def resolve_model(model: str, needs_weights: bool) -> str:
    """The local directory of `model`: itself, or where the hub's cache (or else the hub) has that id; or an error."""
    if not isinstance(model, (str, Path)):
        raise TypeError(f"model must be a path or a hub id, not {model!r}")
    if (path := Path(model).expanduser()).is_dir():
        return str(path)
    from huggingface_hub import snapshot_download  # here: most runs never need it

    needed = ["config.json"] + ["*.safetensors"] * needs_weights
    files = {
        "repo_id": str(model),
        "allow_patterns": ["*.json", "*.txt", "*.jinja", "*.model", *needed],
    }
    try:
        with suppress(FileNotFoundError):
            path = Path(snapshot_download(**files, local_files_only=True))
            if all(any(path.glob(pattern)) for pattern in needed):
                return str(path)
        return snapshot_download(**files)  # of what the cache lacks
    except (OSError, ValueError) as error:  # the hub's own exceptions are of these
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"model {str(model)!r} is neither a directory here nor a hub id that could be fetched ({reason}); pass "
            "the path of a checkpoint in Hugging Face format"
        ) from error


def read_hf_config(path: Path) -> PretrainedConfig:
    """Read config.json; a ValueError if there is none, or none that this engine can run."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(
            f"{path} has no config.json; pass the directory of a checkpoint in Hugging Face format"
        )
    check_architecture(read_json(file).get("architectures"), str(file))
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # whatever a malformed file makes transformers raise
        raise ValueError(f"transformers cannot read {file}: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; {} if there is no such file, a ValueError if it holds something else."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds {str(raw)[:40]!r} and not a configuration")
    return raw


def check_architecture(architectures: list[str] | None, source: str) -> None:
    name = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if name not in list(MODELS):  # a file may hold anything, a dict's keys only what can be hashed
        raise ValueError(
            f"{source} names the architecture {name!r}; supported: {', '.join(MODELS)}"
        )
