"""What is new of a completion since a reader last asked: what `LLM.stream` yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanovllm.outputs import completion_items
from nanovllm.results import StreamPart

if TYPE_CHECKING:
    from nanovllm.engine.sequence import Sequence


@dataclass(slots=True)
class StreamedCompletion:
    """A completion that is handed out while it grows."""

    seq: Sequence
    index: int  # of its prompt in the list that was passed
    number: int  # which of the prompt's completions
    num_taken: int = 0  # tokens that `take` has returned
    is_done: bool = False  # whether `take` has returned the last one

    def take(self) -> StreamPart | None:
        """Return what is new since the last call; None if no token is, and it has not ended."""
        seq = self.seq
        start = self.num_taken
        num_tokens = len(seq.token_ids) - seq.num_prompt_tokens
        if num_tokens == start and not seq.is_finished:
            return None
        text = "" if seq.detokenizer is None else seq.detokenizer.take(seq.is_finished)
        self.num_taken = num_tokens
        # Asked now, with the tokens: until the next call others may step the engine, and the
        # sequence may end with tokens that have not been taken.
        self.is_done = seq.is_finished
        decoder = None if seq.detokenizer is None else seq.detokenizer.decoder
        new = completion_items(seq, text, decoder, start)
        part = StreamPart(index=self.index, completion=self.number, **new)
        if seq.readout is not None and start == 0:  # with the first token the prompt is computed
            part.update(seq.readout.result_items(None if decoder is None else decoder.token_text))
        return part
