"""Attention on a CPU: what all layers of a step have in common is worked out once.

On a CPU the bytes that are touched decide, and memory that was never touched before costs most: the
system has to supply it page by page. So the layers of a step share slots, masks, rotations and
buffers. K and V are read in place where the blocks of a sequence lie one after the other, and are
gathered elsewhere, of sequences of like length at a time, into a buffer that fits the CPU's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.checkpoints.kv_scales import KVScales
from nanovllm.kernels.fp8_cache import as_bytes, round_to_cache
from nanovllm.kernels.torch_attention import causal_mask, masked_attention

if TYPE_CHECKING:
    from nanovllm.kernels.attention_plan import AttentionOptions

# A group of decoding sequences is attended in one call, padded to its longest. A call more costs as
# much as some 100 tokens of padding; more tokens in a group do not stay in the L2 cache.
MAX_PADDING = 128
MAX_GROUP_TOKENS = 1024
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that one call attends: several with one query each, or one with any number.

    Keys are those that a query sees: with a window the last ones of a sequence.
    """

    queries: slice  # rows of q
    num_seqs: int
    num_keys: int  # of the longest sequence
    # Where keys lie one after the other, as those of a single sequence or of equally long ones may:
    first_slot: int  # of the first key of the first sequence
    distance: int = 0  # from there to the first slot of the next sequence, and so on
    # Else:
    slots: Tensor | None = None  # [num_seqs * num_keys] int64: which slots to gather
    # True: may be seen. [num_seqs, 1, 1, num_keys] or, of a single sequence, [queries, num_keys].
    # None: see `causal_mask`.
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
        self._groups: dict[int | None, list[Group]] = {}  # by the window; layers may differ in it
        # By the table of cosines (a tensor's hash is its identity): layers may have several.
        self._rotations: dict[Tensor, Rotation] = {}
        self._slots: Tensor | None = None  # int64, of the tokens that are stored
        self._stored: Tensor | None = None  # [tokens] bool: which ones; None: all
        self._swapped = torch.empty(0)  # [tokens, heads + kv_heads, rotary_size] float32
        # For K and V: [tokens of the largest group, ...]
        self._gathered = [torch.empty(0), torch.empty(0)]

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
        scales: KVScales | None = None,
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
        k, v = qkv[:, num_heads:].chunk(2, dim=1)
        if scales is not None:
            rounded_k, rounded_v = round_to_cache(x[:, num_heads:], v, scales)
            k.copy_(rounded_k)
            v.copy_(rounded_v)
            k = as_bytes(rounded_k)
            v = as_bytes(rounded_v)
        if slot_mapping is None:
            return qkv
        if self._slots is None:
            stored = slot_mapping >= 0  # all but padding rows
            self._slots = slot_mapping[stored].long()
            self._stored = None if stored.all() else stored
        if self._stored is not None:
            k = k[self._stored]
            v = v[self._stored]
        as_bytes(k_cache).flatten(0, 1)[self._slots] = k
        as_bytes(v_cache).flatten(0, 1)[self._slots] = v
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
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        options: AttentionOptions,
    ) -> Tensor:
        """Do what `AttentionBackend.attend` does."""
        if options.window not in self._groups:
            self._groups[options.window] = self._plan(k_cache, options.window)
        groups = self._groups[options.window]
        if self.block_tables is not None:
            k = k_cache.flatten(0, 1)
            v = v_cache.flatten(0, 1)
        heads_of_each = q.shape[1] // k.shape[1]
        q = q.unflatten(1, (-1, heads_of_each))  # [queries, kv_heads, heads of each, head_dim]
        if len(groups) == 1:
            (group,) = groups
            keys = self._read(group, k, which=0).to(q.dtype)
            values = self._read(group, v, which=1).to(q.dtype)
            return attend_group(group, q, keys, values, options).flatten(1, 2)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in groups:
            keys = self._read(group, k, which=0).to(q.dtype)
            values = self._read(group, v, which=1).to(q.dtype)
            out[group.queries] = attend_group(group, q[group.queries], keys, values, options)
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
        torch.index_select(as_bytes(source), 0, group.slots, out=as_bytes(buffer))
        return buffer.unflatten(0, (group.num_seqs, group.num_keys))

    def _plan(self, k_cache: Tensor, window: int | None) -> list[Group]:
        """Cut the sequences into groups, for layers with this window, and make their buffers."""
        num_seen = list(self.num_keys)  # by any query of a sequence: the last ones, with a window
        if window is not None:
            for index, num_queries in enumerate(self.num_queries):
                num_seen[index] = min(num_seen[index], num_queries + window - 1)
        query_starts = np.cumsum([0, *self.num_queries]).tolist()
        key_ends = np.cumsum(self.num_keys).tolist()
        groups = []
        index = 0
        while index < len(num_seen):
            if self.num_queries[index] == 0:  # another sequence computes its tokens
                index += 1
                continue
            end = self._group_end(index, num_seen)
            queries = slice(query_starts[index], query_starts[end])
            if self.block_tables is None:
                num_keys = num_seen[index]
                group = Group(
                    queries=queries,
                    num_seqs=1,
                    num_keys=num_keys,
                    first_slot=key_ends[index] - num_keys,
                    mask=causal_mask(self.num_queries[index], num_keys, window, CPU),
                )
            else:
                group = self._read_from_cache(
                    queries, index, num_seen[index:end], k_cache.shape[1], window
                )
            groups.append(group)
            index = end
        most = max((len(group.slots) for group in groups if group.slots is not None), default=0)
        if most > len(self._gathered[0]):
            shape = (most, *k_cache.shape[2:])
            self._gathered = [k_cache.new_empty(shape) for _ in range(2)]
        return groups

    def _group_end(self, start: int, num_seen: list[int]) -> int:
        """Where the group that begins with sequence `start` ends."""
        if self.block_tables is None or self.num_queries[start] > 1:
            return start + 1
        longest = num_seen[start]
        padding = 0
        for index in range(start + 1, len(num_seen)):
            padding += longest - num_seen[index]
            is_longer = num_seen[index] > longest  # the scheduler puts the longest first
            is_full = (index + 1 - start) * longest > MAX_GROUP_TOKENS
            if is_longer or is_full or padding > MAX_PADDING or self.num_queries[index] != 1:
                return index
        return len(num_seen)

    def _read_from_cache(
        self,
        queries: slice,
        start: int,
        num_seen: list[int],
        block_size: int,
        window: int | None,
    ) -> Group:
        """Make the group of the sequences from `start` on, whose keys are all in the cache.

        num_seen: of each of them, the keys that some query sees.
        """
        assert self.block_tables is not None
        num_seqs = len(num_seen)
        lengths = np.array(num_seen)[:, None]
        num_keys = int(lengths.max())
        table = self.block_tables[start : start + num_seqs]
        offsets: int | np.ndarray = 0  # of the first keys in their blocks, [num_seqs, 1]
        if window is not None:
            # The tables begin at the blocks of the first keys that are seen.
            first_keys = np.array(self.num_keys[start : start + num_seqs])[:, None] - lengths
            offsets = first_keys % block_size
            columns = first_keys // block_size + np.arange(table.shape[1])
            table = np.take_along_axis(table, columns.clip(max=table.shape[1] - 1), axis=1)
        num_blocks = -(-int((offsets + lengths).max()) // block_size)
        blocks = table[:, :num_blocks].astype(np.int64)
        first_slots = (blocks[:, :1] * block_size + offsets).ravel()
        distances = np.diff(first_slots)
        distance = int(distances[0]) if num_seqs > 1 else 0
        is_regular = distance >= 0 and (distances == distance).all()
        # With lengths that differ, a view would show slots past a sequence's end. They are masked,
        # but what an earlier sequence left there may be NaN.
        is_whole = (np.diff(blocks) == 1).all() and (lengths == num_keys).all()
        slots = None
        if not (is_whole and is_regular):
            # Positions past a sequence's end read its last token again, which exists.
            positions = offsets + np.minimum(np.arange(num_keys), lengths - 1)
            found = np.take_along_axis(blocks, positions // block_size, axis=1)
            slots = torch.from_numpy((found * block_size + positions % block_size).ravel())
        mask = None
        if self.num_queries[start] > 1:
            mask = causal_mask(self.num_queries[start], num_keys, window, CPU)
        elif lengths.min() < num_keys:
            mask = torch.from_numpy(np.arange(num_keys) < lengths)[:, None, None]
        return Group(
            queries=queries,
            num_seqs=num_seqs,
            num_keys=num_keys,
            first_slot=int(first_slots[0]),
            distance=distance,
            slots=slots,
            mask=mask,
        )


def attend_group(
    group: Group, q: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions
) -> Tensor:
    """Attend one group; the result is like q.

    q: `[num_seqs or queries, kv_heads, heads of each, head_dim]`.
    keys, values: `[num_seqs, num_keys, kv_heads, head_dim]`.
    """
    if len(q) == group.num_seqs:
        # The query heads that share a KV head take the place of query positions.
        keys = keys.transpose(1, 2)
        values = values.transpose(1, 2)
        out = masked_attention(q, keys, values, group.mask, options.scale, options.softcap)
        return out if options.kv_scales is None else out * options.kv_scales.v
    # KV heads take the place of the batch, so that K and V are repeated without a copy.
    q = q.permute(1, 2, 0, 3)
    repeated = (-1, q.shape[1], -1, -1)
    out = masked_attention(
        q,
        keys[0].transpose(0, 1)[:, None].expand(repeated),
        values[0].transpose(0, 1)[:, None].expand(repeated),
        group.mask,
        options.scale,
        options.softcap,
        is_causal=group.mask is None,
    )
    out = out.permute(2, 0, 1, 3)
    return out if options.kv_scales is None else out * options.kv_scales.v
