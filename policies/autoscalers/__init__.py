"""How many replicas a pool has: one policy a file."""
