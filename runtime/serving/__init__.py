"""Serving over HTTP: a front process that speaks HTTP and text, and an engine process that works in token ids."""
