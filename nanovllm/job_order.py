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
    if not config.enable_prefix_caching or fits_at_once(requests, config):
        return requests
    prompts = [seqs[0].token_ids for seqs in requests]
    return [requests[index] for index in prefix_order(prompts, config.kvcache_block_size)]


def fits_at_once(requests: list[list[Sequence]], config: Config) -> bool:
    """Whether all sequences of a job can run together, even if they share no block."""
    if sum(map(len, requests)) > config.max_num_seqs:
        return False
    num_blocks = 0
    for seqs in requests:
        max_tokens = seqs[0].max_tokens
        assert max_tokens is not None  # the engine has made it fit max_model_len
        num_tokens = seqs[0].num_prompt_tokens + max_tokens
        num_blocks += len(seqs) * -(-num_tokens // config.kvcache_block_size)
    return num_blocks <= config.num_kvcache_blocks


def prefix_order(prompts: list[list[int]], block_size: int) -> list[int]:
    """Return the indices of prompts such that those with a common prefix follow one another.

    Only whole blocks count, of `block_size` tokens each, and prompts that are equal to the end. It
    takes time for those blocks that prompts have in common, and hardly any for others.
    """
    order: list[int] = []
    # Groups of prompts that agree in all tokens before `start`; the one to go on with comes last.
    groups = [Group(list(range(len(prompts))), start=0)]
    while groups:
        group = groups.pop()
        # Where no member is longer, they are equal.
        if group.is_done or all(len(prompts[index]) <= group.start for index in group.members):
            order += group.members
        else:
            groups += reversed(split(prompts, group, group.start + block_size))
    return order


@dataclass(slots=True)
class Group:
    """Some of a job's prompts, by their indices."""

    members: list[int]
    start: int
    is_done: bool = False  # the members have no more in common, and are in order


def split(prompts: list[list[int]], group: Group, end: int) -> list[Group]:
    """Part the members by their tokens from `start` to `end`; all stay in order."""
    start = group.start
    # A look at some tokens tells most of those that agree with nobody. They get no lists of their
    # own: for a million of them Python's garbage collector would take longer than all this does.
    some_tokens = slice(start, end, max((end - start) // 8, 1))
    probes = [hash(tuple(prompts[index][some_tokens])) for index in group.members]
    counts = Counter(probes)
    groups: list[Group] = []
    group_of: dict[tuple[int, ...], Group] = {}
    for index, probe in zip(group.members, probes, strict=True):
        if counts[probe] == 1:
            if not groups or not groups[-1].is_done:
                groups.append(Group([], end, is_done=True))
            groups[-1].members.append(index)
            continue
        tokens = tuple(prompts[index][start:end])
        if tokens not in group_of:
            group_of[tokens] = Group([], end)
            groups.append(group_of[tokens])
        group_of[tokens].members.append(index)
    return groups
