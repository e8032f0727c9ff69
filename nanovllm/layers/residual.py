"""The residual stream: `h += layer(norm(h))`, each addition left open until its norm is known.

A decoder-only transformer alternates between two operations on its hidden states h `[n, hidden]`:
it normalises them for the next layer to read, and it adds that layer's output to them. Done one by
one, each is a kernel that reads and writes h once more. The fast ways all combine an operation with
its neighbours, and which combination is best depends on the step. On a GPU:

| the step has     | addition and norm, on one rank      | on several ranks                        |
|------------------|-------------------------------------|-----------------------------------------|
| 1 token          | the GEMV that multiplies adds to h; | the all-reduce adds to h; the GEMV that |
|                  | the GEMV that reads the norm, norms | reads the norm, norms                   |
| few, in a decode | one kernel adds the partial sums of | one kernel sums over the ranks, adds to |
| step or a graph  | split-K, adds them to h, and norms  | h, and norms (any sum of up to 2 MiB)   |
| 4,096 and more   | as below                            | the ranks sum one piece of the rows     |
|                  |                                     | while the GEMM of the next one runs;    |
|                  |                                     | each norms the rows that it has summed  |
| otherwise        | the GEMM adds to h as it writes;    | an all-reduce, then an addition;        |
|                  | the norm is a kernel of its own     | the norm is a kernel of its own         |

A model should not have to know this. So the stream is lazy by exactly one addition: `add` only
records it, and `normed`, which comes next and knows the norm, finishes both in the best way. What
`normed` hands out is a `Normed`, which may in turn leave the norm to the layer that reads it. A
layer with weights in FP8 may want its input in FP8, too: the kernel that computes the norm rounds.

    x = stream.normed(self.input_layernorm, self.self_attn.qkv_proj)
    stream.add(self.self_attn.o_proj, self.self_attn(positions, x))
    x = stream.normed(self.post_attention_layernorm, self.mlp.gate_up_proj)
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

from nanovllm.kernels.fp8_weight import FP8Input, Rounding
from nanovllm.kernels.rms_norm import add_rms_norm
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.quantization.weight_format import (
    READER_SUMS,
    Epilogue,
    Norm,
    PartialSums,
    Reader,
    uses_gemv,
)
from nanovllm.utils.tensor_parallel import TensorParallel


class Projection(Protocol):
    """A linear layer, as far as the stream has to know it; those of linear.py import this file."""

    tp: TensorParallel
    output_size: int

    def matmul(self, x: Any, epilogue: Epilogue, norm: Norm | None = None) -> Tensor | PartialSums:
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
    before: Callable[..., Any] | None  # of x and of its reader; row by row; None: the identity
    post_norm: RMSNorm | None  # of the layer's output, before it is added
    scale: float  # of the layer's output

    def product(self, epilogue: Epilogue) -> Tensor | PartialSums:
        """This rank's product for all rows."""
        x = self.x
        if isinstance(x, Normed):
            x.keeps_values = False  # this is the last reader
        if self.before is not None:
            x = self.before(x, self.layer)
        if isinstance(x, Normed) and uses_gemv(x.hidden):
            return x.project(self.layer, epilogue)  # the layer computes the norm, too
        return self.layer.matmul(x.values() if isinstance(x, Normed) else x, epilogue)

    def piece(self, rows: slice) -> Tensor:
        """This rank's product for some rows only, before it is summed over the ranks."""
        x = self.x.piece(rows) if isinstance(self.x, Normed) else self.x[rows]
        if self.before is not None:
            x = self.before(x)
        return self.layer(x)  # complete: what is copied to another rank is one tensor


