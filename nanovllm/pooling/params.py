"""What a call asks of embeddings."""

from dataclasses import dataclass
from typing import Annotated

from nanovllm.utils.checks import Range, check_fields


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """Options of an embedding; a wrong one is a TypeError or ValueError that names the value."""

    # Keep so many numbers, the first, as models trained for that allow (Matryoshka). None: all.
    dimensions: Annotated[int | None, Range(1)] = None
    # Whether what is kept is divided by its length, to be 1 long. None: as the checkpoint does.
    normalize: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.normalize not in (None, True, False):
            raise TypeError(f"normalize must be True, False or None, not {self.normalize!r}")
