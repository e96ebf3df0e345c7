"""A training step rehearsed on fake CUDA tensors: no GPU, no values, but the code that a GPU would run."""
