"""Workloads, run records, metrics, comparison, plots, and the command line."""
