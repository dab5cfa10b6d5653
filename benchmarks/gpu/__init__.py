"""Measurements of the runtime on a GPU: serving as a whole, and its kernels one at a time."""
