"""Timings of the project, each a module that prints a table and can save its figures."""
