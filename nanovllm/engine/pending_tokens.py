"""The results of a launched step, on their way from the device to the host."""

import time

import torch
from torch import Tensor

from nanovllm.layers.sampler import Sampled
from nanovllm.readout.step_reader import Readings
from nanovllm.results import TokenLogprobs
from nanovllm.sampling.extras import Logprobs


class PendingTokens:
    """What a step sampled: copied to the host behind the step, and read when somebody waits."""

    def __init__(self, sampled: Sampled | None, readings: Readings | None = None) -> None:
        """Queue the copies. On a CPU the step has run by now, and copying is all there is."""
        self.readings = None if readings is None else readings.move(to_host)
        self.waits_for_masks = sampled is None  # if so, there is nothing else to copy yet
        if sampled is None:
            return
        self.token_ids = to_host(sampled.token_ids)
        self.logprobs: Logprobs | None = None
        if sampled.logprobs is not None:
            self.logprobs = Logprobs(*map(to_host, sampled.logprobs))
        self.copied: torch.cuda.Event | None = None  # the copies are done; None on a CPU
        self.launched_at = time.perf_counter()  # s
        if sampled.token_ids.is_cuda:
            self.copied = torch.cuda.Event(enable_timing=True)
            self.copied.record()

    def wait(self) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Return the token ids, and the log-probabilities of each sequence that asked for them."""
        if self.copied is not None:
            self.copied.synchronize()
        token_ids = self.token_ids.tolist()
        if self.logprobs is None:
            return token_ids, None
        columns = (column.tolist() for column in self.logprobs)
        return token_ids, [TokenLogprobs(*row) for row in zip(*columns, strict=True)]


def to_host(tensor: Tensor) -> Tensor:
    """Start copying a tensor to (pinned) host memory."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
