"""Rules for which replica gets a request."""
