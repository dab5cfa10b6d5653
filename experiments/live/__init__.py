"""A simulation beside a live server: what it tells of itself, a twin fed with that, and how far they are apart."""
