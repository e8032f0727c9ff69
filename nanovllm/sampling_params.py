"""What a request asks of the sampler, validated in one place."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Options of one request; ValueError or TypeError when one is out of range or of the wrong type."""

    temperature: float = 1.0  # divisor of the logits before sampling; 0 picks the most likely token (greedy decoding)
    max_tokens: int = 64  # most tokens to generate, at least 1
    ignore_eos: bool = False  # keep generating after the end-of-sequence token (for benchmarks)
    seed: int | None = None  # makes the tokens repeatable, whatever runs beside; None draws from the engine's seed

    def __post_init__(self) -> None:
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise TypeError(f"temperature must be a number, not {self.temperature!r}")
        if not 0 <= self.temperature <= 1e6:  # NaN fails too
            raise ValueError(f"temperature must be 0 (greedy) or positive and at most 1e6, not {self.temperature!r}")
        if isinstance(self.max_tokens, bool) or not isinstance(self.max_tokens, int):
            raise TypeError(f"max_tokens must be an integer, not {self.max_tokens!r}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, not {self.ignore_eos!r}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise TypeError(f"seed must be an integer or None, not {self.seed!r}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, not {self.seed}")
