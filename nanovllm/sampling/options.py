"""What one sequence asks of the sampler; it travels to all ranks, and needs no torch."""

from dataclasses import dataclass, field

from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """What a sequence asks of the sampler beyond temperature and seed."""

    params: SamplingParams
    min_length: int = 0  # no id of `early_ids` may be drawn while prompt and completion are shorter
    early_ids: tuple[int, ...] = ()
    # The prompt, and the completion so far; both are empty without penalties.
    penalized_prompt_ids: list[int] = field(default_factory=list)
    penalized_completion_ids: list[int] = field(default_factory=list)
