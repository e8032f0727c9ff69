"""`nanovllm run-batch`: its options, and what it reads, writes and remembers."""
