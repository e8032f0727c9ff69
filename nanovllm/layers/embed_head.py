"""Token embedding and LM head, their vocabulary split over the tensor-parallel ranks."""

import torch
from torch import Tensor, nn

from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import normed_linear
from nanovllm.utils.loader import check_shape
from nanovllm.utils.tensor_parallel import get_tensor_parallel


class VocabParallelEmbedding(nn.Module):
    """Rows `[vocab_start, vocab_start + rows)` of the embedding matrix; zeros pad it to as many on each rank."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.tp, self.vocab_size = get_tensor_parallel(), vocab_size
        self.rows = -(-vocab_size // self.tp.size)
        self.vocab_start = self.rows * self.tp.rank
        self.real_rows = max(min(self.rows, vocab_size - self.vocab_start), 0)
        self.weight = nn.Parameter(torch.empty(self.rows, hidden_size), requires_grad=False)
        self.weight.weight_loader = self.weight_loader

    def weight_loader(self, param: nn.Parameter, loaded, shard_id: None = None) -> None:
        check_shape(loaded, (self.vocab_size, param.shape[1]))
        if self.real_rows:
            param[: self.real_rows].copy_(
                loaded[self.vocab_start : self.vocab_start + self.real_rows]
            )
        param[self.real_rows :].zero_()

    def forward(self, token_ids: Tensor) -> Tensor:
        """`[n]` token ids -> `[n, hidden]`."""
        if self.tp.size == 1:
            return self.weight[token_ids]  # for 16 tokens several times faster than F.embedding
        local = token_ids - self.vocab_start
        row = local.clamp(0, self.rows - 1)
        return self.tp.all_reduce(self.weight[row] * (row == local).unsqueeze(1))[
            0
        ]  # zero on all ranks but one


class ParallelLMHead(VocabParallelEmbedding):
    """The projection to logits. Its weight may be the embedding's own (tied embeddings)."""

    def forward(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """`[num_seqs, hidden]` -> this rank's logits `[num_seqs, real rows]`."""
        return normed_linear(hidden, norm, self.weight[: self.real_rows])
