"""What a job says about all of its lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.sampling_params import SamplingParams

FORMS = ("auto", "batch", "plain")


@dataclass(frozen=True, slots=True)
class LineOptions:
    """How lines are read and answered. It travels to the processes that do it, so it pickles.

    Raises a TypeError or ValueError for a wrong form, or defaults that no line could have.
    """

    model: str  # the name that answers report, whichever one a line names
    # Of the output: "batch" (OpenAI's), "plain", or "auto": each line is answered in its own form.
    form: str = "auto"
    # Sampling parameters of the lines that bring none themselves, by their names.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    # The same, of the model's own generation_config.json; `defaults` go before them.
    recommended: Mapping[str, Any] = field(default_factory=dict)
    # Lines without a seed get one that follows from this and their number, so that a job that was
    # interrupted ends with the tokens of one that was not. None: they get none.
    seed: int | None = None
    # Options of the chat template for the lines that do not say: {"enable_thinking": False}, say.
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    keep_prompt: bool = False  # whether plain answers repeat the prompt, messages or input

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, not {self.form!r}")
        if self.defaults:
            from nanovllm.sampling_params import SamplingParams

            SamplingParams(**self.defaults)  # raises now, and not once a line

    def with_recommended(self, params: SamplingParams) -> LineOptions:
        """A copy with those parameters of the model's that are not our own defaults.

        params: what `LLM.generate` takes when it gets none.
        """
        usual = type(params)()
        recommended = {}
        for each in fields(params):
            value = getattr(params, each.name)
            if value != getattr(usual, each.name):
                recommended[each.name] = value
        return replace(self, recommended=recommended)