class Normed:
    """`norm(h)` `[n, hidden]`, for one or more layers to read.

    It either has the values already, because the kernel that made the sum computed them on the way,
    or it computes them when they are first asked for, which must be before the stream changes; then
    it keeps them. A GEMV does not ask: it normalises its input itself.

    The values of a sum in pieces come from all ranks, piece by piece, and are waited for when they
    are read. They are gone when the stream changes, because the next such sum overwrites them.
    """

    __slots__ = ("_in_pieces", "_stream", "_values", "_version", "keeps_values", "norm")

    def __init__(
        self,
        stream: ResidualStream,
        norm: RMSNorm,
        values: Tensor | FP8Input | None = None,
        in_pieces: bool = False,
    ) -> None:
        self.norm = norm
        self._stream = stream
        self._version = stream.version
        self._values = values
        self._in_pieces = in_pieces
        # Off for the last reader. The activation of an MLP is the peak of a prefill's memory, and
        # runs when the gate and up projection has read the values.
        self.keeps_values = True

    def _check_version(self) -> None:
        assert self._version == self._stream.version, "the stream changed before its norm was read"

    @property
    def hidden(self) -> Tensor:
        """`[n, hidden]`: what is to be normalised."""
        self._check_version()
        return self._stream.hidden

    def values(self) -> Any:
        """`[n, hidden]`, in FP8 if their reader wants that; computed once, however many read."""
        if self._in_pieces:
            self._check_version()
            self._stream.tp.wait_for_pieces()
        values = self._values
        if values is None:
            values = self.norm(self.hidden)
        self._values = values if self.keeps_values else None
        return values

    def select(self, rows: Tensor) -> Normed:
        """The same of some rows only, `[m]` integers."""
        return Normed(self._stream, self.norm, self.values()[rows])

    def piece(self, rows: slice) -> Tensor:
        """Some rows of the values, which `TensorParallel.add_in_pieces` has waited for."""
        self._check_version()
        values = self.norm(self.hidden) if self._values is None else self._values
        assert isinstance(values, Tensor), "an input in FP8 is one product's"
        self._values = values
        return values[rows]

    def project(self, layer: Projection, epilogue: Epilogue) -> Tensor | PartialSums:
        """Multiply the values with the weight of `layer`, in the best way for this step."""
        if self._values is None and uses_gemv(self.hidden):
            return layer.matmul(self.hidden, epilogue, self.norm)
        if self._in_pieces:
            return self._project_while_arriving(layer)
        return layer.matmul(self.values(), epilogue)

    def _project_while_arriving(self, layer: Projection) -> Tensor:
        """Multiply the rows that are here while the last piece is still on its way."""
        self._check_version()
        assert isinstance(self._values, Tensor)
        num_tokens = len(self._values)
        out = self._values.new_empty(num_tokens, layer.output_size)
        for rows in self._stream.tp.arriving(num_tokens):
            layer.matmul(self._values[rows], Epilogue(out=out[rows]))
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
        self.tp = TensorParallel()  # one rank, until a layer is added that knows its ranks
        self._open: Addition | None = None
        self._has_own_rows_only = False

    def add(
        self,
        layer: Projection,
        x: Tensor | Normed | Attended,
        before: Callable[..., Any] | None = None,
        post_norm: RMSNorm | None = None,
        scale: float = 1.0,
    ) -> None:
        """Add `scale * post_norm(layer(before(x)))`. Computed when the norm that follows is known.

        before: a layer that x goes through first, called with x and maybe with `layer`, which
            reads its result. It works row by row, so that large prefills can be computed in pieces.
        post_norm, scale: as families with a norm on the output (Gemma, OLMo) or a residual
            multiplier (Granite) need them. The ranks do not sum such outputs in pieces.
        """
        if self._open is not None:
            self._make_addition(None)
        if isinstance(x, Attended):
            if x.rows is not None:
                self.keep(x.rows)
            x = x.values
        self.tp = layer.tp
        self._open = Addition(layer, x, before, post_norm, scale)

    def normed(self, norm: RMSNorm, reader: Reader | None = None) -> Normed:
        """Finish the open addition, if there is one, and return the norm of the result.

        reader: the only layer that reads it, if there is only one.
        """
        if self._open is None:
            self._complete_rows()
            return Normed(self, norm)
        rounding = None if reader is None else reader.rounding(self.hidden)
        values = self._make_addition(norm, rounding)
        in_pieces = values is not None and self._has_own_rows_only
        return Normed(self, norm, values, in_pieces)

    def values(self) -> Tensor:
        """Finish the open addition, if there is one, and return `hidden` as it is, unnormalised.

        As all of `hidden` it changes in place, so it must be read before the next `normed`.
        """
        if self._open is not None:
            self._make_addition(None)
        self._complete_rows()
        return self.hidden

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, `[m]` integers."""
        if self._open is not None:
            self._make_addition(None)
        if self._has_own_rows_only:
            self.hidden = self.tp.collect_rows(self.hidden, rows)
            self._has_own_rows_only = False
        else:
            self.hidden = self.hidden[rows]
        self.version += 1

    def _make_addition(
        self, norm: RMSNorm | None, rounding: Rounding | None = None
    ) -> Tensor | FP8Input | None:
        """Make the open addition. Returns the norm of the sum, if it was computed on the way."""
        addition = self._open
        assert addition is not None
        if addition.post_norm is not None or addition.scale != 1.0:
            values = self._add_changed(addition, norm, rounding)
        elif norm is not None and self.tp.sums_in_pieces(len(self.hidden)):
            values = self._add_in_pieces(addition, norm)
        elif self.tp.size > 1:
            values = self._add_over_ranks(addition, norm)
        else:
            values = self._add_on_one_rank(addition, norm, rounding)
        self._open = None
        self.version += 1
        return values

    def _add_on_one_rank(
        self, addition: Addition, norm: RMSNorm | None, rounding: Rounding | None
    ) -> Tensor | FP8Input | None:
        product = addition.product(Epilogue(add_to=self.hidden))
        if isinstance(product, PartialSums):
            return self._add_sums(product.values, norm, rounding)
        return None  # the kernel that multiplied has added, too

    def _add_over_ranks(self, addition: Addition, norm: RMSNorm | None) -> Tensor | None:
        """Sum the ranks' products and add them, in one kernel where the sum is small."""
        self._complete_rows()
        product = addition.product(READER_SUMS)
        if uses_gemv(self.hidden):
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

    def _add_changed(
        self, addition: Addition, norm: RMSNorm | None, rounding: Rounding | None
    ) -> Tensor | FP8Input | None:
        """Add an output that is normalised or scaled first, which takes the complete sum.

        Returns `norm` of the result where the kernel that adds computes it on the way.
        """
        self._complete_rows()
        product = addition.product(READER_SUMS)
        post_norm = addition.post_norm
        if self.tp.size > 1:
            whole = product.sum() if isinstance(product, PartialSums) else product
            product = self.tp.all_reduce(whole)
        if isinstance(product, Tensor) and not product.is_cuda:
            if post_norm is not None:
                product = post_norm(product)
            self.hidden.add_(product, alpha=addition.scale)
            return None
        sums = product[None] if isinstance(product, Tensor) else product.values
        if uses_gemv(self.hidden):
            norm = None  # the GEMV that reads the norm computes it
        return self._add_sums(sums, norm, rounding, post_norm, addition.scale)

    def _add_sums(
        self,
        partial_sums: Tensor,
        norm: RMSNorm | None,
        rounding: Rounding | None,
        post_norm: RMSNorm | None = None,
        scale: float = 1.0,
    ) -> Tensor | FP8Input | None:
        """Add partial sums `[splits, n, hidden]` in one kernel, which computes `norm` as well."""
        return add_rms_norm(
            self.hidden,
            partial_sums,
            weight=None if norm is None else norm.weight,
            eps=0.0 if norm is None else norm.eps,
            post_weight=None if post_norm is None else post_norm.weight,
            post_eps=0.0 if post_norm is None else post_norm.eps,
            scale=scale,
            rounding=rounding,
        )

    def _complete_rows(self) -> None:
        """Bring all rows of `hidden` up to date, after sums in pieces."""
        if self._has_own_rows_only:
            rows = torch.arange(len(self.hidden), device=self.hidden.device)
            self.hidden = self.tp.collect_rows(self.hidden, rows)
            self._has_own_rows_only = False
