"""The GPU kernels, one concern a file, each beside the PyTorch reference that it must equal.

- `norm_rope_store`: q-norm, k-norm, rotary embedding, and storing K and V in the paged KV cache
- `rms_norm`, `gate_mul`: RMSNorm, after an addition if need be; the activation of the MLP
- `gate_up_gemm`, `hopper_prefill`: the first half of an MLP, and attention, of large prefills on
  Hopper; `_gluon`: what the kernels for Hopper share
- `projection_norm`: q-norm and k-norm over all heads together
- `gemv`, `split_gemm`: a linear layer for one token, and for the few tokens of a decode step
- `int4_layout`: how INT4 weights lie in memory; `int4_gemv`, `int4_gemm`: the same two with these;
  `int4_dequantize`: in 16 bits, for large prefills; `int4_config`: how they divide their work
- `hopper_gemm`: a linear layer of INT4 or FP8 weights for up to 2,047 tokens on Hopper;
  `hopper_consume`: the parts of its programs that multiply; `hopper_convert`: how they make
  16-bit numbers of the weight; `hopper_config`: how it divides its work
- `packed_gemv`: the kernel of `fp8_gemv` and `int4_gemv`; `packed_words`, `packed_input`: its
  arithmetic, which INT4 experts share; `packed_tile`, `packed_config`: how it divides its work
- `moe`: a mixture of experts, of `moe_routing`, which experts each token goes to, `grouped_gemm`, a
  GEMM for each expert, and `expert_gemv`, the same for one token
- `paged_decode`, `varlen_prefill`: attention with one, and with many new tokens a sequence
- `prefill_tiles`: the latter from a list of tiles, so that a CUDA graph can record it;
  `prefill_parts`: tiles whose keys several programs share
- `decode_config`, `prefill_config`: how large the tiles of attention are
- `shared_prefix`, then `suffix_decode`: attention with one new token a sequence that reads what
  sequences have in common once; `prefix_groups`, which sequences those are, and the list of tiles;
  `prefix_tensors`, what the kernels hand on; `prefix_sharing`, the groups of an engine's steps
- `fp8_weight`: FP8 weights and inputs, and their references; `fp8_gemv`, `fp8_gemm`: a linear layer
  of FP8 weights for one token, and for few; `fp8_quantize`, `fp8_scaled_gemm`: the input in FP8 as
  well, for many; `fp8_dequantize`: in 16 bits; `fp8_config`: how they divide their work
- `fp8_cache`: what all of these share where the KV cache is in FP8
- `copy_blocks`: copies of blocks of the KV cache
- `flash_attention`: the same two attentions by the `flash_attn` package
- `torch_attention`: the reference of `varlen_prefill`, and what it shares with the others
- `attention_backend`: which of these attentions an engine uses; `attention_plan`: what they have to
  know of a step and of a layer
- `cpu_attention`, `cpu_memory`, `cpu_threads`: no kernels, but what a CPU's step has instead
- `gumbel`, `penalties`, `threshold`, `token_mask`: sampling
- `token_ranks`: the log-probability and rank of given tokens
- `all_reduce`, `prefill_all_reduce`: sums over the GPUs of one host, small and large ones
- `host_words`: memory by which the GPUs of a host wait for each other
- `_triton`: what the kernel files share

A function named `*_torch` is a reference: plain PyTorch, on any device, and what runs on a CPU. The
references of linear layers are `F.linear` and those of norm and activation. Kernels are compiled
when they are first called on a GPU.

How to read a kernel: the function with `@triton.jit` describes what one *program* does, that is one
of many blocks of threads. `tl.program_id` tells which, and the launch `kernel[grid](...)` how many
there are. Arguments in capital letters (`tl.constexpr`), and whether an argument is None, are known
when the kernel is compiled: what stands in an `if` on them is compiled or left out.
"""
