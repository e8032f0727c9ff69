"""Token embedding and LM head, their vocabulary split over the tensor-parallel ranks."""

import torch
from torch import nn
from torch.nn import functional as F

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import normed_linear
from nanovllm.utils.context import get_context
from nanovllm.utils.loader import check_shape
from nanovllm.utils.tensor_parallel import get_tensor_parallel


class VocabParallelEmbedding(nn.Module):
    """Rows `[vocab_start, vocab_start + rows)` of the embedding matrix, each rank the same number of rows.

    A vocabulary that does not divide is padded; the padding rows are zero.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.tp = get_tensor_parallel()
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // self.tp.size)
        self.vocab_start = self.rows * self.tp.rank
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size), requires_grad=False)
        self.weight.weight_loader = self.weight_loader

    def weight_loader(self, param: nn.Parameter, loaded, shard_id: None = None) -> None:
        check_shape(loaded, (self.vocab_size, param.shape[1]))
        stop = min(self.vocab_start + self.rows, self.vocab_size)
        num_real = max(stop - self.vocab_start, 0)
        if num_real:
            param[:num_real].copy_(loaded[self.vocab_start : stop])
        param[num_real:].zero_()

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[n]` token ids -> `[n, hidden]`."""
        if self.tp.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.vocab_start
        is_here = (local >= 0) & (local < self.rows)
        embedded = F.embedding(local.clamp(0, self.rows - 1), self.weight)
        return self.tp.all_reduce(embedded * is_here.unsqueeze(1))


class ParallelLMHead(VocabParallelEmbedding):
    """The projection to logits. Its weight may be the embedding's own (tied embeddings)."""

    def forward(self, hidden: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """`[num_tokens, hidden]` -> this rank's logits `[num_seqs, real rows]` of each sequence's last token."""
        context = get_context()
        if context.is_prefill:
            hidden = hidden[context.cu_seqlens_q[1:] - 1]
        num_real = max(min(self.rows, self.vocab_size - self.vocab_start), 0)
        return normed_linear(hidden, norm, self.weight[:num_real])
