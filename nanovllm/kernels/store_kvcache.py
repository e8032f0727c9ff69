"""Writing new keys and values into the paged KV cache."""

import torch

from nanovllm.kernels._triton import next_power_of_2, tl, triton


@triton.jit(do_not_specialize=["slot_mapping_ptr"])
def _store_kvcache_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_mapping_ptr, k_stride, v_stride,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token).to(tl.int64)  # 64 bits: a cache has more than 2^31 elements
    if slot < 0:
        return
    offsets = tl.arange(0, BLOCK)
    mask = offsets < ROW
    k = tl.load(k_ptr + token * k_stride + offsets, mask=mask)
    v = tl.load(v_ptr + token * v_stride + offsets, mask=mask)
    tl.store(k_cache_ptr + slot * ROW + offsets, k, mask=mask)
    tl.store(v_cache_ptr + slot * ROW + offsets, v, mask=mask)


def store_kvcache(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write the keys and values of n new tokens into their cache slots, one Triton program a token.

    Args:
        k, v: `[n, kv_heads, head_dim]`; the rows may be slices of the merged QKV output.
        k_cache, v_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, of k's dtype.
        slot_mapping: `[n]` int32, slot = block * block_size + offset in the block; -1 writes nowhere.
    """
    num_tokens, kv_heads, head_dim = k.shape
    row = kv_heads * head_dim
    for x in (k, v):
        assert x.stride(2) == 1 and x.stride(1) == head_dim
    assert k_cache.is_contiguous() and v_cache.is_contiguous()
    _store_kvcache_kernel[(num_tokens,)](
        k, v, k_cache, v_cache, slot_mapping, k.stride(0), v.stride(0), ROW=row, BLOCK=next_power_of_2(row)
    )


def store_kvcache_torch(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """`store_kvcache` in PyTorch: the reference and the CPU path. It never makes the host wait for a GPU."""
    num_tokens = slot_mapping.numel()
    if num_tokens == 0:
        return
    # Selecting the rows to store would need their number on the host. So a row that goes nowhere repeats the
    # first one that is stored, and when there is none at all, slot 0 is overwritten with what it holds.
    stored = slot_mapping >= 0
    first = stored.int().argmax()
    rows = torch.where(stored, torch.arange(num_tokens, device=slot_mapping.device), first)
    slots = slot_mapping[rows].clamp(min=0).long()
    for x, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.view(-1, *cache.shape[2:])
        flat[slots] = torch.where(stored.any(), x[rows], flat[slots])
