"""Orders of the waiting requests."""
