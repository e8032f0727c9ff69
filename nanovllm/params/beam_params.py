"""What `LLM.beam_search` is asked for, validated in one place."""

from dataclasses import dataclass
from typing import Annotated

from nanovllm.utils.checks import Range, check_fields


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """Options of a beam search; a wrong one is a TypeError or ValueError that names the value."""

    # How many beams are followed, and returned, for each prompt.
    beam_width: Annotated[int, Range(1)]
    max_tokens: Annotated[int, Range(1)]  # of each beam; `max_model_len` may allow fewer
    ignore_eos: bool = False  # whether to go on after an end-of-sequence token
    # Beams are the likeliest, not drawn: 0 is all there is. It is here since vLLM has it.
    temperature: Annotated[float, Range(0, 0)] = 0.0
    # Beams are compared by their log-probability over (number of tokens) ** length_penalty. Above
    # 0 long ones gain, below 0 short ones do. Beyond these limits, floats would overflow.
    length_penalty: Annotated[float, Range(-50, 50)] = 1.0
    include_stop_str_in_output: bool = False  # whether the text keeps the token that ends it

    def __post_init__(self) -> None:
        check_fields(self)
