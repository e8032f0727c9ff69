"""The GPU kernels, one concern a file, each beside the PyTorch reference it must equal.

- `norm_rope_store`: q-norm, k-norm, rotary embedding, and new keys and values into the paged KV cache
- `rms_norm`, `silu_mul`: RMSNorm, with an addition before it if need be, and the activation of the MLP
- `gemv`, `split_gemm`: a linear layer for one and for a few tokens (their references: `F.linear` and the two above)
- `paged_decode`, `varlen_prefill`: attention over the paged cache, of one and of many new tokens a sequence
- `flash_attention`: the same two attentions through the `flash_attn` package
- `gumbel`, `penalties`, `threshold`: sampling
- `all_reduce`: the sum over the GPUs of one host

A function named `*_torch` is the reference: plain PyTorch, any device. The others compile when first called on a GPU.
"""
