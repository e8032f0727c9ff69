"""Attention on a CPU: what all layers of a step have in common is worked out once.

On a CPU the bytes that are touched decide, and memory that was never touched before costs most: the
system has to supply it page by page. So the layers of a step share slots, masks, rotations and
buffers. K and V are read in place where the blocks of a sequence lie one after the other, and are
gathered elsewhere, of sequences of like length at a time, into a buffer that fits the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# A group of decoding sequences is attended in one call, padded to its longest. A call more costs as
# much as some 100 tokens of padding; more tokens in a group do not stay in the L2 cache.
MAX_PADDING = 128
MAX_GROUP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that one call attends: several with one query each, or one with any number."""

    queries: slice  # rows of q
    num_seqs: int
    num_keys: int  # of the longest sequence
    # Where keys lie one after the other, as those of a single sequence or of equally long ones may:
    first_slot: int  # of the first sequence
    distance: int = 0  # from there to the first slot of the next sequence, and so on
    # Else:
    slots: Tensor | None = None  # [num_seqs * num_keys] int64: which slots to gather
    # True: may be seen. [num_seqs, 1, 1, num_keys] or, of a single sequence, [queries, num_keys].
    # None: a single query sees all keys, of several the first sees one, the next two, and so on.
    mask: Tensor | None = None


class Rotation(NamedTuple):
    """By what RoPE multiplies the elements of q and k, and of their partners, to add the two."""

    cos: Tensor  # [tokens, 1, rotary_size] float32
    sin: Tensor  # the same; negated for the first element of each pair
    interleaved: bool

    @staticmethod
    def of_tokens(cos: Tensor, sin: Tensor, interleaved: bool) -> Rotation:
        """Spread the cosines and sines of pairs, `[tokens, rotary_size / 2]`, over the elements."""
        cos = cos.unsqueeze(1)
        sin = sin.unsqueeze(1)
        if interleaved:
            both_cos = torch.stack((cos, cos), dim=-1).flatten(-2)
            both_sin = torch.stack((-sin, sin), dim=-1).flatten(-2)
        else:
            both_cos = torch.cat((cos, cos), dim=-1)
            both_sin = torch.cat((-sin, sin), dim=-1)
        return Rotation(both_cos, both_sin, interleaved)


