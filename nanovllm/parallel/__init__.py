"""How tensor-parallel ranks talk to each other: commands through shared memory, and NCCL."""
