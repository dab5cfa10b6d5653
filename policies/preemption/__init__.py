"""Rules for taking memory from running requests."""
