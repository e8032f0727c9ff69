"""What runs requests on a model: scheduler, KV cache, model runner, tensor-parallel ranks."""
