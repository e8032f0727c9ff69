"""`residual + x W^T` for 2 to 16 tokens: too many for `gemv`, too few for cuBLAS to get near the memory's speed.

A program takes whole rows of the weight, as in `gemv`, and holds them in registers, in the tensor cores' layout,
before it waits for x: the weight is read while the kernel before this one is still running.
"""

from torch import Tensor

from nanovllm.kernels._triton import launch_next, next_power_of_2, pdl_options, tl, triton, wait_for_previous

MAX_TOKENS = 16  # rows of a tensor-core tile; with more, cuBLAS is as fast
MAX_IN_SIZE = 4096  # what fits the registers
ROWS = 8  # of the weight, a program


@triton.jit
def _skinny_gemm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, num_tokens, out_size, IN_SIZE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # The inner dimension is split over the warps: the batch dimension of a batched product, summed at the end.
    part = tl.arange(0, PARTS)[:, None, None] * (CHUNK // PARTS) + tl.arange(0, CHUNK // PARTS)[None, None, :]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    weights = ()
    for first in tl.static_range(0, IN_SIZE, CHUNK):
        mask = (row < out_size) & (first + part < IN_SIZE)
        offsets = row.to(tl.int64) * IN_SIZE + first + part
        weights = weights + (tl.load(weight_ptr + offsets, mask=mask, other=0.0),)
    launch_next(PDL)
    wait_for_previous(PDL)
    token = tl.arange(0, TOKENS)[None, :, None]
    acc = tl.zeros([PARTS, TOKENS, ROWS], tl.float32)
    for chunk in tl.static_range(0, (IN_SIZE + CHUNK - 1) // CHUNK):
        column = chunk * CHUNK + part
        x = tl.load(x_ptr + token * IN_SIZE + column, mask=(token < num_tokens) & (column < IN_SIZE), other=0.0)
        acc = tl.dot(x, tl.permute(weights[chunk], (0, 2, 1)), acc, input_precision="ieee")
    token, row = tl.arange(0, TOKENS)[:, None], tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    mask = (token < num_tokens) & (row < out_size)
    out = tl.sum(acc, 0) + tl.load(residual_ptr + token * out_size + row, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        out += tl.load(bias_ptr + row, mask=row < out_size, other=0.0).to(tl.float32)
    tl.store(residual_ptr + token * out_size + row, out.to(residual_ptr.dtype.element_ty), mask=mask)


def takes_skinny_gemm(x: Tensor) -> bool:
    return x.is_cuda and x.dtype.itemsize == 2 and x.shape[0] <= MAX_TOKENS and x.shape[1] <= MAX_IN_SIZE


def skinny_gemm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """Add `x W^T + bias` to `residual`, in place, and return it.

    x `[n, in]` that `takes_skinny_gemm`, weight `[out, in]`, bias `[out]`, residual `[n, out]`, contiguous.
    """
    (num_tokens, in_size), out_size = x.shape, weight.shape[0]
    assert num_tokens <= MAX_TOKENS and in_size <= MAX_IN_SIZE
    assert x.is_contiguous() and weight.is_contiguous() and residual.is_contiguous()
    # Measured: chunks of x that are loaded one after the other, so that registers are left for the next kernel.
    num_warps, chunk = (4, 1024) if in_size <= 2048 else (8, 2048)
    _skinny_gemm_kernel[(triton.cdiv(out_size, ROWS),)](
        x, weight, bias, residual, num_tokens, out_size, in_size, MAX_TOKENS, ROWS, PARTS=num_warps,
        CHUNK=min(chunk, max(next_power_of_2(in_size), 16 * num_warps)), num_warps=num_warps, **pdl_options(),
    )  # fmt: skip
    return residual
