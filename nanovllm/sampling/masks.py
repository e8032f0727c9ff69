"""The masks of a step: made on the host, when the tokens before it are known, for the device.

A step is launched before the tokens of the one before it have been read. A mask that depends on
them cannot be made yet. So such a step is launched in two parts: the forward pass at once, and the
sampling when its masks are there. The host makes them while the device runs the forward pass, and
the device waits only if that takes longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from xxhash import xxh3_128_digest

from nanovllm.sampling.token_rules import ALL_BITS, CompletionRules

if TYPE_CHECKING:
    from nanovllm.engine.pending_tokens import PendingTokens
    from nanovllm.engine.scheduler import Step
    from nanovllm.engine.sequence import Sequence

    Pending = deque[tuple[Step, PendingTokens]]

NOTHING_LEFT = (
    "no token is allowed here: allowed_token_ids, bad_words, thinking_token_budget or "
    "structured_outputs contradict each other"
)


@dataclass(frozen=True, slots=True)
class StepMasks:
    """Which tokens m of a step's sequences may draw; the others may draw all."""

    rows: np.ndarray  # [m] int64: which of the step's sequences
    words: np.ndarray  # [m, ceil(vocab / 32)] uint32, as token_rules.py describes

    def __reduce__(self) -> tuple[Any, ...]:
        """Send each distinct mask to the other ranks once: many rows are often alike."""
        # Digests of 128 bits: comparing the masks themselves would take as long as a small step.
        digests = [xxh3_128_digest(mask) for mask in self.words]
        _, firsts, numbers = np.unique(digests, return_index=True, return_inverse=True)
        return _unpack, (self.rows, self.words[firsts], numbers)


def _unpack(rows: np.ndarray, distinct: np.ndarray, numbers: np.ndarray) -> StepMasks:
    """The masks of which number numbers[i] among the distinct ones is that of rows[i]."""
    return StepMasks(rows, distinct[numbers])


def waits_for_masks(pending: Pending) -> bool:
    """Whether the last of these launched steps has to be sampled before another can follow it."""
    return len(pending) > 0 and pending[-1][1].waits_for_masks


def launch_sampling(pending: Pending, launch: Callable[[StepMasks], PendingTokens]) -> None:
    """Sample the last of these steps, if it waits for masks and they can be made by now."""
    if not waits_for_masks(pending):
        return  # nearly always
    step, launched = pending[-1]
    masked = _find_masked(step)
    if all(each.are_tokens_known for each in masked):
        tokens = launch(make_masks(masked))
        tokens.readings = launched.readings  # what the forward pass has found out
        pending[-1] = (step, tokens)


@dataclass(frozen=True, slots=True)
class Masked:
    """A sequence of a launched step that has rules, and draws a token that counts."""

    row: int  # which of the step's sequences it is
    seq: Sequence
    rules: CompletionRules  # the sequence's

    @property
    def are_tokens_known(self) -> bool:
        """Whether all tokens have been read back on which the mask depends."""
        return not self.rules.reads_tokens or len(self.seq.token_ids) + 1 == self.seq.num_tokens


def _find_masked(step: Step) -> list[Masked]:
    return [
        Masked(row, seq, seq.rules)
        for row, seq in enumerate(step.seqs)
        if seq.rules is not None and step.yields[row] and not seq.is_finished
    ]


def make_masks(masked: list[Masked]) -> StepMasks:
    """Make the masks of sequences whose tokens are known as far as the masks depend on them."""
    num_words = masked[0].rules.num_words if masked else 1
    words = np.full((len(masked), num_words), ALL_BITS, np.uint32)
    _match(masked, words)
    for mask, each in zip(words, masked, strict=True):
        rules = each.rules
        for rule in rules.rules:
            rule.narrow(mask, each.seq.token_ids, each.seq.num_prompt_tokens)
        if rules.may_contradict and not rules.problem and not mask.any():
            rules.problem = NOTHING_LEFT
        if rules.problem:
            mask.fill(0)  # so that the sampler finds no token, and the sequence ends with an error
    return StepMasks(np.array([each.row for each in masked], np.int64), words)


def _match(masked: list[Masked], words: np.ndarray) -> None:
    """Fill the masks of texts that must have a form, in parallel: llguidance's threads do it."""
    to_read: list[tuple[Any, int]] = []  # a matcher, and the token that it has not read
    to_fill: list[tuple[Any, int]] = []  # a matcher, and which of the masks is its
    for index, each in enumerate(masked):
        rules = each.rules
        token_ids = each.seq.token_ids
        if rules.make_matcher is None:
            continue
        if rules.matcher is None:
            rules.matcher = rules.make_matcher()
            rules.num_read = each.seq.num_prompt_tokens
        new_tokens = token_ids[rules.num_read :]
        assert len(new_tokens) <= 1, "a sequence draws no token without a mask"
        to_read += [(rules.matcher, token_id) for token_id in new_tokens]
        rules.num_read = len(token_ids)
        to_fill.append((rules.matcher, index))
    if not to_fill:
        return
    threads = _threads()
    if to_read:
        threads.consume_token_par(to_read)
    num_bytes = words[0].nbytes
    threads.unsafe_compute_mask_ptr(to_fill, words.ctypes.data, num_bytes, len(words))
    for matcher, index in to_fill:
        if matcher.is_error():
            # What went wrong, without llguidance's state and the whole grammar behind it.
            reason = matcher.get_error().partition("\n<state>")[0]
            masked[index].rules.problem = f"structured_outputs: {reason}"


@cache
def _threads() -> Any:
    """The threads of llguidance, of all engines of this process."""
    from llguidance import LLExecutor

    return LLExecutor()
