"""Triton kernels of the fused path. Imported only where that path is taken: on a CPU without Triton nothing here is."""
