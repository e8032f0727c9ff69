"""What the kernels share that store to, and attend from, a KV cache in FP8.

FP8 here is e4m3: a sign, 4 bits of exponent, 3 of fraction; nothing above 448. The cache holds
`K / k_scale` and `V / v_scale`, rounded to that. What is stored never has to be multiplied by the
scales: the scores are linear in K, so k_scale becomes part of their scale, and the result is linear
in V, so v_scale is what it is multiplied by at the end.

**One K and V, whoever reads them.** A prefill without earlier tokens attends to K and V of its own,
which are there in 16 bits. If it did so, while the same tokens as a second chunk, behind a cached
prefix or after a preemption attended to what the cache holds, results would depend on how the work
was cut. So what is stored takes the place of K and V in 16 bits, too, as `norm_rope_store` writes
them: every number of e4m3 is one of bf16 and fp16. All kernels then see the same numbers, and those
for 16 bits, such as `hopper_prefill`, are used as they are where nothing has to be read from the
cache.

**fp16 for the tensor cores.** The GPU converts two numbers of e4m3 to fp16 in one instruction; to
bf16 it takes four. So keys from an FP8 cache meet their queries, and weights their values, in fp16,
also in a model that runs in bf16: its queries have fewer bits of fraction, and are far below 65504,
the largest number of fp16.

**V in pairs.** A tensor core wants two values of one dimension side by side, which are those of two
tokens; in the cache, two dimensions of one token are. Shared memory can be read transposed, but not
in units of a byte: each number would take a load of its own. So decode attention reads V in pairs
of two dimensions, has them transposed as what they seem to be, numbers of 16 bits, and multiplies
the weights once with the even dimensions, and once with the odd ones. (K needs nothing of this: the
two numbers side by side are of two dimensions, and in the cache they are so.)
"""

from typing import Any

import torch
from torch import Tensor

from nanovllm.checkpoints.kv_scales import FP8, KVScales
from nanovllm.kernels._triton import tl, triton

LARGEST = 448.0


def dot_dtype(q: Tensor, keys: Tensor) -> Any:
    """Return Triton's dtype in which q and these keys, new ones or a cache, are multiplied."""
    if q.dtype == torch.float32:
        return tl.float32
    if keys.dtype == FP8 or q.dtype == torch.float16:
        return tl.float16
    return tl.bfloat16


def unpacks_natively(q: Tensor) -> bool:
    """Whether `unpack_pairs` is to use the GPU's own instructions, which make fp16."""
    return q.is_cuda and q.dtype != torch.float32


@triton.jit
def as_operand(q, DTYPE: tl.constexpr):
    """Return q in `dot_dtype`. What fp16 cannot hold becomes its largest number, and not inf."""
    if q.dtype != DTYPE:
        q = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(DTYPE)
    return q


@triton.jit
def unpack_pairs(pairs, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Return the first and the second number of pairs of e4m3, int16, each in DTYPE.

    NATIVE: for two pairs (a, b), (c, d) at a time make (a, c) and (b, d) of them, and convert each
    of these by one instruction. Triton's interpreter, and float32, do without.
    """
    if NATIVE:
        first, second = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 both;
                .reg .b16 low, high;
                prmt.b32 both, $2, 0, 0x4420;
                mov.b32 {low, high}, both;
                cvt.rn.f16x2.e4m3x2 $0, low;
                prmt.b32 both, $2, 0, 0x4431;
                mov.b32 {low, high}, both;
                cvt.rn.f16x2.e4m3x2 $1, low;
            }
            """,
            "=r,=r,r",
            [pairs],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        first = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
        second = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return first, second


# --- in PyTorch -----------------------------------------------------------------------------------


def as_bytes(cache: Tensor) -> Tensor:
    """Return a cache as one that can be indexed: not every PyTorch does that with FP8."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def read_slots(cache: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `cache[index]` in another dtype; no scale is applied."""
    found = as_bytes(cache)[index]
    return found.view(cache.dtype).to(dtype)


def round_to_cache(k: Tensor, v: Tensor, scales: KVScales) -> tuple[Tensor, Tensor]:
    """Return K and V as an FP8 cache holds them.

    Saturating is done here, because some versions of PyTorch make NaN of what is too large.
    """
    rounded_k = (k.float() * (1.0 / scales.k)).clamp(-LARGEST, LARGEST).to(FP8)
    rounded_v = (v.float() * (1.0 / scales.v)).clamp(-LARGEST, LARGEST).to(FP8)
    return rounded_k, rounded_v
