"""Models: plain PyTorch, inference only, over the paged KV cache."""
