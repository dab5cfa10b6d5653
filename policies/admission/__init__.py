"""Rules for promising memory to a waiting request."""
