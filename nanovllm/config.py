"""Every option of the engine, validated in one place."""

import difflib
from collections.abc import Collection
from copy import deepcopy
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from transformers import PretrainedConfig

from nanovllm.checkpoints.checkpoint import (
    check_architecture,
    read_hf_config,
    stored_dtype,
    unwrap,
)
from nanovllm.checkpoints.hf_overrides import override_config
from nanovllm.checkpoints.hub import HubSource, resolve_model, resolve_tokenizer
from nanovllm.checkpoints.kv_scales import KV_CACHE_DTYPES, cache_dtype
from nanovllm.utils.checks import ABOVE_0, Choice, Range, check_fields, check_value, plain_number
from nanovllm.vllm_compat.vllm_options import our_options

DTYPES = Choice("auto", "bfloat16", "float16", "float32")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}  # as PyTorch and vLLM call them, too
LOGPROBS_MODES = Choice("raw_logprobs", "processed_logprobs")
ATTENTION_BACKENDS = Choice("auto", "triton", "flash_attn", "flash_attn+triton", "torch")


@dataclass(slots=True)
class Config:
    """Options of an engine; a wrong one is a TypeError or ValueError that names value and remedy.
    None for an option whose default is a number means that number.

    After construction nothing is "auto": every field holds what the engine uses. The annotations
    are those of that time: `hf_config` may be given as None, and `dtype` as a string.
    """

    model: str  # a directory in Hugging Face format, or a hub id; afterwards the directory
    # Most tokens that a prefill step computes; a longer prompt is computed in chunks.
    max_num_batched_tokens: Annotated[int, Range(1)] = 16384
    max_num_seqs: Annotated[int, Range(1)] = 512  # most sequences that run at once
    # Most tokens of a prompt with its completion; lowered to the model's `max_position_embeddings`.
    max_model_len: Annotated[int, Range(1)] = 4096
    # Share of the GPU's memory that may be in use, by this engine and by whatever else runs there.
    gpu_memory_utilization: Annotated[float, Range(ABOVE_0, 1)] = 0.9
    tensor_parallel_size: Annotated[int, Range(1, 8)] = 1  # ranks (GPUs) the model is split over
    enforce_eager: bool = False  # whether all steps run without CUDA graphs
    kvcache_block_size: Annotated[int, Range(1)] = 256  # token slots of a block of the KV cache
    # Blocks of the KV cache. -1: as many as fit beside the weights; on a CPU, up to 2 GiB of them.
    num_kvcache_blocks: Annotated[int, Range(-1)] = -1
    # Bytes of the KV cache on each rank. None: as `num_kvcache_blocks` says, which counts before.
    kv_cache_memory_bytes: Annotated[int | None, Range(1)] = None
    # Directory or hub id of a tokenizer; afterwards the directory. None: the model's own.
    tokenizer: str = None  # type: ignore[assignment]
    skip_tokenizer_init: bool = False  # whether there is none: prompts are token ids, texts empty
    revision: str | None = None  # of a model of the hub: a branch, tag or commit. None: the newest
    tokenizer_revision: str | None = None  # the same of the tokenizer. None: the model's, or newest
    download_dir: str | None = None  # where files of the hub are kept. None: in the hub's own cache
    hf_config: PretrainedConfig = None  # type: ignore[assignment]  # None: read from `model`
    # Laid over the configuration before anything else reads it; a dict in it replaces a whole one.
    hf_overrides: dict[str, Any] | None = None
    # Id or ids that end a sequence. -1: those of generation_config.json, tokenizer and config.json.
    eos: tuple[int, ...] | int = -1
    device: Annotated[str, Choice("auto", "cuda", "cpu")] = "auto"  # "auto": CUDA if there is any
    # Of weights and activations. "auto": the checkpoint's, or bfloat16; on a CPU float32.
    dtype: Annotated[torch.dtype, DTYPES] = "auto"  # type: ignore[assignment]
    # Of the KV cache; "auto": FP8 (e4m3) if the checkpoint was calibrated for that, else `dtype`.
    kv_cache_dtype: Annotated[torch.dtype, KV_CACHE_DTYPES] = "auto"  # type: ignore[assignment]
    # Whose attention kernels are used; "flash_attn+triton" prefills with the first and decodes with
    # the second. "auto": the fastest that is there. The model runner puts its choice here.
    attention_backend: Annotated[str, ATTENTION_BACKENDS] = "auto"
    # "auto" reads the checkpoint's weights; "dummy" makes random ones and reads no weight files.
    load_format: Annotated[str, Choice("auto", "dummy")] = "auto"
    # Of weights: "fp8" quantises a 16-bit checkpoint. None or "auto": as the checkpoint is, whose
    # quant_method any other name must be. Afterwards it is that, or None.
    quantization: str | None = None
    # Most log-probabilities that a request may ask for at each token. -1: as many as it likes.
    max_logprobs: Annotated[int, Range(-1)] = 20
    enable_prefix_caching: bool = True  # whether prompts that begin alike share KV cache blocks
    # Of which logits: the model's own, or those that tokens are drawn by, after bias, penalties,
    # filters and temperature (for greedy requests, 1).
    logprobs_mode: Annotated[str, LOGPROBS_MODES] = "raw_logprobs"
    seed: Annotated[int, Range(0, 2**63 - 1)] = 0  # of requests that bring none; of dummy weights
    # The architectures that there is code for; a model of another one is an error. (): any will do.
    architectures: InitVar[Collection[str]] = ()

    @classmethod
    def from_options(
        cls, model: str, options: dict[str, Any], architectures: Collection[str] = ()
    ) -> "Config":
        """Build a Config; an unknown option is a TypeError that names the nearest field."""
        options = our_options(options)
        names = [field.name for field in fields(cls) if field.name != "model"]
        for name in options:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
                raise TypeError(
                    f"unknown option {name!r}; did you mean {nearest!r}? "
                    f"(options: {', '.join(names)})"
                )
        return cls(model, **options, architectures=architectures)

    def __post_init__(self, architectures: Collection[str]) -> None:
        if isinstance(self.dtype, (torch.dtype, str)):
            # As config.json has it, "bfloat16" for torch.bfloat16, because strings are checked.
            name = str(self.dtype).removeprefix("torch.")
            self.dtype = DTYPE_ALIASES.get(name, name)  # type: ignore[assignment]
        check_fields(self)
        self._choose_device()
        self._find_model(architectures)
        self._check_eos()
        self.max_model_len = min(self.max_model_len, self.hf_config.max_position_embeddings)
        name = str(self.dtype)
        if name == "auto":
            name = "float32" if self.device == "cpu" else stored_dtype(self.hf_config)
        if name not in DTYPES.names:
            raise ValueError(
                f"the checkpoint's dtype is {name}, in which no model is run; pass dtype='bfloat16'"
            )
        self.dtype = getattr(torch, name)
        self.kv_cache_dtype = cache_dtype(self.kv_cache_dtype, self.dtype, self.hf_config)
        if self.num_kvcache_blocks != -1:
            self.check_kvcache(self.num_kvcache_blocks)

    def _choose_device(self) -> None:
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda" and torch.cuda.device_count() < self.tensor_parallel_size:
            raise ValueError(
                f"tensor_parallel_size {self.tensor_parallel_size} with device 'cuda' needs as "
                f"many GPUs, and {torch.cuda.device_count()} can be seen; lower it or pass "
                "device='cpu'"
            )

    def _find_model(self, architectures: Collection[str]) -> None:
        """Settle `model` and `hf_config`; fetch from the hub only what will be read."""
        needs_weights = self.load_format != "dummy"
        tokenizer = self.model if self.tokenizer is None else self.tokenizer
        if self.hf_config is None or needs_weights:
            source = HubSource(self.revision, self.download_dir)
            self.model = resolve_model(self.model, needs_weights, source)
        if self.tokenizer is None and self.tokenizer_revision is None:
            self.tokenizer = self.model
        elif not self.skip_tokenizer_init:
            source = HubSource(self.tokenizer_revision, self.download_dir)
            self.tokenizer = resolve_tokenizer(tokenizer, source)
        if self.hf_config is None:
            # The file's architectures do not count then. What is no dict is refused below.
            is_named = isinstance(self.hf_overrides, dict) and "architectures" in self.hf_overrides
            self.hf_config = read_hf_config(Path(self.model), () if is_named else architectures)
        elif not isinstance(self.hf_config, PretrainedConfig):
            raise TypeError(
                f"hf_config must be a transformers configuration, not {self.hf_config!r}"
            )
        self.hf_config = deepcopy(self.hf_config)  # so that the caller may change its own
        self.hf_config = unwrap(self.hf_config, Path(self.model) if needs_weights else None)
        if self.hf_overrides is not None:
            override_config(self.hf_config, self.hf_overrides)
        check_architecture(self.hf_config.architectures, "hf_config", architectures)
        named = getattr(self.hf_config, "transformers_weights", None)
        if named is not None and needs_weights:
            raise ValueError(
                f"config.json names {named!r} as the weights (transformers_weights), which is not "
                "supported; name that file model.safetensors and remove the entry"
            )

    def _check_eos(self) -> None:
        eos = plain_number(self.eos)
        if eos is None or (isinstance(eos, int) and eos == -1):
            self.eos = -1
            return
        ids = eos if isinstance(eos, (list, tuple)) else (eos,)
        limits = Range(0, self.hf_config.vocab_size - 1)
        self.eos = tuple(check_value("an eos id", token_id, int, limits) for token_id in ids)

    def check_kvcache(self, num_blocks: int) -> None:
        """Raise a ValueError unless so many blocks hold a sequence of max_model_len, as they must
        for any request to be able to finish, even alone.
        """
        needed = -(-self.max_model_len // self.kvcache_block_size)
        if num_blocks < needed:
            raise ValueError(
                f"a KV cache of {max(num_blocks, 0)} blocks of {self.kvcache_block_size} tokens "
                f"cannot hold one sequence of max_model_len {self.max_model_len}, which takes "
                f"{needed} blocks; lower max_model_len, or raise num_kvcache_blocks, "
                "kv_cache_memory_bytes or gpu_memory_utilization, whichever sets it"
            )
