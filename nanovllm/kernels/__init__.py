"""The GPU kernels, one concern a file, each beside the PyTorch reference it must equal.

- `rms_norm`: RMSNorm, with the residual addition before it
- `norm_rope_store`: q-norm, k-norm, rotary embedding, and new keys and values into the paged KV cache
- `silu_mul`: the activation of the MLP
- `paged_decode`: attention of one new token a sequence over the paged cache
- `varlen_prefill`: causal attention of many new tokens, over fresh or cached keys
- `flash_attention`: the same two attentions through the `flash_attn` package
- `gumbel`: sampling

A function named `*_torch` is the reference: plain PyTorch, any device. The others need a GPU. A kernel is
compiled when it is first called; importing this package compiles nothing.
"""