class CpuStep:
    """One step's attention. The first layer makes what it shares with the others."""

    def __init__(
        self, num_queries: Sequence[int], num_keys: Sequence[int], block_tables: np.ndarray | None
    ) -> None:
        """Describe n sequences: see `AttentionBackend.plan_prefill`."""
        self.num_queries = num_queries
        self.num_keys = num_keys
        self.block_tables = block_tables
        self._groups: list[Group] = []
        # By the table of cosines (a tensor's hash is its identity): layers may have several.
        self._rotations: dict[Tensor, Rotation] = {}
        self._slots: Tensor | None = None  # int64, of the tokens that are stored
        self._stored: Tensor | None = None  # [tokens] bool: which ones; None: all
        self._swapped = torch.empty(0)  # [tokens, heads + kv_heads, rotary_size] float32
        self._gathered: list[Tensor] = []  # for K and V: [tokens of the largest group, ...]

    def last_tokens(self) -> CpuStep:
        """The same sequences, each with its last query only."""
        return CpuStep([1] * len(self.num_queries), self.num_keys, self.block_tables)

    def norm_rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor | None,
        num_heads: int,
        interleaved: bool = False,
    ) -> Tensor:
        """Do what norm_rope_store.py's `norm_rope_store` does."""
        if qkv.dim() == 4:
            qkv = qkv.sum(0)
        num_kv_heads = (qkv.shape[1] - num_heads) // 2
        qk = qkv[:, : num_heads + num_kv_heads]
        x = qk.float()
        if q_weight is not None and k_weight is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x[:, :num_heads].mul_(q_weight)
            x[:, num_heads:].mul_(k_weight)
        if cos is not None and sin is not None:
            if cos not in self._rotations:
                self._rotations[cos] = Rotation.of_tokens(
                    cos[positions], sin[positions], interleaved
                )
            self._rotate(x, self._rotations[cos])
        if x.data_ptr() != qk.data_ptr():  # it is qk itself, in float32 without a norm
            qk.copy_(x)
        if slot_mapping is None:
            return qkv
        if self._slots is None:
            stored = slot_mapping >= 0  # all but padding rows
            self._slots = slot_mapping[stored].long()
            self._stored = None if stored.all() else stored
        stored_qkv = qkv if self._stored is None else qkv[self._stored]
        k, v = stored_qkv[:, num_heads:].chunk(2, dim=1)
        k_cache.flatten(0, 1)[self._slots] = k
        v_cache.flatten(0, 1)[self._slots] = v
        return qkv

    def _rotate(self, x: Tensor, rotation: Rotation) -> None:
        """Rotate q and k in place, x `[tokens, heads + kv_heads, head_dim]` float32."""
        turning = x[..., : rotation.cos.shape[-1]]
        if self._swapped.shape != turning.shape:
            self._swapped = torch.empty(turning.shape, dtype=torch.float32, device=x.device)
        # (first, second) becomes (first * cos - second * sin, second * cos + first * sin).
        if rotation.interleaved:
            pairs = turning.unflatten(-1, (-1, 2))
            torch.stack((pairs[..., 1], pairs[..., 0]), dim=-1, out=self._swapped.view(pairs.shape))
        else:
            first, second = turning.chunk(2, dim=-1)
            torch.cat((second, first), dim=-1, out=self._swapped)
        turning.mul_(rotation.cos).add_(self._swapped.mul_(rotation.sin))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float
    ) -> Tensor:
        """Do what `AttentionBackend.attend` does."""
        if not self._groups:
            self._plan(k_cache)
        if self.block_tables is not None:
            k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
        heads_of_each = q.shape[1] // k.shape[1]
        q = q.unflatten(1, (-1, heads_of_each))  # [queries, kv_heads, heads of each, head_dim]
        if len(self._groups) == 1:
            (group,) = self._groups
            keys, values = self._read(group, k, which=0), self._read(group, v, which=1)
            return attend_group(group, q, keys, values, scale).flatten(1, 2)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in self._groups:
            keys = self._read(group, k, which=0)
            values = self._read(group, v, which=1)
            out[group.queries] = attend_group(group, q[group.queries], keys, values, scale)
        return out.flatten(1, 2)

    def _read(self, group: Group, source: Tensor, which: int) -> Tensor:
        """K or V of a group, `[num_seqs, num_keys, kv_heads, head_dim]`, in place or gathered."""
        if group.slots is None:
            first = source[group.first_slot : group.first_slot + group.num_keys][None]
            if group.num_seqs == 1:
                return first
            stride = (group.distance * source.stride(0), *source.stride())
            return first.as_strided((group.num_seqs, *first.shape[1:]), stride)
        buffer = self._gathered[which][: len(group.slots)]
        torch.index_select(source, 0, group.slots, out=buffer)
        return buffer.unflatten(0, (group.num_seqs, group.num_keys))

    def _plan(self, k_cache: Tensor) -> None:
        """Cut the sequences into groups, and make the buffers that they need."""
        starts = np.cumsum([0, *self.num_queries]).tolist()
        first_key = 0
        num_seqs = len(self.num_keys)
        index = 0
        while index < num_seqs:
            end = self._group_end(index)
            queries = slice(starts[index], starts[end])
            if self.block_tables is None:
                group = Group(queries, 1, self.num_keys[index], first_slot=first_key)
                first_key += self.num_keys[index]
            else:
                group = self._read_from_cache(queries, index, end, k_cache.shape[1])
            self._groups.append(group)
            index = end
        most = max((len(g.slots) for g in self._groups if g.slots is not None), default=0)
        shape = (most, *k_cache.shape[2:])
        self._gathered = [k_cache.new_empty(shape) for _ in range(2)]

    def _group_end(self, start: int) -> int:
        """Where the group that begins with sequence `start` ends."""
        if self.block_tables is None or self.num_queries[start] > 1:
            return start + 1
        longest = self.num_keys[start]
        padding = 0
        for index in range(start + 1, len(self.num_keys)):
            padding += longest - self.num_keys[index]
            is_longer = self.num_keys[index] > longest  # the scheduler puts the longest first
            is_full = (index + 1 - start) * longest > MAX_GROUP_TOKENS
            if is_longer or is_full or padding > MAX_PADDING or self.num_queries[index] > 1:
                return index
        return len(self.num_keys)

    def _read_from_cache(self, queries: slice, start: int, end: int, block_size: int) -> Group:
        """Make the group of sequences `start` to `end`, whose keys are all in the cache."""
        assert self.block_tables is not None
        num_seqs = end - start
        lengths = np.array(self.num_keys[start:end])[:, None]
        num_keys = int(lengths.max())
        blocks = self.block_tables[start:end, : -(-num_keys // block_size)].astype(np.int64)
        slots = None
        distances = np.diff(blocks[:, 0])
        distance = int(distances[0]) if num_seqs > 1 else 0
        # With lengths that differ, a view would show slots past a sequence's end. They are masked,
        # but what an earlier sequence left there may be NaN.
        in_place = (np.diff(blocks) == 1).all() and (lengths == num_keys).all()
        if not in_place or distance < 0 or (distances != distance).any():
            # Positions past a sequence's end read its last token again, which exists.
            positions = np.minimum(np.arange(num_keys), lengths - 1)
            found = np.take_along_axis(blocks, positions // block_size, axis=1)
            slots = torch.from_numpy((found * block_size + positions % block_size).ravel())
        mask = None
        num_queries = self.num_queries[start]
        if 1 < num_queries < num_keys:
            # SDPA's own triangle lets the first query see one key; here the last query sees all.
            ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device="cpu")
            mask = ones.tril(num_keys - num_queries)
        elif lengths.min() < num_keys:
            mask = torch.from_numpy(np.arange(num_keys) < lengths)[:, None, None]
        return Group(
            queries=queries,
            num_seqs=num_seqs,
            num_keys=num_keys,
            first_slot=int(blocks[0, 0]) * block_size,
            distance=distance * block_size,
            slots=slots,
            mask=mask,
        )


def attend_group(group: Group, q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend one group; the result is like q.

    q: `[num_seqs or queries, kv_heads, heads of each, head_dim]`.
    keys, values: `[num_seqs, num_keys, kv_heads, head_dim]`.
    """
    sdpa = F.scaled_dot_product_attention  # [batch, heads, queries or keys, head_dim]
    if len(q) == group.num_seqs:
        # The query heads that share a KV head take the place of query positions.
        return sdpa(q, keys.transpose(1, 2), values.transpose(1, 2), group.mask, scale=scale)
    # KV heads take the place of the batch, so that K and V are repeated without a copy.
    q = q.permute(1, 2, 0, 3)
    repeated = (-1, q.shape[1], -1, -1)
    keys = keys[0].transpose(0, 1)[:, None].expand(repeated)
    values = values[0].transpose(0, 1)[:, None].expand(repeated)
    out = sdpa(q, keys, values, group.mask, is_causal=group.mask is None, scale=scale)
    return out.permute(2, 0, 1, 3)
