"""What a line asks for, in the terms of the engine, and what its answer is to look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanovllm.pooling.params import PoolingParams
from nanovllm.sampling_params import SamplingParams

Kind = Literal["generate", "chat", "embed"]
Prompt = str | list[int]


@dataclass(slots=True)  # not frozen: that would take twice as long to make
class LineRequest:
    """A line that was understood.

    Each of `prompts` is to be submitted with the parameters at its place in `params`. A chat has
    `messages` instead, and one place in `params`.
    """

    number: int  # the line's
    kind: Kind
    params: Sequence[SamplingParams] | Sequence[PoolingParams]  # the latter of "embed"
    prompts: list[Prompt] = field(default_factory=list)  # of "generate" and "embed"
    messages: list[dict[str, Any]] = field(default_factory=list)  # of "chat"
    template_options: dict[str, Any] = field(default_factory=dict)  # of "chat"
    truncate_prompt_tokens: int | None = None  # of "embed"; others have it in their parameters

    # What the answer is to look like.
    is_batch: bool = True  # OpenAI's batch form; otherwise the plain one
    model: str = ""  # the name to report
    custom_id: str = ""
    carried: dict[str, Any] = field(default_factory=dict)  # fields that a plain answer begins with
    echo: bool = False  # whether the text begins with the prompt
    shows_ids: bool = False  # whether there are the token ids of prompt and completion
    base64: bool = False  # whether a vector is the base64 of its float32, and not a list
    # From a token id to its bytes, which of part of a character its text does not show. It is to be
    # set by whoever has the tokenizer; without, log-probabilities say null for such tokens.
    token_bytes: Callable[[int], bytes] | None = None
