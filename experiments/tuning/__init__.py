"""Tuning: a search over policies' knobs, limits and any other field of a run, for one objective or two."""
