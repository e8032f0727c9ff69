"""Which sequences of a prefill step have the same tokens, so that one computes them for all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence


class PrefillGroups:
    """The sequences of one prefill step, in groups: one that computes, and those that follow it."""

    def __init__(self, only_siblings: bool) -> None:
        """Begin a step. only_siblings: only completions of one request may be in one group."""
        self._only_siblings = only_siblings
        self._groups: dict[tuple[int, ...], list[Sequence]] = {}

    def find(self, seq: Sequence) -> list[Sequence]:
        """Return the group for a sequence's tokens, empty if it is the first one to have them.

        Who is admitted appends it there.
        """
        token_ids = seq.token_ids
        num_tokens = len(token_ids)
        owner = seq.request_id if self._only_siblings else 0
        # Most prompts differ in one of these, and then nothing else has to be looked at.
        probe = (
            num_tokens,
            owner,
            token_ids[num_tokens // 4],
            token_ids[num_tokens // 2],
            token_ids[-1],
        )
        group = self._groups.setdefault(probe, [])
        if group and group[0].token_ids != token_ids:
            # The key of all tokens begins with 0, which is no number of tokens.
            group = self._groups.setdefault((0, owner, *token_ids), [])
        # It may be followed, and follows nobody: it has to compute its prompt itself, or it has
        # blocks of its own already, as the beams of two searches for one prompt have.
        if group and (seq.needs_whole_prompt or seq.block_table):
            group = self._groups.setdefault((0, seq.seq_id), [])
        return group

    def members(self) -> list[Sequence]:
        """All sequences, each right behind the one that computes its tokens."""
        return [seq for group in self._groups.values() for seq in group]
