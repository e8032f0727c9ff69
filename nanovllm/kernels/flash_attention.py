"""The two attentions through the `flash_attn` package, imported when first needed, in either of its forms: 2.x
(`flash-attn`, a source build) and 4 (`flash-attn-4`, a wheel that compiles at first use)."""

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache
def flash_attention_version() -> str | None:
    """ "4" if flash-attn-4 is installed, else "2" if flash-attn 2.x is, else None. Imports neither."""
    try:
        importlib.metadata.version("flash-attn-4")  # not the module: 2.8 has a flash_attn.cute too
        return "4"
    except importlib.metadata.PackageNotFoundError:
        return "2" if importlib.util.find_spec("flash_attn_2_cuda") else None


@lru_cache
def _functions() -> tuple[Callable, Callable | None]:
    """The package's function for many queries a sequence and, in 2.x, the one for decode."""
    if flash_attention_version() == "4":
        warnings.filterwarnings(
            "ignore", "Argument aux_data", UserWarning
        )  # its compiler's, about its own code
        return importlib.import_module("flash_attn.cute").flash_attn_varlen_func, None
    package = importlib.import_module("flash_attn")
    return package.flash_attn_varlen_func, package.flash_attn_with_kvcache


def check_flash_attention(block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    """Raise ValueError, with the value and the remedy, if `flash_prefill` and `flash_decode` cannot serve."""
    version, remedy = flash_attention_version(), "use attention_backend='triton'"
    # Builds of 2.x may leave out the rarer head sizes, and do not say so.
    step, sizes = (64, "64 and 128") if version == "2" else (8, "multiples of 8 up to 128")
    if version is None:
        raise ValueError(f"flash_attn is not installed: pip install flash-attn-4, or {remedy}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash_attn takes float16 and bfloat16, not {dtype}: change dtype, or {remedy}"
        )
    if version == "2" and block_size % 256:
        needed = f"a kvcache_block_size that is a multiple of 256, not {block_size}"
        raise ValueError(
            f"flash_attn 2.x needs {needed}: change it, install flash-attn-4, or {remedy}"
        )
    if head_dim > 128 or head_dim % step:
        raise ValueError(f"flash_attn {version} serves head_dim {sizes}, not {head_dim}: {remedy}")
    try:
        _functions()
    except Exception as error:  # ImportError, or whatever a package for another torch or GPU raises
        raise ValueError(
            f"flash_attn does not import ({error}): install it again, or {remedy}"
        ) from error


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
) -> Tensor:
    """`varlen_prefill` by flash_attn: same arguments and result, fp16 and bf16 only.

    The cache must be finite, as `torch.zeros` makes it: flash-attn-4 may load what is not stored yet, and 0 * NaN is
    NaN."""
    options = dict(cu_seqlens_k=cu_seqlens_k)
    if block_tables is not None:
        k, v = k_cache, v_cache
        if flash_attention_version() == "2":
            options["block_table"] = block_tables
        else:
            options = dict(seqused_k=cu_seqlens_k.diff(), page_table=block_tables)
    options |= dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    out = _functions()[0](q, k, v, softmax_scale=scale, causal=True, **options)
    return out[0] if isinstance(out, tuple) else out  # 4 adds the log-sum-exp


def flash_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
) -> Tensor:
    """`paged_decode` by flash_attn: same arguments, fp16 and bf16 only; the cache must be finite as above. Rows with
    context 0 read no block; their output is zeros in 2.x and unspecified in flash-attn-4."""
    args, options = (q[:, None], k_cache, v_cache), dict(softmax_scale=scale, causal=True)
    prefill, decode = _functions()
    if decode is not None:
        return decode(*args, cache_seqlens=context_lens, block_table=block_tables, **options)[:, 0]
    return prefill(*args, seqused_k=context_lens, page_table=block_tables, **options)[0][:, 0]
