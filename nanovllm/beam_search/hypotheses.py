"""The search: which beams go on, which have ended, and when it is over. It knows of no engine.

A step extends each of `beam_width` running beams by one token. Of all extensions the likeliest are
looked at, in order: so many that enough would go on if each beam had ended by each of the model's
end-of-sequence tokens. Those that end have a score, and the best of all steps are kept. The others
go on, the likeliest `beam_width` of them.

So does `transformers`' generate(num_beams=beam_width, do_sample=False, early_stopping=False), and
the beams here are those.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

from nanovllm.results import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A completion, as far as it goes."""

    token_ids: list[int]
    cum_logprob: float  # the sum of its tokens' log-probabilities
    parent: int  # which of the beams of the step before it extends
    logprobs: list[TokenLogprobs]  # for each token the ones that it was chosen from, itself first
    finish_reason: str | None = None
    score: float = 0.0  # when it has ended


class Search:
    """The beam search of one prompt."""

    def __init__(
        self, beam_width: int, length_penalty: float, max_tokens: int, end_ids: set[int]
    ) -> None:
        self.beam_width = beam_width
        self.length_penalty = length_penalty
        self.max_tokens = max_tokens
        self.end_ids = end_ids
        # How many likeliest tokens of each beam `advance` must be given.
        self.num_candidates = max(2, 1 + len(end_ids)) * beam_width
        self.running = [Hypothesis([], 0.0, parent=0, logprobs=[])]  # the likeliest one first
        self.ended: list[Hypothesis] = []  # the best ones, the best of them first
        self.is_done = False

    def advance(self, next_tokens: list[TokenLogprobs]) -> None:
        """Extend the running beams by the likeliest next tokens of each, in the order of beams.

        Each entry's first token is one that nobody asked for; the likeliest ones are behind it.
        """
        likeliest = self._likeliest(next_tokens)
        self._collect_ended(likeliest[: self.beam_width])
        going_on = [beam for beam in likeliest if beam.finish_reason is None]
        self.running = going_on[: self.beam_width]
        self.is_done = not self.running or not self._may_improve()

    def _likeliest(self, next_tokens: list[TokenLogprobs]) -> list[Hypothesis]:
        """Return the likeliest extensions of all beams, in order."""
        extensions: list[tuple[float, int, int]] = []  # log-probability, beam, place among its own
        for parent, (beam, entry) in enumerate(zip(self.running, next_tokens, strict=True)):
            for place, logprob in enumerate(entry.values[1:], start=1):
                extensions.append((beam.cum_logprob + logprob, parent, place))
        extensions.sort(key=lambda extension: -extension[0])
        best = extensions[: self.num_candidates]
        return [
            self._extend(cum_logprob, parent, next_tokens[parent], place)
            for cum_logprob, parent, place in best
        ]

    def _extend(
        self, cum_logprob: float, parent: int, entry: TokenLogprobs, place: int
    ) -> Hypothesis:
        beam = self.running[parent]
        token_id = entry.token_ids[place]
        num_tokens = len(beam.token_ids) + 1
        finish_reason = None
        if token_id in self.end_ids:
            finish_reason = "stop"
        elif num_tokens == self.max_tokens:
            finish_reason = "length"
        chosen = TokenLogprobs(
            token_ids=[token_id, *entry.token_ids[1:]],
            values=[entry.values[place], *entry.values[1:]],
            rank=place,
        )
        return Hypothesis(
            token_ids=[*beam.token_ids, token_id],
            cum_logprob=cum_logprob,
            parent=parent,
            logprobs=[*beam.logprobs, chosen],
            finish_reason=finish_reason,
            score=self._score(cum_logprob, num_tokens),
        )

    def _score(self, cum_logprob: float, num_tokens: int) -> float:
        return cum_logprob / num_tokens**self.length_penalty

    def _collect_ended(self, beams: list[Hypothesis]) -> None:
        """Keep the best of those that have ended, these and earlier ones."""
        ended = self.ended + [beam for beam in beams if beam.finish_reason is not None]
        ended.sort(key=attrgetter("score"), reverse=True)
        self.ended = ended[: self.beam_width]

    def _may_improve(self) -> bool:
        """Whether a running beam could still be better than the worst that is kept.

        A guess if the length counts: that it would end now.
        """
        if len(self.ended) < self.beam_width:
            return True
        best = self.running[0]
        return self._score(best.cum_logprob, len(best.token_ids)) > self.ended[-1].score
