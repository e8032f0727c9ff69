"""In which order `generate`, which knows all of a job's prompts, queues them.

The prefix cache holds what was computed last. Where the prompts of many prefixes come in turn, and
the cache cannot hold all prefixes at once, each is evicted before it is asked for again, and is
computed again. So prompts that begin alike are queued one after another:

    prompts   [P a] [Q a] [P b] [R a] [Q b] [P c]     a letter for each block
    queued    [P a] [P b] [P c] [Q a] [Q b] [R a]

That is a walk through the tree of the prompts' blocks which, wherever it branches, takes the branch
of the earlier prompt first. A job whose prompts have nothing in common keeps its order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.engine.sequence import Sequence


def job_order(requests: list[list[Sequence]], config: Config) -> Iterable[list[Sequence]]:
    """Return the requests of a job, each the sequences of its completions, as they are best queued.

    That is the order in which they come wherever another could bring nothing.
    """
    num_seqs = sum(map(len, requests))
    num_blocks = count_blocks(requests, config.kvcache_block_size)
    may_fit = num_seqs <= config.max_num_seqs
    if not config.enable_prefix_caching or (may_fit and num_blocks <= config.num_kvcache_blocks):
        return requests
    prompts = [seqs[0].token_ids for seqs in requests]
    walk = walk_prefixes(prompts, config.kvcache_block_size)
    if may_fit and num_blocks - walk.num_shared_blocks <= config.num_kvcache_blocks:
        return requests
    return [requests[index] for index in walk.order]


def count_blocks(requests: list[list[Sequence]], block_size: int) -> int:
    """Count the blocks that a whole job needs if its prompts have nothing in common."""
    num_blocks = 0
    for seqs in requests:
        max_tokens = seqs[0].max_tokens
        assert max_tokens is not None  # the engine has made it fit max_model_len
        shared = seqs[0].num_prompt_tokens // block_size  # by the completions of the request
        each = -(-(seqs[0].num_prompt_tokens + max_tokens) // block_size) - shared
        num_blocks += shared + len(seqs) * each
    return num_blocks


@dataclass(slots=True)
class _Walk:
    """Through the tree of the prompts' blocks."""

    order: list[int]  # the prompts' indices, as the walk meets them
    num_shared_blocks: int = 0  # that are saved if each prefix of whole blocks is there once


def walk_prefixes(prompts: list[list[int]], block_size: int) -> _Walk:
    """Find an order of prompts in which those with a common prefix follow one another.

    Only whole blocks count, of `block_size` tokens each, and prompts that are equal to the end. It
    takes time for those blocks that prompts have in common, and hardly any for others.
    """
    walk = _Walk([])
    # Groups of prompts that agree in all tokens before `start`; the one to go on with comes last.
    groups = [_Group(list(range(len(prompts))), start=0)]
    while groups:
        group = groups.pop()
        longest = max(len(prompts[index]) for index in group.members) if group.members else 0
        if group.is_done or longest <= group.start:  # at their end, members are equal
            walk.order += group.members
        else:
            groups += reversed(split(prompts, group, group.start + block_size))
        if not group.is_done and 0 < group.start <= longest:  # they agree in a whole block more
            walk.num_shared_blocks += len(group.members) - 1
    return walk


@dataclass(slots=True)
class _Group:
    """Some of a job's prompts, by their indices."""

    members: list[int]
    start: int
    is_done: bool = False  # the members have no more in common, and are in order


def split(prompts: list[list[int]], group: _Group, end: int) -> list[_Group]:
    """Part the members by their tokens from `start` to `end`; all stay in order."""
    start = group.start
    # A look at some tokens tells most of those that agree with nobody. They get no lists of their
    # own: for a million of them Python's garbage collector would take longer than all this does.
    some_tokens = slice(start, end, max((end - start) // 8, 1))
    probes = [hash(tuple(prompts[index][some_tokens])) for index in group.members]
    counts = Counter(probes)
    groups: list[_Group] = []
    group_of: dict[tuple[int, ...], _Group] = {}
    for index, probe in zip(group.members, probes, strict=True):
        if counts[probe] == 1:
            if not groups or not groups[-1].is_done:
                groups.append(_Group([], end, is_done=True))
            groups[-1].members.append(index)
            continue
        tokens = tuple(prompts[index][start:end])
        if tokens not in group_of:
            group_of[tokens] = _Group([], end)
            groups.append(group_of[tokens])
        group_of[tokens].members.append(index)
    return groups
