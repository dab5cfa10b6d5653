"""Workloads without data: arrival processes, length distributions and named combinations of them."""
