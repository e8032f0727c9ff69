"""The results of a launched step, on their way from the device to the host."""

import time

import torch
from torch import Tensor

from nanovllm.outputs import TokenLogprobs


class PendingTokens:
    """The tokens of a launched step, and the log-probabilities asked for, on their way to the host."""

    def __init__(self, token_ids: Tensor, logprobs: tuple[Tensor, Tensor] | None = None) -> None:
        tensors = (token_ids, *(logprobs or ()))
        parts = (
            torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors
        )
        self.parts = [
            part.copy_(tensor, non_blocking=True)
            for part, tensor in zip(parts, tensors, strict=True)
        ]
        self.copied = torch.cuda.Event(enable_timing=True) if token_ids.is_cuda else None
        self.launched_at = time.perf_counter()  # on a CPU the step has run by now
        if self.copied is not None:
            self.copied.record()

    def wait(self) -> tuple[list[int], list[TokenLogprobs] | None]:
        """The token ids, and the log-probabilities for each sequence that asked."""
        if self.copied is not None:
            self.copied.synchronize()
        token_ids, *logprobs = (part.tolist() for part in self.parts)
        if not logprobs:
            return token_ids, None
        return token_ids, [TokenLogprobs(*pair) for pair in zip(*logprobs, strict=True)]
