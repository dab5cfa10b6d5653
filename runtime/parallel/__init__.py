"""Tensor parallelism (Shoeybi et al., arXiv:1909.08053): one model over several devices, planned by rank 0."""
