"""The residual stream: `h += layer(norm(h))`, each addition left open until its norm is known.

A decoder-only transformer alternates between two operations on its hidden states h `[n, hidden]`:
it normalises them for the next layer to read, and it adds that layer's output to them. Done one by
one, each is a kernel that reads and writes h once more. The fast ways all combine an operation with
its neighbours, and which combination is best depends on the step:

- One token, on a GPU: the GEMV that multiplies by the layer's weight also adds the product to h,
  and the GEMV that reads the norm next computes it on the way.
- Few tokens: the matmul is split along its inner dimension (split-K), and one kernel adds up the
  partial sums, adds them to h and normalises the result.
- Otherwise, on one rank: the GEMM adds to h as it writes. The norm is a kernel of its own.
- Several ranks, a small sum (up to 2 MiB): all-reduce, addition and norm are one kernel.
- Several ranks, a large prefill: its rows are summed over the ranks piece by piece, while the GEMM
  of the next piece runs. Addition and norm are done in between.
- Several ranks, other steps: an all-reduce, then the addition; the norm is a kernel of its own.

A model should not have to know this. So the stream is lazy by exactly one addition: `add` only
records it, and `normed`, which comes next and knows the norm, finishes both in the best way. What
`normed` hands out is a `Normed`, which may in turn leave the norm to the layer that reads it.

    attended = self.self_attn(positions, stream.normed(self.input_layernorm))
    stream.add(self.self_attn.o_proj, attended)
    x = stream.normed(self.post_attention_layernorm)
    stream.add(self.mlp.down_proj, x, before=self.mlp.gate_up_proj)

One more saving is made here. In the last layer of a prefill, attention returns only the last token
of each sequence, because only those are sampled from. Its result says so (`Attended`), and the
stream goes on with these rows only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nanovllm.kernels.rms_norm import add_rms_norm
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.quantization.weight_format import READER_SUMS, Epilogue, Norm, PartialSums
from nanovllm.utils.tensor_parallel import TensorParallel


class Projection(Protocol):
    """A linear layer, as far as the stream has to know it; those of linear.py import this file."""

    tp: TensorParallel
    output_size: int

    def matmul(
        self, x: Tensor, epilogue: Epilogue, norm: Norm | None = None
    ) -> Tensor | PartialSums:
        """Compute this rank's `x W^T + b`; see `WeightFormat.matmul`."""

    def __call__(self, x: Tensor) -> Any:
        """Compute the same as a tensor `[n, out]`."""


class Attended(NamedTuple):
    """What attention returns: its output, and the tokens it is of."""

    values: Tensor  # [n, heads * head_dim]
    rows: Tensor | None = None  # [n] integers, the rows of the stream that these are; None: all


class Addition(NamedTuple):
    """An addition to the stream that is asked for and not yet made: `h += layer(before(x))`."""

    layer: Projection
    x: Tensor | Normed
    before: Callable[[Tensor | Normed], Tensor] | None  # works row by row; None: the identity
    post_norm: RMSNorm | None  # of the layer's output, before it is added
    scale: float  # of the layer's output

    @property
    def is_plain(self) -> bool:
        """Whether the layer's output is added as it is."""
        return self.post_norm is None and self.scale == 1.0

    def layer_input(self) -> Tensor:
        """What the layer multiplies, for all rows."""
        if self.before is not None:
            return self.before(self.x)
        return self.x.values() if isinstance(self.x, Normed) else self.x

    def piece(self, rows: slice) -> Tensor:
        """This rank's product for some rows only, before it is summed over the ranks."""
        x = self.x.piece(rows) if isinstance(self.x, Normed) else self.x[rows]
        if self.before is not None:
            x = self.before(x)
        return self.layer(x)


class Normed:
    """`norm(h)` `[n, hidden]`, for one or more layers to read.

    It either has the values already, because the kernel that made the sum computed them on the way,
    or it computes them when they are first asked for. A GEMV does not ask: it normalises its input
    itself. The values must be asked for before the stream changes again.

    The values of a sum in pieces come from all ranks, piece by piece. While they are arriving,
    whoever reads them must wait; and the next such sum overwrites them.
    """

    __slots__ = ("_came_in_pieces", "_is_arriving", "_stream", "_values", "_version", "norm")

    def __init__(
        self,
        stream: ResidualStream,
        norm: RMSNorm,
        values: Tensor | None = None,
        in_pieces: bool = False,
    ) -> None:
        self.norm = norm
        self._stream = stream
        self._version = stream.version
        self._values = values
        self._came_in_pieces = in_pieces
        self._is_arriving = in_pieces

    def _check_version(self) -> None:
        assert self._version == self._stream.version, "the stream changed before its norm was read"

    @property
    def hidden(self) -> Tensor:
        """`[n, hidden]`: what is to be normalised."""
        self._check_version()
        return self._stream.hidden

    def values(self) -> Tensor:
        """`[n, hidden]`; computed once, however many layers read them."""
        if self._came_in_pieces:
            self._check_version()
        if self._is_arriving:
            self._stream.tp.wait_for_pieces()
            self._is_arriving = False
        if self._values is None:
            self._values = self.norm(self.hidden)
        return self._values

    def piece(self, rows: slice) -> Tensor:
        """Some rows of the values, which `TensorParallel.add_in_pieces` has waited for."""
        if self._values is None:
            return self.values()[rows]
        return self._values[rows]

    def multiply(self, layer: Projection, epilogue: Epilogue) -> Tensor | PartialSums:
        """Multiply the values with the weight of `layer`, in the best way for this step."""
        if self._values is None and self.hidden.is_cuda and len(self.hidden) == 1:
            return layer.matmul(self.hidden, epilogue, self.norm)  # by a GEMV, which normalises
        if self._is_arriving and not epilogue.is_gated:
            return self._multiply_while_arriving(layer)
        return layer.matmul(self.values(), epilogue)

    def _multiply_while_arriving(self, layer: Projection) -> Tensor:
        """Multiply the rows that are here while the last piece is still on its way."""
        assert self._values is not None
        num_tokens = len(self._values)
        out = self._values.new_empty(num_tokens, layer.output_size)
        for rows in self._stream.tp.arriving(num_tokens):
            layer.matmul(self._values[rows], Epilogue(out=out[rows]))
        self._is_arriving = False
        return out


