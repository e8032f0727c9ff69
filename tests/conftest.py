"""Shared by all tests: small random checkpoints, and what transformers generates from them."""

import os

import torch

if not torch.cuda.is_available():
    # Before the first import of triton: its interpreter then runs the kernels on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")
