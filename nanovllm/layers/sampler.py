"""From logits to the next token of each sequence."""

import torch
from torch import Tensor, nn

from nanovllm.kernels.gumbel import gumbel_argmax, gumbel_argmax_torch
from nanovllm.utils.tensor_parallel import get_tensor_parallel


class Sampler(nn.Module):
    """Samples by the Gumbel-max trick, on the device.

    Under tensor parallelism each rank draws the winner of its own part of the vocabulary, and only those (score,
    token id) pairs travel; every rank then knows the token.
    """

    def __init__(self, vocab_start: int) -> None:
        super().__init__()
        self.tp = get_tensor_parallel()
        self.vocab_start = vocab_start

    def forward(self, logits: Tensor, temperatures: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """logits `[n, vocab / tp]`, temperatures `[n]` float32, seeds and positions (of the token before) `[n]` int64
        -> ids `[n]` int64."""
        draw = gumbel_argmax if logits.is_cuda else gumbel_argmax_torch
        scores, token_ids = draw(logits, temperatures, seeds, positions, self.vocab_start)
        if self.tp.size == 1:
            return token_ids
        # A float32 holds any token id below 2^24 exactly.
        scores, ids = self.tp.all_gather(torch.stack((scores, token_ids.float()))).unbind(1)  # [tp, n] each
        return ids.gather(0, scores.argmax(dim=0, keepdim=True)).squeeze(0).long()
