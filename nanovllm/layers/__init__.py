"""The layers that models are built from, sharded over the tensor-parallel ranks."""