class ResidualStream:
    """The hidden states of one forward pass. At most one addition to them is open.

    `hidden` is `[n, hidden]`, one row for each token of the step: the embeddings at first, then
    updated in place. With several ranks, every rank has the same; but after a sum in pieces, see
    `_add_in_pieces`, only the rows that a rank owns are up to date.
    """

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden
        self.version = 0  # counts the changes of `hidden`; a `Normed` belongs to one version
        self.tp = TensorParallel()  # the ranks that the last layer added belongs to
        self._open: Addition | None = None
        self._has_own_rows_only = False

    def add(
        self,
        layer: Projection,
        x: Tensor | Normed | Attended,
        before: Callable[[Tensor | Normed], Tensor] | None = None,
        post_norm: RMSNorm | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add `scale * post_norm(layer(before(x)))`. Computed when the norm that follows is known.

        before: a layer that works row by row, so that large prefills can be computed in pieces.
        """
        if self._open is not None:
            self._finish(None)
        if isinstance(x, Attended):
            if x.rows is not None:
                self.keep(x.rows)
            x = x.values
        self.tp = layer.tp
        self._open = Addition(layer, x, before, post_norm, scale)

    def normed(self, norm: RMSNorm) -> Normed:
        """Finish the open addition, if there is one, and return the norm of the result."""
        if self._open is None:
            return Normed(self, norm)
        return self._finish(norm) or Normed(self, norm)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, `[m]` integers."""
        if self._open is not None:
            self._finish(None)
        hidden = self.hidden[rows]
        if self._has_own_rows_only:
            hidden = self.tp.collect_rows(hidden, rows, len(self.hidden))
            self._has_own_rows_only = False
        self.hidden = hidden
        self.version += 1

    def _finish(self, norm: RMSNorm | None) -> Normed | None:
        """Make the open addition. Returns the norm of the sum where it was computed on the way."""
        addition = self._open
        assert addition is not None
        values: Tensor | None = None
        if addition.is_plain and norm is not None and self.tp.sums_in_pieces(len(self.hidden)):
            values = self._add_in_pieces(addition, norm)
        elif not addition.is_plain:
            self._add_changed(addition)
        elif self.tp.size > 1:
            values = self._add_over_ranks(addition, norm)
        else:
            values = self._add_on_one_rank(addition, norm)
        self._open = None
        self.version += 1
        if values is None or norm is None:
            return None
        return Normed(self, norm, values, in_pieces=self._has_own_rows_only)

    def _add_on_one_rank(self, addition: Addition, norm: RMSNorm | None) -> Tensor | None:
        x = addition.layer_input()
        product = addition.layer.matmul(x, Epilogue(add_to=self.hidden))
        if not isinstance(product, PartialSums):
            return None  # the kernel that multiplied has added, too
        if norm is None:
            return add_rms_norm(self.hidden, product.values, None, 0.0)
        return add_rms_norm(self.hidden, product.values, norm.weight, norm.eps)

    def _add_over_ranks(self, addition: Addition, norm: RMSNorm | None) -> Tensor | None:
        """Sum the ranks' products and add them, in one kernel where the sum is small."""
        self._complete_rows()
        x = addition.layer_input()
        product = addition.layer.matmul(x, READER_SUMS)
        if len(x) == 1:
            norm = None  # the GEMV that reads the norm computes it
        return self.tp.add_all_reduced(self.hidden, product, norm)

    def _add_in_pieces(self, addition: Addition, norm: RMSNorm) -> Tensor:
        """Sum the ranks' products of a large prefill, one piece while the next is computed.

        Each rank sums a share of every piece, its own rows, and sends the other ranks the norm
        of the result only, since this is all that they need to go on. So `hidden` stays up to date
        in a rank's own rows, and the norm's values arrive one piece after the other.
        """
        self._has_own_rows_only = True
        return self.tp.add_in_pieces(addition.piece, self.hidden, norm)

    def _add_changed(self, addition: Addition) -> None:
        """Add an output that is normalised or scaled first, which takes the complete sum."""
        self._complete_rows()
        product = addition.layer.matmul(addition.layer_input(), READER_SUMS)
        if self.tp.size > 1:
            output = self.tp.all_reduce_product(product)
        else:
            output = product.sum() if isinstance(product, PartialSums) else product
        if addition.post_norm is not None:
            output = addition.post_norm(output)
        self.hidden.add_(output, alpha=addition.scale)

    def _complete_rows(self) -> None:
        """Bring all rows of `hidden` up to date, after sums in pieces."""
        if self._has_own_rows_only:
            num_rows = len(self.hidden)
            rows = torch.arange(num_rows, device=self.hidden.device)
            self.hidden = self.tp.collect_rows(self.hidden, rows, num_rows)
            self._has_own_rows_only = False
