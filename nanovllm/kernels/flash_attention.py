"""Prefill and decode attention through the `flash_attn` package, in either of its two forms.

These are 2.x (`flash-attn`, which is built from source) and 4 (`flash-attn-4`, a wheel that
compiles its kernels at first use). The package is imported when it is first needed.
"""

import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@lru_cache
def flash_attention_version() -> str | None:
    """Return "4" if flash-attn-4 is installed, else "2" if flash-attn 2.x is, else None.

    Neither is imported.
    """
    try:
        # The distribution, since a module flash_attn.cute is in flash-attn 2.8 as well.
        importlib.metadata.version("flash-attn-4")
        return "4"
    except importlib.metadata.PackageNotFoundError:
        return "2" if importlib.util.find_spec("flash_attn_2_cuda") else None


@lru_cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any] | None]:
    """The package's function for many queries a sequence and, in 2.x only, the one for decode."""
    if flash_attention_version() == "4":
        # The package's compiler warns about the package's own code.
        warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)
        return importlib.import_module("flash_attn.cute").flash_attn_varlen_func, None
    package = importlib.import_module("flash_attn")
    return package.flash_attn_varlen_func, package.flash_attn_with_kvcache


def check_flash_attention(
    block_size: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype | None = None
) -> None:
    """Raise ValueError, with the value and the remedy, if the package cannot serve a model.

    block_size, cache_dtype: of the KV cache; None: as dtype. head_dim, dtype: of q, k and v.
    """
    version = flash_attention_version()
    remedy = "use attention_backend='triton'"
    if version is None:
        raise ValueError(f"flash_attn is not installed: pip install flash-attn-4, or {remedy}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash_attn takes float16 and bfloat16, not {dtype}: change dtype, or {remedy}"
        )
    if cache_dtype not in (None, dtype):
        raise ValueError(
            f"flash_attn does not read a KV cache in {cache_dtype}: pass kv_cache_dtype='auto' or "
            f"the model's dtype, or {remedy}"
        )
    if version == "2" and block_size % 256:
        needed = f"a kvcache_block_size that is a multiple of 256, not {block_size}"
        raise ValueError(
            f"flash_attn 2.x needs {needed}: change it, install flash-attn-4, or {remedy}"
        )
    if version == "2":  # a build may leave out the rarer head sizes, and does not tell
        step = 64
        sizes = "64 and 128"
    else:
        step = 8
        sizes = "multiples of 8 up to 128"
    if head_dim > 128 or head_dim % step:
        raise ValueError(f"flash_attn {version} serves head_dim {sizes}, not {head_dim}: {remedy}")
    try:
        prefill, _ = _functions()
    except Exception as error:  # ImportError, or whatever a package for another torch or GPU raises
        raise ValueError(
            f"flash_attn does not import ({error}): install it again, or {remedy}"
        ) from error
    missing = {"window_size", "softcap"} - inspect.signature(prefill).parameters.keys()
    if missing:
        raise ValueError(
            f"this flash_attn has no {' and no '.join(sorted(missing))}: install 2.6 or later, or "
            f"flash-attn-4, or {remedy}"
        )


def _score_options(window: int | None, softcap: float | None) -> dict[str, Any]:
    """Return the options of `paged_decode` by the package's names.

    Nothing stands for what is off, whose defaults differ among the versions.
    """
    options: dict[str, Any] = {}
    if window is not None:
        options["window_size"] = (window - 1, 0)  # keys to the left of a query's own, and right
    if softcap is not None:
        options["softcap"] = softcap
    return options


def flash_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float,
    block_tables: Tensor | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: None = None,
) -> Tensor:
    """`varlen_prefill` by flash_attn: the same arguments and result, fp16 and bf16 only.

    v_scale: None, since no cache in FP8 is read.

    The cache must hold finite numbers, as `torch.zeros` makes it: flash-attn-4 may load slots that
    nothing was stored in, multiplies them by 0, and 0 * NaN is NaN.
    """
    lengths: dict[str, Tensor] = {}  # how long the keys are and where, by the package's names
    if block_tables is None:
        lengths["cu_seqlens_k"] = cu_seqlens_k
    else:
        assert k_cache is not None and v_cache is not None
        k = k_cache
        v = v_cache
        if flash_attention_version() == "2":
            lengths["cu_seqlens_k"] = cu_seqlens_k
            lengths["block_table"] = block_tables
        else:
            lengths["seqused_k"] = cu_seqlens_k.diff()
            lengths["page_table"] = block_tables
    prefill, _ = _functions()
    out = prefill(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=scale,
        causal=True,
        **lengths,
        **_score_options(window, softcap),
    )
    return out[0] if isinstance(out, tuple) else out  # version 4 also returns the log-sum-exp


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    v_scale: None = None,
) -> Tensor:
    """`paged_decode` by flash_attn: the same arguments, fp16 and bf16 only.

    v_scale: as in `flash_prefill`.

    The cache must hold finite numbers, as in `flash_prefill`. Rows with context 0 read no block;
    their results are zeros in 2.x and unspecified in flash-attn-4.
    """
    queries = q[:, None]  # [num_seqs, 1, heads, head_dim]
    prefill, decode = _functions()
    if decode is not None:
        out = decode(
            queries,
            k_cache,
            v_cache,
            cache_seqlens=context_lens,
            block_table=block_tables,
            softmax_scale=scale,
            causal=True,
            **_score_options(window, softcap),
        )
    else:
        out, _ = prefill(
            queries,
            k_cache,
            v_cache,
            seqused_k=context_lens,
            page_table=block_tables,
            softmax_scale=scale,
            causal=True,
            **_score_options(window, softcap),
        )
    return out[:, 0]
